# cython: language_level=3
"""Plain requests in C: those that find a page of 4 KiB in memory and nothing unusual.

What a request means is stated in Python (:mod:`.page_requests`, and what it calls). This module does the same to the
same files, for the cases in which little is to be decided. It refuses whatever else there is, before it has changed
anything, and Python then carries the request out. So an error is always found and answered by Python.
tests/face/test_compiled.py sends the same requests to both.

Concurrency: one thread, which holds the interpreter's lock. No call waits: pages in swap are left to Python.
"""

from cpython.buffer cimport PyBUF_CONTIG, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_GetItem
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, ECONNABORTED, ENODEV, ENOENT, ENXIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from .kernel_structures cimport *

import os

from ..linux.fuse_protocol import RESENT as RESENT_BIT
from ..recovery.state import POINT_BITS as STATE_POINT_BITS
from .inodes import HANDLE_BITS as INODE_HANDLE_BITS
from .inodes import MAX_BACKUP_ID as INODE_MAX_BACKUP_ID
from .inodes import MAX_HANDLE as INODE_MAX_HANDLE
from .metrics import BUCKET_OF_LENGTH, TOTAL_NS
from .recent_requests import ENTRIES as RECENT_ENTRIES
from .replies import LIFETIME_NS, LIFETIME_SECONDS

cdef enum:
    PAGE = 4096
    SECTORS = 8  # of 512 bytes
    MOST_AT_ONCE = 16  # requests between two looks at what trio waits for
    OPCODES = 64
    VIEWS = OPCODES
    OPCODE_SHIFT = 56  # in RecentRequest.took
    CACHESTAT = 451  # the same number on every architecture
    NOT_PLAIN = -1

cdef uint64_t RESENT = RESENT_BIT
cdef uint64_t MAX_HANDLE = INODE_MAX_HANDLE
cdef uint64_t MAX_BACKUP_ID = INODE_MAX_BACKUP_ID
cdef int HANDLE_BITS = INODE_HANDLE_BITS
cdef int POINT_BITS = STATE_POINT_BITS
cdef uint64_t HANDLE_MASK = (<uint64_t>1 << HANDLE_BITS) - 1
cdef int TOTAL = TOTAL_NS
cdef uint64_t LAST_ENTRY = RECENT_ENTRIES - 1
cdef uint64_t SECONDS = LIFETIME_SECONDS
cdef uint32_t NS = LIFETIME_NS
cdef uint8_t BUCKETS[65]
for _length, _bucket in enumerate(BUCKET_OF_LENGTH):
    BUCKETS[_length] = _bucket

cdef char ZEROS[PAGE]
memset(ZEROS, 0, PAGE)

cdef struct Answer:
    fuse_out_header header
    char body[PAGE]

cdef struct NotedAnswer:  # as State.note_answer() writes it
    uint64_t request
    uint64_t length
    char body[256]

cdef struct RecentRequest:  # as in recent_requests.py
    uint64_t node
    uint32_t pid, uid
    uint64_t took, end

cdef struct Page:
    int fd
    int64_t last  # the offset of its last byte in the backup
    uint64_t inode


