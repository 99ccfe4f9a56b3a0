/* libttmfs: see ttmfs.h. Linux and a C11 compiler; no library but libc.
 *
 * A backup is one sparse file. Page i lies at byte i * page_size, and exists if any part of it is data. This process
 * reaches the file in one of two ways, by the same system calls and with the same results:
 *
 * - natively, through BACKUP/.shmem, which is the memory itself;
 * - through the mount, by requests for BACKUP/.image. One request carries at most REQUEST bytes of whole pages, so no
 *   reader through the mount sees half a page.
 *
 * Which of them, and what is checked first, follows ttmfs/client/directory.py and ttmfs/client/own_file.py.
 *
 * Threads: nothing in struct ttmfs changes after it is open, except descriptors of .image, which are opened at their
 * first use and put in place by compare-and-swap, and `ended`.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "ttmfs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#define REQUEST ((size_t)1 << 20) /* bytes of one request through the mount: 256 pages of the caller's memory */
#define STEP ((size_t)16 << 20)   /* bytes of one system call on the memory itself */
#define FEW_PAGES 64              /* up to this number, pages are probed one by one: SEEK_HOLE scans a run to its end */
#define ROOT_INODE 1
#define PATH_ONLY (O_PATH | O_DIRECTORY | O_CLOEXEC)

enum image { READING, WRITING, WRITING_BACK, IMAGES };
static const int image_flags[IMAGES] = { O_RDONLY, O_WRONLY, O_WRONLY | O_SYNC };

struct ttmfs {
	int directory; /* of the backup and of the mount's root, by PATH_ONLY: found again after a rename */
	int mount;
	int own_file; /* .shmem, or -1 */
	size_t page_size;
	ino_t id;
	atomic_int images[IMAGES]; /* descriptors of .image, or -1 */
	atomic_bool ended;
};

/* Descriptor numbers have ten digits at most. */
struct proc_path {
	char text[32];
};

static struct proc_path proc_path(int fd)
{
	struct proc_path path;
	snprintf(path.text, sizeof path.text, "/proc/self/fd/%d", fd);
	return path;
}

/* Returns the negative errno of a failed system call on an open backup. */
static int failure(void)
{
	switch (errno) {
	case ENOENT: /* its name is gone */
		return -ESTALE;
	case EFBIG:
		return -EINVAL;
	default:
		return -errno;
	}
}

static int open_at(int directory, const char *name, int flags)
{
	int fd;
	do
		fd = openat(directory, name, flags | O_CLOEXEC);
	while (fd < 0 && errno == EINTR);
	return fd;
}

/* Returns the number in an extended attribute, or a negative errno. */
static int64_t number(int fd, const char *attribute)
{
	char text[20] = "", *end;
	ssize_t length;
	do
		length = getxattr(proc_path(fd).text, attribute, text, sizeof text - 1);
	while (length < 0 && errno == EINTR); /* counting pages waits for the disk of store= */
	if (length < 0)
		return failure();
	long long value = strtoll(text, &end, 10);
	return length == 0 || *end || value < 0 ? -EIO : (int64_t)value;
}

/* Returns a descriptor of .image, which stays open, or a negative errno. */
static int image(struct ttmfs *backup, enum image kind)
{
	int fd = atomic_load(&backup->images[kind]);
	if (fd >= 0)
		return fd;
	int opened = open_at(backup->directory, ".image", image_flags[kind] | O_NOFOLLOW);
	if (opened < 0)
		return failure();
	fd = -1;
	if (atomic_compare_exchange_strong(&backup->images[kind], &fd, opened))
		return opened;
	close(opened); /* another thread was first */
	return fd;
}

/* --- opening --- */

/* Finds the mount of ttmfs whose files have this device number. The kernel's list is the only proof: anyone can imitate
 * the attributes. Returns the uid of the user who serves it, -EINVAL if there is none, or another negative errno. */
