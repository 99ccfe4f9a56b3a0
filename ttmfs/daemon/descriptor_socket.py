"""The socket that gives programs the descriptor of a backup's file: native speed without root and without /proc.

A program connects to the Unix socket that ``.config`` names (SOCK_SEQPACKET) and sends the inode number of a backup's
directory. The answer is an errno, or 0 and the descriptor of the backup's file, open to read and write (SCM_RIGHTS).
The kernel tells who connected (SO_PEERCRED, SO_PEERGROUPS). The socket does not lie in the mount, since a bound socket
keeps its mount busy. It has a name in a directory, since an abstract name would not leave the daemon's network
namespace.

No program can send a descriptor here. The thread that receives a descriptor must close it, which takes as long as the
sender likes: a TCP socket can linger. So the kernel refuses such messages before they are queued (SO_PASSRIGHTS, Linux
6.16). On older kernels the mount has no socket if other users could connect.

A program gets a descriptor if the mode bits let it read, write and reach the backup. The right to read is not enough: a
program that maps the file and reads a hole stores a page there (shmem_fault() allocates it). Stores whose pages this
process counts (``store=``, ``uid_size=``) give out none: the process would not know what programs store.

Concurrency: one thread. Nothing is awaited between checking the mode bits and opening the file.
"""

import contextlib
import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable

import trio

from ..errors import TtmfsError, errno_of
from ..fuse.inodes import backup_of, handle_of
from ..fuse.permissions import Someone, allows
from ..model.pool import Pool

__all__ = ["DescriptorSocket"]

INODE_NUMBER, ERRNO = struct.Struct("=Q"), struct.Struct("=i")
"""The message of the program, and of the daemon."""

REQUEST_SECONDS = 1.0
"""How long the daemon waits for the program's message."""

MOST_OF_A_USER, MOST_CONNECTIONS = 8, 64
"""Open connections of one user, and of all users: one person may have many user ids (subuid(5))."""

RETRY_SECONDS = 0.1

_SO_PEERGROUPS, _SO_PASSRIGHTS = 59, 83
_MOST_GROUPS = 256  # getsockopt() of Python takes 1 KiB at most
_OVERFLOW_UID = 65534
_READ_WRITE_REACH = 0o7


class DescriptorSocket:
    """Gives out the descriptors of one mount's backups.

    `owner` mounted it. Other users see the mount if `open_to_others`. `count` is called for each descriptor given out.
    Raises OSError if there can be no socket at `path`.
    """

    def __init__(self, pool: Pool, path: str, *, owner: int, open_to_others: bool, count: Callable[[], object]) -> None:
        self._pool = pool
        self._owner = owner
        self._open_to_others = open_to_others
        self._count = count
        self._connections: Counter[int] = Counter()
        with open("/proc/self/uid_map", encoding="ascii") as file:
            self._knows_everyone = file.read().split() == ["0", "0", str(2**32 - 1)]
        self.path = path
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory := os.path.dirname(path))
            os.chmod(directory, 0o755)  # despite the umask; the socket has a mode of its own
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of the previous daemon
        _remove_abandoned(os.path.dirname(path))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with contextlib.nullcontext() if open_to_others else contextlib.suppress(OSError):
                _refuse_descriptors(self._listener)
            self._listener.bind(path)
            os.chmod(path, 0o666 if open_to_others else 0o600)
            self._listener.listen()
        except BaseException:
            self._listener.close()
            raise

    async def serve(self) -> None:
        """Answer requests, until cancelled."""
        listener = trio.socket.from_stdlib_socket(self._listener)
        with listener:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        connection, _ = await listener.accept()
                    except OSError:  # no descriptor is free, or the program has gone
                        await trio.sleep(RETRY_SECONDS)
                        continue
                    try:
                        peer = _peer(connection)
                    except OSError:
                        connection.close()
                        continue
                    if self._connections[peer.uid] < MOST_OF_A_USER and self._connections.total() < MOST_CONNECTIONS:
                        nursery.start_soon(self._answer, connection, peer)
                    else:
                        connection.close()

    def close(self) -> None:
        """Remove the socket, if no other daemon continues."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._listener.close()

    async def _answer(self, connection: trio.socket.SocketType, peer: Someone) -> None:
        self._connections[peer.uid] += 1
        try:
            with connection, trio.move_on_after(REQUEST_SECONDS):
                request = await connection.recv(INODE_NUMBER.size + 1)
                fd = -1
                try:
                    fd, number = self._opened(request, peer), 0
                    self._count()  # before it is given out: the program may read the count then
                except TtmfsError as error:
                    number = errno_of(error)
                except OSError as error:
                    number = error.errno or errno.EIO
                try:
                    await connection.sendmsg([ERRNO.pack(number)], _rights(fd))
                finally:
                    if fd >= 0:
                        os.close(fd)
        except OSError:  # the program has gone
            return
        finally:
            self._connections[peer.uid] -= 1
            if not self._connections[peer.uid]:
                del self._connections[peer.uid]

    def _opened(self, request: bytes, peer: Someone) -> int:
        """A new open file description of a backup's file. Raises OSError for what is refused."""
        if len(request) != INODE_NUMBER.size:
            raise OSError(errno.EINVAL, "no inode number")
        if not self._pool.store.shares_files:
            raise OSError(errno.EOPNOTSUPP, "the pages of this store are counted by the daemon")
        (ino,) = INODE_NUMBER.unpack(request)
        if not backup_of(ino) or handle_of(ino) or ino >> 63:
            raise OSError(errno.EINVAL, "the inode number of no backup")
        if peer.uid == _OVERFLOW_UID and not self._knows_everyone:
            raise OSError(errno.EACCES, "the user has no number in this user namespace")
        if not self._reaches(peer):
            raise OSError(errno.EACCES, "the mount is not shown to this user")
        if not allows(self._pool.file(backup_of(ino)).stat(), peer, _READ_WRITE_REACH):
            raise OSError(errno.EACCES, "the backup's mode bits do not allow it")
        return self._pool.files.open_again(backup_of(ino))

    def _reaches(self, peer: Someone) -> bool:
        """Whether a program may enter the mount, by fuse_allow_current_process() and the root's mode bits."""
        if not self._open_to_others:
            return peer.uid == self._owner
        return allows(self._pool.files.stat(), peer, os.X_OK)


def _refuse_descriptors(listener: socket.socket) -> None:
    """Have the kernel refuse descriptors sent to a listener's connections. Raises OSError."""
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        raise OSError(error.errno, "this kernel cannot refuse descriptors of strangers (SO_PASSRIGHTS, 6.16)") from None


def _remove_abandoned(directory: str) -> None:
    """Remove the sockets of daemons that have no successor. (A daemon that takes over makes its own anew.)"""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
                caller.setblocking(False)
                try:
                    caller.connect(entry.path)
                except ConnectionRefusedError:
                    os.unlink(entry.path)


def _peer(connection: trio.socket.SocketType) -> Someone:
    _, uid, gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        found = b""  # too many: it counts as in none, and can use .image
    return Someone(uid, frozenset({gid, *struct.unpack(f"={len(found) // 4}I", found)}))


def _rights(fd: int) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))] if fd >= 0 else []
