/* Backs up pages in a mount of ttmfs, gives their memory back, and reads them back, with libttmfs.
 *
 *     cc -O2 -o evict examples/evict.c $(pkg-config --cflags --libs ttmfs)
 *     ./evict /mnt/ttm/c 1024      # the backup to make, and the number of pages
 *
 * If anything fails, the backup is ended all the same.
 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ttmfs.h>

#define PATTERN(i) ((i) * 0x9E3779B97F4A7C15)

static int failed(const char *what, int error)
{
	fprintf(stderr, "evict: %s: %s\n", what, strerror(-error));
	return 1;
}

static int out_and_back(struct ttmfs *backup, uint64_t *words, size_t count)
{
	size_t length = count * ttmfs_page_size(backup);
	for (size_t i = 0; i < length / sizeof *words; i++)
		words[i] = PATTERN(i); /* to check later */

	ssize_t stored = ttmfs_backup_pages(backup, words, count, 0, 0); /* at the indices from 0 on */
	if (stored < 0)
		return failed("backing up", (int)stored);
	if ((size_t)stored < count)
		return failed("not all pages had room", -ENOSPC);
	if (madvise(words, length, MADV_DONTNEED)) /* now this process no longer holds them */
		return failed("madvise", -errno);
	int error = ttmfs_writeback(backup); /* and to swap, if there is any */
	if (error)
		return failed("writing back", error);

	for (size_t i = 0; i < count; i++) {
		char *page = (char *)words + i * ttmfs_page_size(backup);
		error = ttmfs_copy_page(backup, page, i + 1, 0); /* the handle of index i is i + 1 */
		if (!error)
			error = ttmfs_drop(backup, i + 1);
		if (error)
			return failed("copying back", error);
	}
	for (size_t i = 0; i < length / sizeof *words; i++)
		if (words[i] != PATTERN(i))
			return failed("a page came back changed", -EIO);
	printf("%zu pages out and back\n", count);
	return 0;
}

int main(int argc, char **argv)
{
	size_t count = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
	struct ttmfs *backup;
	if (count == 0 || count > 1 << 20) {
		fprintf(stderr, "usage: evict BACKUP PAGES, with at most 1048576 pages\n");
		return 2;
	}
	int error = ttmfs_create(&backup, argv[1], 0, 0700);
	if (error)
		return failed(argv[1], error);
	size_t length = count * ttmfs_page_size(backup);
	void *pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int status = pages == MAP_FAILED ? failed("mmap", -errno) : out_and_back(backup, pages, count);
	error = ttmfs_fini(backup); /* also after a failure: otherwise its pages would stay */
	if (error)
		status = failed("ending the backup", error);
	ttmfs_close(backup);
	return status;
}