static int64_t served_by(dev_t device)
{
	FILE *list = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0;
	int64_t found = list ? -EINVAL : -errno;
	while (list && found < 0 && getline(&line, &room, list) >= 0) {
		unsigned int major_number, minor_number;
		char root[3];
		const char *type = strstr(line, " - fuse.ttmfs "); /* blanks in paths are escaped */
		if (type && sscanf(line, "%*s %*s %u:%u %2s", &major_number, &minor_number, root) == 3 &&
		    makedev(major_number, minor_number) == device && !strcmp(root, "/")) {
			const char *options = strchr(type + 14, ' '); /* after the source, which the user chose */
			const char *user = options ? strstr(options, "user_id=") : NULL;
			found = user ? strtoll(user + 8, NULL, 10) : 0;
		}
	}
	free(line);
	if (list)
		fclose(list);
	return found;
}

/* Whether the pages are in memory alone. The mount's .config is JSON, in which only a key is followed by a colon. */
static bool is_in_memory(int mount)
{
	char text[65536];
	size_t length = 0;
	ssize_t got = 0;
	int fd = open_at(mount, ".config", O_RDONLY | O_NOFOLLOW);
	if (fd < 0)
		return false;
	while (length < sizeof text - 1 && (got = read(fd, text + length, sizeof text - 1 - length)) > 0)
		length += (size_t)got;
	close(fd);
	text[length] = '\0';
	return strstr(text, "\"store\": null");
}

/* Opens the backup's own file: .shmem, which is the file itself or a link to it. Returns -1 if this process may not.
 * With store= it is a link that is not followed: there the daemon counts the pages. */
static int open_own_file(int directory, int mount, int64_t server)
{
	if (server != 0 && server != (int64_t)geteuid())
		return -1; /* it cannot be the file itself, and a link could lead anywhere */
	int fd = open_at(directory, ".shmem", O_RDWR | O_NOFOLLOW);
	if (fd < 0 && errno == ELOOP && is_in_memory(mount))
		fd = open_at(directory, ".shmem", O_RDWR);
	return fd < 0 ? -1 : fd;
}

/* Opens the backup of two descriptors, which it takes over unless it fails. */
static int open_directory(struct ttmfs **backup, int directory, int mount, int flags)
{
	struct stat of_directory, of_mount;
	if (fstat(directory, &of_directory) || fstat(mount, &of_mount))
		return -errno;
	if (of_directory.st_ino == ROOT_INODE || of_directory.st_dev != of_mount.st_dev)
		return -EINVAL;
	int64_t server = served_by(of_directory.st_dev);
	int64_t page_size = server < 0 ? server : number(mount, "user.ttmfs.page_size");
	if (page_size < 0)
		return (int)page_size;
	if (page_size < 4096 || page_size > 1 << 30 || (page_size & (page_size - 1)))
		return -EIO; /* not what a ttmfs answers */
	struct ttmfs *opened = malloc(sizeof *opened);
	if (!opened)
		return -ENOMEM;
	opened->directory = directory;
	opened->mount = mount;
	opened->own_file = flags & TTMFS_THROUGH_MOUNT ? -1 : open_own_file(directory, mount, server);
	opened->page_size = (size_t)page_size;
	opened->id = of_directory.st_ino;
	for (int kind = 0; kind < IMAGES; kind++)
		atomic_init(&opened->images[kind], -1);
	atomic_init(&opened->ended, false);
	*backup = opened;
	return 0;
}

int ttmfs_open(struct ttmfs **backup, const char *path, int flags)
{
	*backup = NULL;
	if (flags & ~TTMFS_THROUGH_MOUNT)
		return -EINVAL;
	int directory = open_at(AT_FDCWD, path, PATH_ONLY);
	if (directory < 0)
		return errno == ENOTDIR ? -EINVAL : -errno;
	int mount = open_at(directory, "..", PATH_ONLY);
	int error = mount < 0 ? -errno : open_directory(backup, directory, mount, flags);
	if (error)
		close(directory);
	if (error && mount >= 0)
		close(mount);
	return error;
}

