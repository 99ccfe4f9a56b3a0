#!/usr/bin/env python3
"""A filesystem with nothing behind it: pyfuse3 and prepared answers.

``null.py MOUNTPOINT``. No filesystem on pyfuse3 can be faster. Every file has the same bytes, and written data is
discarded.
"""

import errno
import os
import stat
import sys
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

ROOT, DIRECTORY, FILE = pyfuse3.ROOT_INODE, 2, 3
REQUEST = bytes(range(256)) * 4096
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def entry(inode: int, mode: int) -> EntryAttributes:
    made = EntryAttributes()
    made.st_ino, made.st_mode, made.st_nlink, made.st_size = inode, mode, 1, 1 << 40
    made.entry_timeout = made.attr_timeout = float(inode != 0)  # an absent name has no lifetime, as in ttmfs
    return made


class Null(pyfuse3.Operations):
    """One directory in the root. Every created name in it is a file."""

    supports_dot_lookup = enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self._absent, self._file = entry(0, 0), entry(FILE, stat.S_IFREG | 0o644)
        self._root, self._directory = entry(ROOT, stat.S_IFDIR | 0o755), entry(DIRECTORY, stat.S_IFDIR | 0o755)
        self._opened = FileInfo(fh=FILE, direct_io=True, keep_cache=False)
        self._page = REQUEST[:PAGE_SIZE]
        self._names = {b".image"}

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if parent_inode == ROOT:
            return self._directory if b"a" in self._names else self._absent
        return self._file if name in self._names else self._absent

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._file if inode == FILE else self._root if inode == ROOT else self._directory

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        self._names.add(name)
        return self._directory

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self._names.add(name)
        return self._opened, self._file

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._names.discard(name)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return self._opened

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self._page if size == PAGE_SIZE else REQUEST[:size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return len(buf)

    async def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass


def main() -> None:
    pyfuse3.init(Null(), sys.argv[1], {*pyfuse3.default_options, "fsname=null"})
    trio.run(pyfuse3.main)
    pyfuse3.close()


if __name__ == "__main__":
    main()
