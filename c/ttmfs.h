/* libttmfs: page backups in a mount of ttmfs, for programs in C and C++. The manual page is ttmfs(3).
 *
 *     struct ttmfs *backup;
 *     int error = ttmfs_create(&backup, "/mnt/ttm/a", 1 << 30, 0700);   // 0, or a negative errno
 *     int64_t handle = ttmfs_backup_page(backup, page, 0, 0);           // the handle of index 0 is 1
 *     error = ttmfs_copy_page(backup, page, (uint64_t)handle, 0);
 *     error = ttmfs_drop(backup, (uint64_t)handle);
 *     error = ttmfs_fini(backup);
 *     ttmfs_close(backup);
 *
 * A function that can fail returns a negative errno. Any thread may call any function on the same backup, but none
 * during or after ttmfs_close(). The library keeps no pages, starts no threads and handles no signals.
 */
#ifndef TTMFS_H
#define TTMFS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An open backup. */
struct ttmfs;

/* Flag of ttmfs_open(): send every request through the mount, even if this process may open the memory itself. */
#define TTMFS_THROUGH_MOUNT 1

/* Makes an empty backup that spans `size` bytes, rounded up to whole pages, and opens it. 0 means the mount's default.
 * The umask limits `mode`. -EEXIST, -ENOSPC, -EINVAL. */
int ttmfs_create(struct ttmfs **backup, const char *path, uint64_t size, mode_t mode);

/* Opens an existing backup. -ENOENT: there is none. -EINVAL: the path is not a backup of a ttmfs. */
int ttmfs_open(struct ttmfs **backup, const char *path, int flags);

/* Closes a backup. Its pages stay. NULL is ignored. */
void ttmfs_close(struct ttmfs *backup);

/* Bytes in a page. */
size_t ttmfs_page_size(const struct ttmfs *backup);

/* Bytes that the backup spans, stored or not: a multiple of the page size. */
int64_t ttmfs_size(struct ttmfs *backup);

/* Changes the bytes that it spans, rounded up to whole pages. -EINVAL if pages exist past the new end. */
int ttmfs_resize(struct ttmfs *backup, uint64_t size);

/* The number of stored pages. */
int64_t ttmfs_pages(struct ttmfs *backup);

/* The descriptor of the backup's own memory, for mmap(2) and the like; ttmfs_close() closes it. -EOPNOTSUPP if this
 * process may not open the memory: then every request goes through the mount. */
int ttmfs_fd(const struct ttmfs *backup);

/* Copies a page into the backup. Returns its handle, idx + 1. A page that is stored there is overwritten. With
 * `writeback` the page is pushed to swap now, on a best-effort basis. -ENOSPC, -EINVAL. */
int64_t ttmfs_backup_page(struct ttmfs *backup, const void *page, uint64_t idx, int writeback);

/* Copies `count` pages to the indices from `idx` on. Returns the number of stored pages, which is smaller if the room
 * ends part way. Fails only if no page was stored. */
ssize_t ttmfs_backup_pages(struct ttmfs *backup, const void *pages, size_t count, uint64_t idx, int writeback);

/* Copies a page back. The page stays in the backup. -ENOENT: the handle holds no page. With `intr` a signal handler
 * ends a wait with -EINTR, and the call can be repeated. */
int ttmfs_copy_page(struct ttmfs *backup, void *page, uint64_t handle, int intr);

/* Copies the pages of `count` handles back, in their order. After an error some of `pages` may have been written. */
int ttmfs_copy_pages(struct ttmfs *backup, void *pages, const uint64_t *handles, size_t count, int intr);

/* Releases a page and its memory. A handle that holds no page is no error. */
int ttmfs_drop(struct ttmfs *backup, uint64_t handle);

/* Releases the pages of `count` handles. */
int ttmfs_drop_pages(struct ttmfs *backup, const uint64_t *handles, size_t count);

/* Pushes every page to swap now (with store=: to the disk), on a best-effort basis. */
int ttmfs_writeback(struct ttmfs *backup);

/* Ends the backup: releases every page and removes it. Later calls fail with -ESTALE; ttmfs_close() is still needed.
 * -ENOTEMPTY if another process stores a page meanwhile. */
int ttmfs_fini(struct ttmfs *backup);

/* A slot of a page array holds the address of a page, which is even, or the handle of a stored page as a tagged
 * pointer: handle << 1 | 1. */
static inline uint64_t ttmfs_handle_to_page_ptr(uint64_t handle)
{
	return handle << 1 | 1;
}

static inline int ttmfs_page_ptr_is_handle(uint64_t page_ptr)
{
	return (int)(page_ptr & 1);
}

static inline uint64_t ttmfs_page_ptr_to_handle(uint64_t page_ptr)
{
	return page_ptr >> 1;
}

#ifdef __cplusplus
}
#endif

#endif