/* Returns the name of the backup in the mount's root, or a negative errno. It may have been renamed. */
static int name_of(const struct ttmfs *backup, char name[NAME_MAX + 1])
{
	char target[PATH_MAX];
	struct stat status;
	struct dirent *entry;
	ssize_t length = readlink(proc_path(backup->directory).text, target, sizeof target - 1);
	if (length > 0) {
		target[length] = '\0';
		const char *slash = strrchr(target, '/');
		snprintf(name, NAME_MAX + 1, "%.*s", NAME_MAX, slash ? slash + 1 : target);
		if (!fstatat(backup->mount, name, &status, AT_SYMLINK_NOFOLLOW) && status.st_ino == backup->id)
			return 0;
	}
	/* The kernel may have dropped the name by which it was opened, as it does when modes change. */
	int error = -ESTALE;
	DIR *root = opendir(proc_path(backup->mount).text);
	while (root && error && (entry = readdir(root)))
		if (entry->d_ino == backup->id) {
			snprintf(name, NAME_MAX + 1, "%s", entry->d_name);
			error = 0;
		}
	if (root)
		closedir(root);
	return error;
}

static int remove_directory(struct ttmfs *backup)
{
	char name[NAME_MAX + 1];
	int error = name_of(backup, name);
	return error ? error : unlinkat(backup->mount, name, AT_REMOVEDIR) ? failure() : 0;
}

/* Makes a directory in the root of a mount of ttmfs. Sets descriptors of both, and its name. */
static int make_directory(const char *path, mode_t mode, int *directory, int *mount, char name[NAME_MAX + 1])
{
	char above[PATH_MAX];
	size_t length = strlen(path);
	while (length > 1 && path[length - 1] == '/')
		length--;
	size_t start = length;
	while (start > 0 && path[start - 1] != '/')
		start--;
	if (length >= sizeof above || length - start > NAME_MAX)
		return -ENAMETOOLONG;
	struct stat status;
	snprintf(above, sizeof above, "%.*s", start ? (int)start : 1, start ? path : ".");
	snprintf(name, NAME_MAX + 1, "%.*s", (int)(length - start), path + start);
	int64_t error = 0;
	*mount = open_at(AT_FDCWD, above, PATH_ONLY);
	if (*mount < 0)
		return -errno;
	*directory = -1;
	if (fstat(*mount, &status))
		error = -errno;
	else if ((error = served_by(status.st_dev)) >= 0)
		error = mkdirat(*mount, name, mode) ? -errno : 0;
	if (!error && (*directory = open_at(*mount, name, PATH_ONLY | O_NOFOLLOW)) < 0) {
		error = -errno;
		unlinkat(*mount, name, AT_REMOVEDIR);
	}
	if (error)
		close(*mount);
	return (int)error;
}

int ttmfs_create(struct ttmfs **backup, const char *path, uint64_t size, mode_t mode)
{
	int directory = -1, mount = -1;
	char name[NAME_MAX + 1];
	struct stat status;
	*backup = NULL;
	/* Until all is done the owner needs the right to write. */
	int error = make_directory(path, mode | S_IWUSR, &directory, &mount, name);
	if (error)
		return error;
	error = open_directory(backup, directory, mount, 0);
	if (error) {
		unlinkat(mount, name, AT_REMOVEDIR);
		close(directory);
		close(mount);
		return error;
	}
	if (size)
		error = ttmfs_resize(*backup, size);
	if (!error && !(mode & S_IWUSR) &&
	    (fstat(directory, &status) || chmod(proc_path(directory).text, status.st_mode & 07777 & ~(mode_t)S_IWUSR)))
		error = failure();
	if (error) {
		remove_directory(*backup);
		ttmfs_close(*backup);
		*backup = NULL;
	}
	return error;
}