cdef class CompiledRequests:
    """The plain requests of one mount. :meth:`close` gives the buffers back before their owners close them."""

    cdef int connection
    cdef char *message
    cdef size_t room
    cdef uint64_t *notes
    cdef NotedAnswer *noted
    cdef int64_t *counts[OPCODES]
    cdef Py_buffer views[VIEWS]
    cdef int held
    cdef int64_t *swap_known  # Swap.known
    cdef RecentRequest *recent
    cdef uint64_t *recent_written
    cdef int64_t start  # of the present request, in ns
    cdef uint64_t last_id  # of the backup that was used last
    cdef object open_files, descriptor, admit, swap, note_page, page_cache, refused, runs, mode_changes, bulk_drops
    cdef Answer answer

    def __cinit__(self, int connection, message, state, handlers, metrics):
        """`message` is the buffer for requests, `handlers` are the PageRequests, whose tables this consults."""
        shared = handlers.tree.shared
        self.connection, self.held, self.room = connection, 0, len(message)
        self.message = <char *>self.hold(message)
        self.notes = <uint64_t *>self.hold(state.notes)
        self.noted = <NotedAnswer *>self.hold(state.answer)
        for opcode in (FUSE_LOOKUP, FUSE_GETATTR, FUSE_UNLINK, FUSE_OPEN, FUSE_READ, FUSE_WRITE, FUSE_RELEASE,
                       FUSE_CREATE):
            self.counts[<int>opcode] = <int64_t *>self.hold(metrics.durations[handlers.kinds[opcode].name])
        self.swap_known = <int64_t *>self.hold(shared.pool.swap.known)
        self.recent = <RecentRequest *>self.hold(shared.recent_requests.ring)
        self.recent_written = <uint64_t *>self.hold(shared.recent_requests.written)
        self.open_files, self.last_id = shared.pool.files.open, 0
        self.descriptor, self.admit = shared.pool.files.descriptor, shared.pool.store.admit
        self.swap, self.note_page, self.page_cache = shared.pool.swap, shared.cache.note_page, handlers.page_cache
        self.refused, self.runs = shared.retries.refused, shared.runs
        self.mode_changes, self.bulk_drops = shared.mode_changes, shared.bulk_drops

    cdef void *hold(self, exporter) except NULL:
        """The address of a buffer, which stays in place until it is released."""
        PyObject_GetBuffer(exporter, &self.views[self.held], PyBUF_CONTIG)
        self.held += 1
        return self.views[self.held - 1].buf

    def close(self):
        """Give the buffers back."""
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])

    def __dealloc__(self):
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])

    def answer_plain(self):
        """Read requests into the buffer, and answer them, until one is not plain. Returns the length of that one.

        None: there was no request. 0: there were some, and all are answered. Raises OSError as read(2) fails.
        """
        cdef ssize_t length
        cdef int answered
        for answered in range(MOST_AT_ONCE):
            length = read(self.connection, self.message, self.room)
            if length < 0:
                if errno == EAGAIN:
                    return 0 if answered else None
                raise OSError(errno, os.strerror(errno))
            if not self.was_answered(length):
                return length
        return 0

    def wait(self, int epoll, double seconds):
        """Wait for requests, and answer them, as long as no other file of the epoll is ready. Returns as answer_plain().

        None: the time is over, or another file is ready, or a signal came.
        """
        cdef epoll_event events[2]
        cdef int64_t left, end = now() + <int64_t>(seconds * 1e9)
        cdef int answered, ready
        cdef ssize_t length
        for answered in range(MOST_AT_ONCE):
            left = max(0, (end - now() + 999999) // 1000000)
            with nogil:
                ready = epoll_wait(epoll, events, 2, <int>min(left, <int64_t>0x7fffffff))
            if ready != 1 or events[0].data.fd != self.connection:
                return None
            length = read(self.connection, self.message, self.room)
            if length < 0:
                if errno == EAGAIN:
                    continue
                raise OSError(errno, os.strerror(errno))
            if not self.was_answered(length):
                return length
        return 0

    cdef bint was_answered(self, ssize_t length) except -1:
        """Carry the request in the buffer out if it is plain."""
        cdef fuse_in_header *header = <fuse_in_header *>self.message
        cdef uint32_t opcode = header.opcode
        cdef int64_t took
        cdef ssize_t size
        cdef RecentRequest *entry
        if opcode == FUSE_FORGET or opcode == FUSE_BATCH_FORGET:
            return True  # nothing is kept for an inode
        if opcode >= OPCODES or not self.counts[opcode] or header.unique & RESENT:
            return False
        self.start = now()
        self.notes[0] = header.unique << POINT_BITS
        IN_ORDER()
        size = self.carry_out(header, length)
        if size == NOT_PLAIN:
            self.notes[0] = 0
            return False
        if changes(opcode):
            self.note_answer(header.unique, size)
        self.answer.header.len = sizeof(fuse_out_header) + size
        self.answer.header.unique = header.unique
        if write(self.connection, &self.answer, self.answer.header.len) < 0:
            if errno != ENOENT and errno != ENODEV and errno != ECONNABORTED:  # nobody waits for it any more
                raise OSError(errno, os.strerror(errno))
        IN_ORDER()
        self.notes[0] = 0
        took = now() - self.start
        self.counts[opcode][BUCKETS[BIT_LENGTH(took)]] += 1
        self.counts[opcode][TOTAL] += took
        entry = &self.recent[self.recent_written[0] & LAST_ENTRY]
        entry.node, entry.pid, entry.uid = header.nodeid, header.pid, header.uid
        entry.took, entry.end = <uint64_t>opcode << OPCODE_SHIFT | <uint64_t>took, self.start + took
        self.recent_written[0] += 1
        return True

    cdef void note_answer(self, uint64_t request, ssize_t size) noexcept:
        self.noted.request = 0  # while the bytes are of neither answer
        IN_ORDER()
        self.noted.length = size
        memcpy(self.noted.body, self.answer.body, size)
        IN_ORDER()
        self.noted.request = request

    cdef ssize_t carry_out(self, fuse_in_header *header, ssize_t length) except -2:
        """Carry a request out, and fill in the answer. Returns the length of its body, or NOT_PLAIN."""
        cdef uint32_t opcode = header.opcode
        cdef char *body = self.message + sizeof(fuse_in_header)
        cdef char *end = self.message + length - 1  # of a name
        cdef Page page
        if changes(opcode) and self.page_cache:
            return NOT_PLAIN
        if opcode == FUSE_RELEASE:
            return self.release(header)
        if opcode == FUSE_LOOKUP or opcode == FUSE_UNLINK or opcode == FUSE_CREATE:
            if self.refused and header.pid in self.refused:
                return NOT_PLAIN
            if opcode == FUSE_CREATE:
                body += sizeof(fuse_create_in)
            if not self.named(&page, header.nodeid, body, end):
                return NOT_PLAIN
            if opcode == FUSE_LOOKUP:
                return self.lookup(&page)
            return self.unlink(&page) if opcode == FUSE_UNLINK else self.create(header, &page)
        if not self.found(&page, header.nodeid):
            return NOT_PLAIN
        if opcode == FUSE_READ:
            return self.read_page(<fuse_read_in *>body, &page)
        if opcode == FUSE_WRITE:
            return self.write_page(<fuse_write_in *>body, &page, length)
        return self.getattr(&page) if opcode == FUSE_GETATTR else self.open(&page)

    # --- which page a request is about ---

    cdef bint found(self, Page *page, uint64_t inode) except -1:
        """Whether an inode number is that of a page of a backup whose file can be opened."""
        cdef uint64_t id = inode >> HANDLE_BITS, handle = inode & HANDLE_MASK
        cdef PyObject *open_file = NULL
        if not 0 < handle <= MAX_HANDLE or not 0 < id <= MAX_BACKUP_ID:
            return False
        page.inode = inode
        page.last = (<int64_t>handle * PAGE) - 1
        # A repeated use changes nothing in the order of uses, so it needs no call.
        if id == self.last_id:
            open_file = PyDict_GetItem(self.open_files, id)
        if open_file:
            page.fd = <object>open_file
            return True
        try:
            page.fd = self.descriptor(id)
        except Exception:  # Python will find it as well, and answer it
            return False
        self.last_id = id
        return True

    cdef bint named(self, Page *page, uint64_t directory, const char *name, const char *end) except -1:
        """The same for a name in the directory of a backup."""
        cdef uint64_t handle = 0
        if directory & HANDLE_MASK or not 0 < end - name <= 10 or name[0] == c"0":
            return False
        while name < end:
            if not c"0" <= name[0] <= c"9":
                return False
            handle = handle * 10 + (name[0] - c"0")
            name += 1
        return handle <= MAX_HANDLE and self.found(page, directory | handle)

    cdef bint is_out(self, Page *page, int64_t offset, uint64_t size) except -1:
        """Whether bytes of a page have to be brought in, or nobody can tell."""
        cdef uint64_t span[2]
        cdef uint64_t counted[5]  # in memory, dirty, in writeback, evicted, recently evicted
        if not (self.swap_known[0] if self.start <= self.swap_known[1] else self.swap.used):
            return False
        span[0], span[1] = offset, size
        return syscall(CACHESTAT, page.fd, span, counted, 0) < 0 or counted[3] > 0

    # --- names and attributes ---

    cdef ssize_t lookup(self, Page *page) except -2:
        cdef int64_t data = lseek(page.fd, page.last, SEEK_DATA)
        if data == page.last:
            return self.entry(page)
        if data < 0 and errno != ENXIO:
            return NOT_PLAIN
        memset(self.answer.body, 0, sizeof(fuse_entry_out))  # no node, no lifetime: there is no such name
        return sizeof(fuse_entry_out)

    cdef ssize_t getattr(self, Page *page) except -2:
        cdef fuse_attr_out *out = <fuse_attr_out *>self.answer.body
        cdef stat_t file
        if not exists(page) or fstat(page.fd, &file):
            return NOT_PLAIN
        memset(out, 0, sizeof(fuse_attr_out))
        out.attr_valid, out.attr_valid_nsec = SECONDS, NS
        fill_in(&out.attr, page, &file)
        self.note_page(page.inode)
        return sizeof(fuse_attr_out)

    cdef ssize_t entry(self, Page *page) except -2:
        """The answer's first part: the name's inode and attributes."""
        cdef fuse_entry_out *out = <fuse_entry_out *>self.answer.body
        cdef stat_t file
        if fstat(page.fd, &file):
            return NOT_PLAIN
        memset(out, 0, sizeof(fuse_entry_out))
        out.nodeid = page.inode
        out.entry_valid, out.entry_valid_nsec, out.attr_valid, out.attr_valid_nsec = SECONDS, NS, SECONDS, NS
        fill_in(&out.attr, page, &file)
        self.note_page(page.inode)
        return sizeof(fuse_entry_out)

    # --- making and removing ---

    cdef ssize_t create(self, fuse_in_header *header, Page *page) except -2:
        cdef uint32_t flags = (<fuse_create_in *>(header + 1)).flags
        cdef int64_t hole
        cdef stat_t file
        if header.uid and (fstat(page.fd, &file) or not owner_may(header, &file, flags)):
            return NOT_PLAIN
        hole = lseek(page.fd, page.last, SEEK_HOLE)
        if hole < 0:
            return NOT_PLAIN
        if hole == page.last:
            if not self.admit(page.inode >> HANDLE_BITS, 1):
                return NOT_PLAIN
            if pwrite(page.fd, ZEROS, 1, page.last + 1 - PAGE) != 1:
                return NOT_PLAIN
        if self.entry(page) == NOT_PLAIN:
            return NOT_PLAIN
        return sizeof(fuse_entry_out) + opened(self.answer.body + sizeof(fuse_entry_out), page)

    cdef ssize_t unlink(self, Page *page) except -2:
        if self.bulk_drops or self.runs:
            return NOT_PLAIN
        if fallocate(page.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page.last + 1 - PAGE, PAGE):
            return NOT_PLAIN
        return 0

    # --- files ---

    cdef ssize_t open(self, Page *page) except -2:
        if self.mode_changes or not exists(page):
            return NOT_PLAIN
        return opened(self.answer.body, page)

    cdef ssize_t release(self, fuse_in_header *header) noexcept:
        cdef uint64_t fh = (<fuse_release_in *>(header + 1)).fh
        return 0 if fh >> HANDLE_BITS and 0 < fh & HANDLE_MASK <= MAX_HANDLE and fh == header.nodeid else NOT_PLAIN

    cdef ssize_t read_page(self, fuse_read_in *asked, Page *page) except -2:
        cdef int64_t offset = page.last + 1 - PAGE + asked.offset
        cdef uint64_t size
        if asked.fh != page.inode or not asked.read_flags & FUSE_READ_LOCKOWNER or asked.offset >= PAGE:
            return NOT_PLAIN
        size = min(<uint64_t>asked.size, PAGE - asked.offset)
        if not size or self.is_out(page, offset, size):
            return NOT_PLAIN
        if pread(page.fd, self.answer.body, size, offset) != <ssize_t>size:
            return NOT_PLAIN
        if size < PAGE or not memcmp(self.answer.body, ZEROS, PAGE):
            if not exists(page):  # an absent page has no other bytes than zeros
                return NOT_PLAIN
        return size

    cdef ssize_t write_page(self, fuse_write_in *asked, Page *page, ssize_t length) except -2:
        cdef int64_t offset = page.last + 1 - PAGE + asked.offset
        cdef fuse_write_out *out = <fuse_write_out *>self.answer.body
        cdef ssize_t stored
        if asked.fh != page.inode or asked.flags & (O_DSYNC | O_APPEND):
            return NOT_PLAIN
        if asked.offset >= PAGE or not 0 < asked.size <= PAGE - asked.offset:
            return NOT_PLAIN
        if <size_t>length < sizeof(fuse_in_header) + sizeof(fuse_write_in) + asked.size:
            return NOT_PLAIN
        if self.is_out(page, offset, asked.size) or not exists(page):
            return NOT_PLAIN
        stored = pwrite(page.fd, <char *>(asked + 1), asked.size, offset)
        if stored < 0:
            return NOT_PLAIN
        memset(out, 0, sizeof(fuse_write_out))
        out.size = stored
        return sizeof(fuse_write_out)


cdef bint changes(uint32_t opcode) noexcept:
    """Whether a request is carried out once: its answer is noted before it is sent."""
    return opcode == FUSE_WRITE or opcode == FUSE_CREATE or opcode == FUSE_UNLINK


cdef bint exists(Page *page) noexcept:
    """Whether a page exists, all of it before the backup's end."""
    return lseek(page.fd, page.last, SEEK_DATA) == page.last


cdef ssize_t opened(char *body, Page *page) noexcept:
    cdef fuse_open_out *out = <fuse_open_out *>body
    memset(out, 0, sizeof(fuse_open_out))
    out.fh, out.open_flags = page.inode, FOPEN_DIRECT_IO
    return sizeof(fuse_open_out)


cdef void fill_in(fuse_attr *attr, Page *page, stat_t *file) noexcept:
    """The attributes of a page of the backup whose file is `file`."""
    attr.ino, attr.size, attr.blocks, attr.blksize = page.inode, PAGE, SECTORS, PAGE
    attr.mode, attr.nlink, attr.uid, attr.gid = S_IFREG | file.st_mode & 0o666, 1, file.st_uid, file.st_gid
    attr.atime, attr.atimensec = file.st_atim.tv_sec, file.st_atim.tv_nsec
    attr.mtime, attr.mtimensec = file.st_mtim.tv_sec, file.st_mtim.tv_nsec
    attr.ctime, attr.ctimensec = file.st_ctim.tv_sec, file.st_ctim.tv_nsec


cdef bint owner_may(fuse_in_header *caller, stat_t *file, uint32_t flags) noexcept:
    """Whether the caller owns the backup, and its mode allows the owner to open a page with these flags."""
    cdef uint32_t wanted = 0o400 if flags & O_ACCMODE == O_RDONLY else 0o200 if flags & O_ACCMODE == O_WRONLY else 0o600
    return caller.uid == file.st_uid and file.st_mode & wanted == wanted


cdef int64_t now() noexcept:
    """ns, as time.perf_counter_ns()."""
    cdef moment found
    clock_gettime(CLOCK_MONOTONIC, &found)
    return found.tv_sec * 1000000000 + found.tv_nsec
