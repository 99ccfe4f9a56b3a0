/* Backs up pages in a mount of ttmfs and reads them back, with system calls alone: no library, no header of ttmfs.
 *
 *     cc -O2 -o evict examples/evict.c && ./evict /mnt/ttm/c 1024   # the backup to make, and the number of pages
 *
 * The page of index i lies in BACKUP/.image at byte i * page_size. Its handle, which is also its name, is i + 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

static void check(int ok, const char *what)
{
	if (!ok && fprintf(stderr, "evict: %s: %s\n", what, strerror(errno)))
		exit(1);
}

int main(int argc, char **argv)
{
	check((errno = EINVAL, argc == 3), "usage: evict BACKUP PAGES");
	char path[4096], drop[64], page_size[32] = "";
	check(!mkdir(argv[1], 0700), argv[1]); /* ttm_backup_shmem_create() */
	snprintf(path, sizeof path, "%s/..", argv[1]);
	check(getxattr(path, "user.ttmfs.page_size", page_size, sizeof page_size - 1) > 0, path);
	size_t count = strtoul(argv[2], NULL, 10), length = count * strtoul(page_size, NULL, 10);
	char *pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	check(pages != MAP_FAILED, "mmap");
	for (size_t i = 0; i < length; i += sizeof(size_t))
		*(size_t *)(pages + i) = i * 0x9E3779B97F4A7C15; /* a pattern to check later */

	int image = (snprintf(path, sizeof path, "%s/.image", argv[1]), open(path, O_RDWR | O_CLOEXEC));
	check(image >= 0, path);

	for (size_t done = 0; done < length;) { /* ttm_backup_backup_page(), up to 256 pages a request */
		ssize_t stored = pwrite(image, pages + done, length - done, done);
		check(stored > 0, "backing up"); /* ENOSPC: the pages before this one are stored */
		done += stored;
	}
	check(!madvise(pages, length, MADV_DONTNEED), "madvise"); /* now this process no longer holds them */
	check(!fsync(image), "writing back"); /* and to swap, if there is any */

	for (size_t done = 0; done < length;) { /* ttm_backup_copy_page() */
		ssize_t copied = pread(image, pages + done, length - done, done);
		check(copied > 0, "copying back");
		done += copied;
	}
	for (size_t i = 0; i < length; i += sizeof(size_t))
		check((errno = EIO, *(size_t *)(pages + i) == i * 0x9E3779B97F4A7C15), "a page came back changed");

	snprintf(drop, sizeof drop, "1-%zu", count); /* ttm_backup_drop(), of a range of handles */
	check(!setxattr(argv[1], "user.ttmfs.drop", drop, strlen(drop), 0), "dropping");
	check(!close(image) && !rmdir(argv[1]), "rmdir"); /* ttm_backup_fini() */
	printf("%zu pages out and back\n", count);
}