void ttmfs_close(struct ttmfs *backup)
{
	if (!backup)
		return;
	for (int kind = 0; kind < IMAGES; kind++)
		if (atomic_load(&backup->images[kind]) >= 0)
			close(atomic_load(&backup->images[kind]));
	if (backup->own_file >= 0)
		close(backup->own_file);
	close(backup->directory);
	close(backup->mount);
	free(backup);
}

/* --- attributes --- */

size_t ttmfs_page_size(const struct ttmfs *backup)
{
	return backup->page_size;
}

int ttmfs_fd(const struct ttmfs *backup)
{
	return backup->own_file < 0 ? -EOPNOTSUPP : backup->own_file;
}

int64_t ttmfs_size(struct ttmfs *backup)
{
	struct stat status;
	if (atomic_load(&backup->ended))
		return -ESTALE;
	if (backup->own_file < 0)
		return number(backup->directory, "user.ttmfs.size");
	if (fstat(backup->own_file, &status))
		return failure();
	return status.st_nlink ? status.st_size : -ESTALE;
}

int64_t ttmfs_pages(struct ttmfs *backup)
{
	return atomic_load(&backup->ended) ? -ESTALE : number(backup->directory, "user.ttmfs.pages");
}

int ttmfs_resize(struct ttmfs *backup, uint64_t size)
{
	char text[24];
	if (atomic_load(&backup->ended))
		return -ESTALE;
	if (size == 0 || size > INT64_MAX - backup->page_size)
		return -EINVAL;
	uint64_t pages = (size + backup->page_size - 1) / backup->page_size;
	int length = snprintf(text, sizeof text, "%llu", (unsigned long long)(pages * backup->page_size));
	if (setxattr(proc_path(backup->directory).text, "user.ttmfs.size", text, (size_t)length, 0))
		return failure();
	return 0;
}

/* Returns 0 if `count` pages from index `idx` on lie within the backup. */
static int check(struct ttmfs *backup, uint64_t idx, uint64_t count)
{
	int64_t size = ttmfs_size(backup);
	if (size < 0)
		return (int)size;
	uint64_t limit = (uint64_t)size / backup->page_size;
	return idx > limit || count > limit - idx ? -EINVAL : 0;
}

/* --- storing --- */

/* Returns the bytes of whole pages that one request can carry from or to memory, at most `length`. 0 if it could carry
 * a page only from memory that begins at a page of the system. Pages larger than a request are carried in pieces. */
static size_t one_request(const struct ttmfs *backup, const void *memory, size_t length)
{
	size_t room = REQUEST - (uintptr_t)memory % (size_t)sysconf(_SC_PAGESIZE);
	if (length <= room)
		return length;
	if (backup->page_size <= REQUEST)
		return room / backup->page_size * backup->page_size;
	return length < REQUEST ? length : REQUEST;
}

/* Reads or writes at most one request through the mount. Returns the bytes, or -1 and errno. */
static ssize_t request(const struct ttmfs *backup, int fd, char *memory, size_t length, off_t offset, bool writing)
{
	size_t part = one_request(backup, memory, length);
	if (part)
		return writing ? pwrite(fd, memory, part, offset) : pread(fd, memory, part, offset);
	char *aligned = aligned_alloc((size_t)sysconf(_SC_PAGESIZE), REQUEST);
	if (!aligned)
		return -1;
	part = length < REQUEST ? length : REQUEST; /* less if the server answered a request in part before */
	if (writing)
		memcpy(aligned, memory, part);
	ssize_t done = writing ? pwrite(fd, aligned, part, offset) : pread(fd, aligned, part, offset);
	if (!writing && done > 0)
		memcpy(memory, aligned, (size_t)done);
	int error = errno;
	free(aligned);
	errno = error;
	return done;
}

