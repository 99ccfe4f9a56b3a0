"""A malicious FUSE server on a mount of another user.

Its argument, JSON, says what it serves. Run as root, it mounts as a user (the user_id= of the mount, which the kernel
tells), and becomes that user. A plan is::

    names    entries of the root: "dir", "link:TARGET", "fifo", "endless:TEXT", "file:TEXT"
    turns    an entry, or one that is made, that becomes a link after a number of times: {name: [times, target]}
    values   extended attributes of every entry: {name: text}
    lengths  the most bytes of each answer to a read, in turn; later answers are whole
    hangs    requests that are read and never answered: "lookup", "getxattr", "statfs", ...
    refuses  requests that are answered with EACCES
"""

import ctypes
import errno
import json
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio

ROOT = pyfuse3.ROOT_INODE
DEVICE = "/dev/fuse"
KINDS = {"": stat.S_IFDIR, "dir": stat.S_IFDIR, "link": stat.S_IFLNK, "fifo": stat.S_IFIFO}


class Server(pyfuse3.Operations):
    enable_writeback_cache = False

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__()
        self.names: dict[str, str] = dict(plan.get("names", {}))
        self.turns: dict[str, list[Any]] = plan.get("turns", {})
        self.values: dict[str, str] = plan.get("values", {})
        self.lengths: list[int] = plan.get("lengths", [])
        self.hangs, self.refuses = plan.get("hangs", []), plan.get("refuses", [])
        self.numbers: dict[tuple[str, str], int] = {}  # of inodes
        self.inodes: list[str] = [""]  # what each is, from the root's number on

    async def _begin(self, operation: str) -> None:
        if operation in self.hangs:
            await trio.sleep_forever()
        if operation in self.refuses:
            raise pyfuse3.FUSEError(errno.EACCES)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        what = self.inodes[inode - ROOT].partition(":")[0]
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        kind = {"": stat.S_IFDIR, "dir": stat.S_IFDIR, "link": stat.S_IFLNK, "fifo": stat.S_IFIFO}.get(
            what, stat.S_IFREG
        )
        entry.st_mode = kind | (0o755 if kind == stat.S_IFDIR else 0o777 if kind == stat.S_IFLNK else 0o644)
        entry.st_nlink, entry.st_size = 1, 1 << 40 if what == "endless" else 4096
        entry.st_uid, entry.entry_timeout, entry.attr_timeout = os.getuid(), 0, 0  # so that every look-up is asked for
        return entry

    def _entry(self, name: str, what: str) -> pyfuse3.EntryAttributes:
        key = name, what
        if key not in self.numbers:
            self.inodes.append(what)
            self.numbers[key] = ROOT + len(self.inodes) - 1
        return self._attributes(self.numbers[key])

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        await self._begin("lookup")
        text = os.fsdecode(name)
        if text not in self.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if text in self.turns:
            if self.turns[text][0] <= 0:
                return self._entry(text, "link:" + self.turns[text][1])
            self.turns[text][0] -= 1
        return self._entry(text, self.names[text])

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        await self._begin("getattr")
        return self._attributes(inode)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        self.names[os.fsdecode(name)] = "dir"
        return self._entry(os.fsdecode(name), "dir")

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        pass

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return os.fsencode(self.inodes[inode - ROOT].partition(":")[2])

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        await self._begin("getxattr")
        value = self.values.get(name.decode().removeprefix("user.ttmfs."))
        if value is None or (inode != ROOT and name == b"user.ttmfs.page_size"):
            raise pyfuse3.FUSEError(errno.ENODATA)
        if inode == ROOT and name == b"user.ttmfs.pages":
            raise pyfuse3.FUSEError(errno.ENODATA)
        return os.fsencode(value)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        pass

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        await self._begin("statfs")
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_blocks = found.f_bfree = found.f_bavail = 1000
        return found

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        await self._begin("open")
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        what, _, text = self.inodes[fh - ROOT].partition(":")
        data = os.fsencode(text)
        if self.lengths:
            size = min(size, self.lengths.pop(0))
        return (data * (size // max(1, len(data)) + 1))[:size] if what == "endless" else data[off : off + size]

    async def opendir(self, inode: int, ctx: Any) -> int:
        await self._begin("opendir")
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        if fh != ROOT:
            return
        for number, name in enumerate(list(self.names)[start_id:], start_id + 1):
            if name[0] != "." and not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._entry(name, self.names[name]), number
            ):
                break


def main() -> None:
    """Mount, become the user, and serve until the mount ends."""
    directory, user, plan = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    connection = os.open(DEVICE, os.O_RDWR)
    options = f"fd={connection},rootmode=40000,user_id={user},group_id={user},allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"ttm", os.fsencode(directory), b"fuse.ttmfs", 6, options):  # nosuid, nodev
        raise OSError(ctypes.get_errno(), "mount")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    pyfuse3.init(Server(plan), f"/dev/fd/{connection}", set())
    print("serving", flush=True)
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    main()
