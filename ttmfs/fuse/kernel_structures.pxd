# What <linux/fuse.h> and the C library declare, as far as compiled_requests.pyx uses it.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "<linux/fuse.h>" nogil:
    enum:
        FUSE_LOOKUP, FUSE_FORGET, FUSE_GETATTR, FUSE_UNLINK, FUSE_OPEN, FUSE_READ, FUSE_WRITE, FUSE_RELEASE
        FUSE_CREATE, FUSE_BATCH_FORGET
        FUSE_READ_LOCKOWNER
        FOPEN_DIRECT_IO
    struct fuse_in_header:
        uint32_t len, opcode
        uint64_t unique, nodeid
        uint32_t uid, gid, pid
    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique
    struct fuse_attr:
        uint64_t ino, size, blocks, atime, mtime, ctime
        uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, blksize
    struct fuse_attr_out:
        uint64_t attr_valid
        uint32_t attr_valid_nsec
        fuse_attr attr
    struct fuse_entry_out:
        uint64_t nodeid, entry_valid, attr_valid
        uint32_t entry_valid_nsec, attr_valid_nsec
        fuse_attr attr
    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags
    struct fuse_write_out:
        uint32_t size
    struct fuse_open_in:
        uint32_t flags
    struct fuse_create_in:
        uint32_t flags
    struct fuse_release_in:
        uint64_t fh
    struct fuse_read_in:
        uint64_t fh, offset
        uint32_t size, read_flags
    struct fuse_write_in:
        uint64_t fh, offset
        uint32_t size, flags

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_ACCMODE, O_APPEND, O_DSYNC, O_RDONLY, O_WRONLY
        FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
    int fallocate(int fd, int mode, int64_t offset, int64_t length)

cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_DATA, SEEK_HOLE
    int64_t lseek(int fd, int64_t offset, int whence)
    ssize_t read(int fd, void *data, size_t size)
    ssize_t write(int fd, const void *data, size_t size)
    ssize_t pread(int fd, void *data, size_t size, int64_t offset)
    ssize_t pwrite(int fd, const void *data, size_t size, int64_t offset)
    long syscall(long number, ...)

cdef extern from "<sys/stat.h>" nogil:
    enum:
        S_IFREG
    struct moment "timespec":
        int64_t tv_sec
        long tv_nsec
    struct stat_t "stat":
        uint32_t st_mode, st_uid, st_gid
        moment st_atim, st_mtim, st_ctim
    int fstat(int fd, stat_t *found)

cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        int fd
    struct epoll_event:
        epoll_data data
    int epoll_wait(int epoll, epoll_event *events, int most, int milliseconds)

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, moment *now)

cdef extern from *:
    """
    /* What stands before and after it is written to memory in this order. A SIGKILL between the two loses neither. */
    #define IN_ORDER() __asm__ __volatile__("" ::: "memory")
    #define BIT_LENGTH(number) ((number) ? 64 - __builtin_clzll(number) : 0)
    """
    void IN_ORDER() noexcept nogil
    int BIT_LENGTH(uint64_t number) noexcept nogil