/* Stores at most one step natively. Returns the bytes, or -1 and errno. */
static ssize_t store_natively(const struct ttmfs *backup, const char *pages, size_t length, off_t offset)
{
	if (length > STEP)
		length = STEP;
	/* So that no page larger than the system's is stored in part. */
	if (backup->page_size > (size_t)sysconf(_SC_PAGESIZE))
		while (fallocate(backup->own_file, FALLOC_FL_KEEP_SIZE, offset, (off_t)length))
			if (errno != EINTR)
				return -1;
	return pwrite(backup->own_file, pages, length, offset);
}

/* Stores pages in one way: natively, or through an image. Adds to *done, in bytes. Returns 0 or a negative errno. */
static int store(struct ttmfs *backup, int fd, const char *pages, size_t length, off_t offset, size_t *done)
{
	while (*done < length) {
		off_t place = offset + (off_t)*done;
		ssize_t stored = fd == backup->own_file
			? store_natively(backup, pages + *done, length - *done, place)
			: request(backup, fd, (char *)(uintptr_t)(pages + *done), length - *done, place, true);
		if (stored == 0)
			return -EIO;
		if (stored > 0)
			*done += (size_t)stored;
		else if (errno != EINTR)
			return failure();
	}
	return 0;
}

/* If there is no room in one way, the next stores the rest. Only the mount writes back at once, but natively storing
 * does not use the reserve. Where the own file has no room for a range, the mount stores as many pages as fit. */
ssize_t ttmfs_backup_pages(struct ttmfs *backup, const void *pages, size_t count, uint64_t idx, int writeback)
{
	enum { BACK, NATIVE, MOUNT, WAYS };
	size_t size = backup->page_size, done = 0;
	int error = check(backup, idx, count);
	if (!error && count > SSIZE_MAX / size)
		error = -EINVAL;
	if (error || !count)
		return error;
	for (int way = writeback ? BACK : NATIVE; way < WAYS; way++) {
		int fd = way == NATIVE ? backup->own_file : image(backup, way == BACK ? WRITING_BACK : WRITING);
		if (way == NATIVE && fd < 0)
			continue;
		error = fd < 0 ? fd : store(backup, fd, pages, count * size, (off_t)(idx * size), &done);
		if (error != -ENOSPC && error != -EDQUOT && error != -ENOMEM)
			break;
	}
	return done >= size ? (ssize_t)(done / size) : error;
}

int64_t ttmfs_backup_page(struct ttmfs *backup, const void *page, uint64_t idx, int writeback)
{
	ssize_t stored = ttmfs_backup_pages(backup, page, 1, idx, writeback);
	return stored < 0 ? stored : (int64_t)idx + 1;
}

/* --- copying back --- */

static int fill(const struct ttmfs *backup, int fd, char *pages, size_t length, off_t offset, int intr)
{
	for (size_t done = 0; done < length;) {
		size_t left = length - done;
		off_t place = offset + (off_t)done;
		ssize_t got = fd == backup->own_file ? pread(fd, pages + done, left < STEP ? left : STEP, place)
						     : request(backup, fd, pages + done, left, place, false);
		if (got == 0)
			return -ENOENT; /* the backup has become smaller */
		if (got > 0)
			done += (size_t)got;
		else if (errno != EINTR || intr)
			return failure();
	}
	return 0;
}

/* Returns 0 if every page from index `first` to before `past` is stored, -ENOENT if one is not. */
static int check_present(const struct ttmfs *backup, int fd, uint64_t first, uint64_t past)
{
	uint64_t size = backup->page_size;
	bool probing = past - first <= FEW_PAGES;
	while (first < past) {
		off_t data = lseek(fd, (off_t)(first * size), SEEK_DATA), hole;
		if (data < 0 && errno != ENXIO)
			return failure();
		if (data < 0 || (uint64_t)data >= (first + 1) * size)
			return -ENOENT;
		if (probing)
			first++;
		else if ((hole = lseek(fd, data, SEEK_HOLE)) < 0)
			return errno == ENXIO ? -ENOENT : failure(); /* dropped meanwhile */
		else
			first = ((uint64_t)hole + size - 1) / size;
	}
	return 0;
}

