"""Requests as the kernel sends them, and the daemon's answers, over a pipe in place of /dev/fuse."""

import itertools
import os
import struct
from typing import Any, NamedTuple

import trio

from ttmfs.linux import fuse_protocol as fuse
from ttmfs.linux.fuse_protocol import Request
from ttmfs.linux.splice import Splice

numbers = itertools.count(2, 2)
"""The kernel's numbers of requests are even."""


class Caller(NamedTuple):
    uid: int = os.geteuid()
    gid: int = os.getegid()
    pid: int = 1
    unique: int = 0


class Refused(Exception):
    """A request was answered with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class Attr(NamedTuple):
    """fuse_attr."""

    st_ino: int
    st_size: int
    st_blocks: int
    st_atime: int
    st_mtime: int
    st_ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_blksize: int
    flags: int


class Entry(NamedTuple):
    """fuse_entry_out."""

    node: int
    entry_timeout: float
    attr_timeout: float
    attr: Attr

    @property
    def st_ino(self) -> int:
        return self.node

    @classmethod
    def of(cls, body: bytes) -> "Entry":
        node, _, entry_s, attr_s, entry_ns, attr_ns, *attr = fuse.ENTRY.unpack_from(body)
        return cls(node, entry_s + entry_ns / 1e9, attr_s + attr_ns / 1e9, Attr(*attr))


class Opened(NamedTuple):
    """fuse_open_out."""

    fh: int
    flags: int
    backing: int


def packed(opcode: int, node: int, body: bytes, caller: Any = None, unique: int | None = None) -> bytes:
    """A request."""
    caller = caller or Caller()
    number = next(numbers) if unique is None else unique
    length = fuse.HEADER.size + len(body)
    return fuse.HEADER.pack(length, opcode, number, node, caller.uid, caller.gid, caller.pid, 0, 0) + body


def split(stream: bytes) -> list[tuple[int, int, bytes]]:
    """What the daemon wrote: (errno or notification's code, request's number or 0, body)."""
    found = []
    while stream:
        length, error, unique = fuse.ANSWER.unpack_from(stream)
        found.append((error, unique, stream[fuse.ANSWER.size : length]))
        stream = stream[length:]
    return found


class Kernel:
    """Sends requests to handlers, and waits for the answers. `requests` are ttmfs.fuse.requests.Requests."""

    def __init__(self) -> None:
        self._pipe, self.connection = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.splice = Splice(self.connection)
        self.requests: Any = None
        self.notified: list[tuple[int, bytes]] = []

    def close(self) -> None:
        self.splice.close()
        os.close(self._pipe)
        os.close(self.connection)

    def said(self) -> list[tuple[int, int, bytes]]:
        """What the daemon wrote since this was called last. Notifications are kept in `notified`."""
        stream = b""
        try:
            while piece := os.read(self._pipe, 1 << 20):
                stream += piece
        except BlockingIOError:
            pass
        found = split(stream)
        self.notified += [(code, body) for code, unique, body in found if not unique]
        return [one for one in found if one[1]]

    def send(self, message: bytes) -> tuple[int, bytes]:
        """Have a request answered. Returns the errno and the body."""
        request = Request._make(fuse.HEADER.unpack_from(message))

        async def carry_out() -> None:
            async with trio.open_nursery() as nursery:
                kind = self.requests.kinds[request.opcode]
                self.requests.carry_out(memoryview(bytearray(message)), kind, request, nursery.start_soon)

        trio.run(carry_out)
        ((error, unique, body),) = self.said()
        assert unique == request.unique
        return -error, body

    def ask(self, opcode: int, node: int, body: bytes = b"", caller: Any = None) -> bytes:
        """Have a request answered. Returns the body; raises Refused."""
        error, answer = self.send(packed(opcode, node, body, caller))
        if error:
            raise Refused(error)
        return answer

    # --- the requests, with the arguments that the handlers of libfuse have ---

    def lookup(self, parent: int, name: bytes, caller: Any = None) -> Entry:
        return Entry.of(self.ask(fuse.LOOKUP, parent, name + b"\0", caller))

    def getattr(self, ino: int, caller: Any = None) -> Attr:
        return Attr(*fuse.ATTR.unpack(self.ask(fuse.GETATTR, ino, bytes(16), caller))[3:])

    def setattr(self, ino: int, caller: Any = None, **wanted: int) -> Attr:
        flags = {"size": fuse.FATTR_SIZE, "mode": fuse.FATTR_MODE, "uid": fuse.FATTR_UID, "gid": fuse.FATTR_GID}
        valid = sum(flags[name] for name in wanted)
        values = [wanted.get(name, 0) for name in ("mode", "uid", "gid")]
        body = fuse.SETATTR_IN.pack(
            valid, 0, 0, wanted.get("size", 0), 0, 0, 0, 0, 0, 0, 0, values[0], 0, values[1], values[2]
        )
        return Attr(*fuse.ATTR.unpack(self.ask(fuse.SETATTR, ino, body + bytes(4), caller))[3:])

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Any = None) -> Entry:
        return Entry.of(self.ask(fuse.MKDIR, parent, fuse.MKDIR_IN.pack(mode, 0) + name + b"\0", caller))

    def rmdir(self, parent: int, name: bytes, caller: Any = None) -> None:
        self.ask(fuse.RMDIR, parent, name + b"\0", caller)

    def unlink(self, parent: int, name: bytes, caller: Any = None) -> None:
        self.ask(fuse.UNLINK, parent, name + b"\0", caller)

    def mknod(self, parent: int, name: bytes, mode: int, _: int, caller: Any = None) -> Entry:
        return Entry.of(self.ask(fuse.MKNOD, parent, fuse.MKNOD_IN.pack(mode, 0, 0, 0) + name + b"\0", caller))

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Any = None) -> tuple[Opened, Entry]:
        body = self.ask(fuse.CREATE, parent, fuse.CREATE_IN.pack(flags, mode, 0, 0) + name + b"\0", caller)
        return Opened(*fuse.OPENED.unpack_from(body, fuse.ENTRY.size)), Entry.of(body)

    def rename(self, old: int, name: bytes, new: int, new_name: bytes, flags: int, caller: Any = None) -> None:
        names = name + b"\0" + new_name + b"\0"
        self.ask(fuse.RENAME2, old, fuse.RENAME2_IN.pack(new, flags, 0) + names, caller)

    def open(self, ino: int, flags: int, caller: Any = None) -> Opened:
        return Opened(*fuse.OPENED.unpack(self.ask(fuse.OPEN, ino, fuse.OPEN_IN.pack(flags, 0), caller)))

    def read(self, fh: int, offset: int, size: int) -> bytes:
        body = fuse.READ_IN.pack(fh, offset, size, fuse.READ_LOCKOWNER, 0, 0) + bytes(4)
        return self.ask(fuse.READ, fh, body)

    def write(self, fh: int, offset: int, data: bytes, flags: int = os.O_WRONLY) -> int:
        body = fuse.WRITE_IN.pack(fh, offset, len(data), 0, 0, flags, 0) + data
        stored: int = fuse.WRITTEN.unpack(self.ask(fuse.WRITE, fh, body))[0]
        return stored

    def fsync(self, fh: int, _: bool = False) -> None:
        self.ask(fuse.FSYNC, fh, fuse.FSYNC_IN.pack(fh) + bytes(8))

    def release(self, fh: int) -> None:
        self.ask(fuse.RELEASE, fh, fuse.RELEASE_IN.pack(fh) + bytes(16))

    def opendir(self, ino: int, caller: Any = None) -> int:
        opened: int = fuse.OPENED.unpack(self.ask(fuse.OPENDIR, ino, fuse.OPEN_IN.pack(0, 0), caller))[0]
        return opened

    def readdir(self, fh: int, offset: int, room: int = 4096, *, plus: bool = False) -> list[tuple[bytes, int, int]]:
        """The entries of one answer: name, inode number, and the offset of the next."""
        body = fuse.READ_IN.pack(fh, offset, room, 0, 0, 0) + bytes(4)
        answer, found = self.ask(fuse.READDIRPLUS if plus else fuse.READDIR, fh, body), []
        assert len(answer) <= room
        while answer:
            answer = answer[fuse.ENTRY.size * plus :]
            ino, next_offset, length, _ = fuse.DIRENT.unpack_from(answer)
            name = answer[fuse.DIRENT.size : fuse.DIRENT.size + length]
            found.append((name, ino, next_offset))
            answer = answer[-(-(fuse.DIRENT.size + length) // 8) * 8 :]
        return found

    def releasedir(self, fh: int) -> None:
        self.ask(fuse.RELEASEDIR, fh, fuse.RELEASE_IN.pack(fh) + bytes(16))

    def fsyncdir(self, fh: int, _: bool = False) -> None:
        self.ask(fuse.FSYNCDIR, fh, fuse.FSYNC_IN.pack(fh) + bytes(8))

    def getxattr(self, ino: int, name: bytes, caller: Any = None) -> bytes:
        return self.ask(fuse.GETXATTR, ino, fuse.GETXATTR_IN.pack(1 << 16, 0) + name + b"\0", caller)

    def setxattr(self, ino: int, name: bytes, value: bytes, caller: Any = None, flags: int = 0) -> None:
        body = fuse.SETXATTR_IN.pack(len(value), flags) + name + b"\0" + value
        self.ask(fuse.SETXATTR, ino, body, caller)

    def lseek(self, ino: int, offset: int, whence: int) -> int:
        found: int = fuse.OFFSET.unpack(self.ask(fuse.LSEEK, ino, fuse.LSEEK_IN.pack(ino, offset, whence) + bytes(4)))[
            0
        ]
        return found

    def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        self.ask(fuse.FALLOCATE, ino, fuse.FALLOCATE_IN.pack(ino, offset, length, mode) + bytes(4))


INVAL_INODE = struct.Struct("=Qqq")  # node, offset, length


def invalidated(notified: list[tuple[int, bytes]], code: int) -> list[tuple[int, int]]:
    """The inodes and offsets in the notifications of one kind. They tell the kernel what to forget."""
    return [INVAL_INODE.unpack(body)[:2] for found, body in notified if found == code]