static bool is_zeros(const char *page, size_t size)
{
	return !page[0] && !memcmp(page, page + 1, size - 1);
}

/* Copies a run of pages. Only a page of zeros can be absent, so only such pages are checked. They are read once more,
 * because one may have been stored after the first read. */
static int copy_run(struct ttmfs *backup, int fd, char *pages, uint64_t first, size_t count, int intr)
{
	size_t size = backup->page_size;
	int error = fill(backup, fd, pages, count * size, (off_t)(first * size), intr);
	for (size_t start = 0, past; !error && start < count; start = past + 1) {
		for (past = start; past < count && is_zeros(pages + past * size, size); past++)
			;
		if (past == start)
			continue;
		error = check_present(backup, fd, first + start, first + past);
		if (!error)
			error = fill(backup, fd, pages + start * size, (past - start) * size,
				     (off_t)((first + start) * size), intr);
	}
	return error;
}

/* Returns the number of handles at the beginning that follow one another: at least 1. */
static size_t run_length(const uint64_t *handles, size_t count)
{
	size_t length = 1;
	while (length < count && handles[length] == handles[length - 1] + 1)
		length++;
	return length;
}

/* Returns 0 if all handles lie within the backup. */
static int check_handles(struct ttmfs *backup, const uint64_t *handles, size_t count)
{
	uint64_t highest = 0;
	for (size_t i = 0; i < count; i++) {
		if (handles[i] == 0)
			return -EINVAL;
		if (handles[i] > highest)
			highest = handles[i];
	}
	return check(backup, highest, 0);
}

int ttmfs_copy_pages(struct ttmfs *backup, void *pages, const uint64_t *handles, size_t count, int intr)
{
	int error = check_handles(backup, handles, count);
	if (error || !count)
		return error;
	int fd = backup->own_file >= 0 ? backup->own_file : image(backup, READING);
	if (fd < 0)
		return fd;
	char *place = pages;
	for (size_t done = 0, length; !error && done < count; done += length) {
		length = run_length(handles + done, count - done);
		error = copy_run(backup, fd, place, handles[done] - 1, length, intr);
		place += length * backup->page_size;
	}
	return error;
}

int ttmfs_copy_page(struct ttmfs *backup, void *page, uint64_t handle, int intr)
{
	return ttmfs_copy_pages(backup, page, &handle, 1, intr);
}

/* --- dropping, writing back, ending --- */

int ttmfs_drop_pages(struct ttmfs *backup, const uint64_t *handles, size_t count)
{
	int error = check_handles(backup, handles, count);
	if (error || !count)
		return error;
	int fd = backup->own_file >= 0 ? backup->own_file : image(backup, WRITING);
	if (fd < 0)
		return fd;
	off_t size = (off_t)backup->page_size;
	for (size_t done = 0, length; done < count; done += length) {
		length = run_length(handles + done, count - done);
		off_t offset = (off_t)(handles[done] - 1) * size;
		while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, (off_t)length * size))
			if (errno != EINTR)
				return failure();
	}
	return 0;
}

int ttmfs_drop(struct ttmfs *backup, uint64_t handle)
{
	return ttmfs_drop_pages(backup, &handle, 1);
}

int ttmfs_writeback(struct ttmfs *backup)
{
	int fd = atomic_load(&backup->ended) ? -ESTALE : image(backup, READING);
	if (fd < 0)
		return fd;
	while (fsync(fd))
		if (errno != EINTR)
			return failure();
	return 0;
}

int ttmfs_fini(struct ttmfs *backup)
{
	int fd = atomic_load(&backup->ended) ? -ESTALE : image(backup, WRITING);
	if (fd < 0)
		return fd;
	while (ftruncate(fd, 0))
		if (errno != EINTR)
			return failure();
	int error = remove_directory(backup);
	if (!error)
		atomic_store(&backup->ended, true);
	return error;
}
