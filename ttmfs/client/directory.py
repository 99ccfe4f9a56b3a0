"""The directory of a backup in a mount: how it is found, its attributes, and its pages by requests through the mount.

Threading: any thread may call any method, but no other method runs during :meth:`Directory.close`.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING, Self

import numpy as np

from ..errors import ERRNO, BackupClosed, BackupEnded, InvalidArgument, NoRoom, NotPermitted, PageAbsent, StoreFailed
from ..fuse.inodes import MAX_HANDLE, ROOT
from ..handles import format_ranges, page_name, parse_ranges
from ..linux import system_calls
from ..linux.mountinfo import ttmfs_on
from ..model import arguments
from ..options import BASE_PAGE_SIZE
from .own_file import fill_from, read_existing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..errors import Meanings

__all__ = ["INTERRUPTIONS", "OF_PAGES", "OF_THE_MOUNT", "REQUEST", "Directory"]

PATH_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
"""How directories are opened: entries are found in them after a rename, too."""

REQUEST = 1 << 20
"""Bytes in one request through the mount: FUSE's limit of 256 pages of the caller's memory."""

FEW = 4
"""Up to this number of pages, opening each is quicker than listing all that exist."""

LONGEST_NUMBER = 18
"""Digits in the value of an attribute."""

INTERRUPTIONS = (None, errno.EINTR)
"""The errno of an OSError that a signal handler raised."""

OF_THE_MOUNT: Meanings = {
    **{number: kind for kind, number in ERRNO.items()},
    errno.EFBIG: InvalidArgument,  # property C10 of docs/contract.md
    errno.ENOTDIR: InvalidArgument,
    errno.ENOMEM: NoRoom,
    errno.ESTALE: BackupEnded,
    errno.ENOENT: BackupEnded,
    errno.EACCES: NotPermitted,
    errno.EROFS: NotPermitted,
    **dict.fromkeys((*INTERRUPTIONS, errno.EMFILE, errno.ENFILE)),  # these concern this process alone
}
"""The meanings of the errors of a mount: the table of ``ttmfs.errors`` reversed, with exceptions."""

OF_PAGES: Meanings = {**OF_THE_MOUNT, errno.ENOENT: PageAbsent}
"""The same for reading pages."""


class Directory:
    """The directory of an open backup. Errors are OSError (see OF_THE_MOUNT) and TtmfsError.

    A run of pages is a pair (first index, index past the last). Offsets and lengths are bytes.
    """

    def __init__(self, directory: int, mount: int) -> None:
        """Take over two descriptors, PATH_ONLY: of the directory and of the mount's root."""
        self.fd, self.mount = directory, mount
        self._images: dict[int, int] = {}  # descriptors of .image, by the flags of open(2)
        self._lock = threading.Lock()  # protects _images
        self.is_ended = False
        status = os.fstat(directory)
        self.id = status.st_ino
        served = ttmfs_on(status.st_dev)
        if served is None or self.id == ROOT:
            where = "the root of a mount" if served else "in no mount"
            raise InvalidArgument(f"{os.readlink(self._path)} is not a backup: it is {where} of ttmfs")
        if os.fstat(mount).st_dev != status.st_dev:
            raise InvalidArgument(f"another mount hides the mount of {os.readlink(self._path)}")
        self.served_by = served.served_by
        self.page_size = _number(f"/proc/self/fd/{mount}", "page_size")
        if self.page_size < BASE_PAGE_SIZE or self.page_size.bit_count() != 1:
            raise StoreFailed(f"the mount answers nonsense: pages of {self.page_size} bytes")

    @classmethod
    def create(cls, path: str | os.PathLike[str], mode: int) -> Self:
        """Make the directory of a new backup in the root of a mount."""
        above, name = os.path.split(os.path.normpath(path))
        with contextlib.ExitStack() as undo:
            mount = os.open(above or ".", PATH_ONLY)
            undo.callback(os.close, mount)
            if ttmfs_on(os.fstat(mount).st_dev) is None:
                raise InvalidArgument(f"{above or '.'} is not a mount of ttmfs: backups lie in the root of one")
            os.mkdir(name, mode, dir_fd=mount)
            undo.callback(os.rmdir, name, dir_fd=mount)
            directory = os.open(name, PATH_ONLY | os.O_NOFOLLOW, dir_fd=mount)
            undo.callback(os.close, directory)
            created = cls(directory, mount)
            undo.pop_all()
        return created

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the directory of an existing backup."""
        with contextlib.ExitStack() as undo:
            directory = os.open(path, PATH_ONLY)
            undo.callback(os.close, directory)
            mount = os.open("..", PATH_ONLY, dir_fd=directory)
            undo.callback(os.close, mount)
            opened = cls(directory, mount)
            undo.pop_all()
        return opened

    def close(self) -> None:
        """Close every descriptor."""
        for fd in (*self._images.values(), self.fd, self.mount):
            if fd >= 0:
                os.close(fd)
        self._images.clear()
        self.fd = self.mount = -1

    def check_open(self) -> None:
        """Raise BackupClosed or BackupEnded after :meth:`close`."""
        if self.fd < 0:
            raise BackupEnded("the backup was ended") if self.is_ended else BackupClosed("the backup was closed here")

    # --- the directory and its files ---

    @property
    def _path(self) -> str:
        """A path to the directory that survives a rename."""
        self.check_open()
        return f"/proc/self/fd/{self.fd}"

    @property
    def path(self) -> str:
        """The current path. Raises BackupEnded."""
        above, name = os.path.split(os.readlink(self._path))
        with contextlib.suppress(OSError):
            if os.stat(name, dir_fd=self.mount, follow_symlinks=False).st_ino == self.id:
                return os.path.join(above, name)
        # The kernel may have dropped the name by which it was opened, as it does when modes change.
        with contextlib.suppress(OSError), os.scandir(f"/proc/self/fd/{self.mount}") as entries:
            for entry in entries:
                if entry.inode() == self.id:
                    return os.path.join(above, entry.name)
        raise BackupEnded("the backup was ended")

    def open_file(self, name: str, flags: int) -> int:
        """Open a file of the backup."""
        self.check_open()
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)

    def image(self, flags: int) -> int:
        """Return a descriptor of ``.image`` that was opened with these flags. :meth:`close` closes it."""
        with self._lock:
            if flags not in self._images:
                self._images[flags] = self.open_file(".image", flags)
            return self._images[flags]

    def status(self) -> os.stat_result:
        """Return the stat(2) of the directory."""
        self.check_open()
        return os.fstat(self.fd)

    def chmod(self, mode: int) -> None:
        """Change the mode bits."""
        os.chmod(self._path, mode)

    def number(self, name: str) -> int:
        """Return an attribute ``user.ttmfs.NAME`` that is a number."""
        return _number(self._path, name)

    def set_attribute(self, name: str, value: str) -> None:
        """Set an attribute ``user.ttmfs.NAME``."""
        os.setxattr(self._path, f"user.ttmfs.{name}", value.encode())

    def remove(self) -> None:
        """Remove the directory, which must hold no pages."""
        os.rmdir(os.path.basename(self.path), dir_fd=self.mount)

    def end(self) -> None:
        """Drop every page and remove the directory."""
        self.check_open()
        os.ftruncate(self.image(os.O_WRONLY), 0)
        self.remove()
        self.is_ended = True

    # --- its pages ---

    @property
    def size(self) -> int:
        """Bytes that the backup spans."""
        return self.number("size")

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of stored pages, ascending."""
        try:
            yield from self._listed_runs()
        except ValueError:  # the server may be hostile
            raise StoreFailed("the mount answers nonsense as its list of handles") from None

    def _listed_runs(self) -> Iterator[tuple[int, int]]:
        try:
            text = _attribute(self._path, "map").decode()
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            yield from arguments.runs(np.array(sorted(map(int, os.listdir(self._path))), np.uint64))
            return
        end = 0
        for first, last in parse_ranges(text) if text else ():
            if not end < first <= last <= MAX_HANDLE:
                raise ValueError("handles do not ascend")
            yield first - 1, last
            end = last

    def store(self, offset: int, data: memoryview, flags: int = os.O_WRONLY) -> int:
        """Store whole pages by one request. Return the number of bytes stored."""
        image = self.image(flags)
        if length := self._one_request(data):
            return os.pwrite(image, data[:length], offset)
        aligned = mmap.mmap(-1, REQUEST)
        aligned[:] = data[:REQUEST]
        return os.pwrite(image, aligned, offset)

    def read(self, dst: memoryview, runs: list[tuple[int, int]]) -> None:
        """Read the pages of runs, one after the other. Raises PageAbsent."""
        read_existing(self, dst, runs, self.page_size)

    def fill(self, dst: memoryview, offset: int) -> None:
        """Fill a buffer through ``.image``; absent pages read as zeros.

        Each page is read by one request, so that two versions of it are not mixed.
        """
        file = self.image(os.O_RDONLY)
        while dst:
            if length := self._one_request(dst):
                fill_from(file, dst[:length], offset, length)
            else:
                length, aligned = REQUEST, memoryview(mmap.mmap(-1, REQUEST))
                fill_from(file, aligned, offset, REQUEST)
                dst[:length] = aligned
            dst, offset = dst[length:], offset + length

    def _one_request(self, data: memoryview) -> int:
        """Return the number of bytes that one request can carry from or to the beginning of a buffer: whole pages.

        0 if an aligned copy of one page would fit into a request but the page in this buffer does not. If a page is
        larger than a request, return the size of a request.
        """
        if len(data) <= REQUEST - BASE_PAGE_SIZE:
            return len(data)
        room = REQUEST - np.frombuffer(data, np.uint8).ctypes.data % BASE_PAGE_SIZE
        return min(len(data), room // self.page_size * self.page_size if self.page_size <= REQUEST else REQUEST)

    def check_present(self, runs: list[tuple[int, int]]) -> None:
        """Raise PageAbsent, or OSError(ENOENT), unless every page of the runs is stored."""
        if sum(past - first for first, past in runs) <= FEW:
            for idx in (idx for first, past in runs for idx in range(first, past)):
                os.close(self.open_file(page_name(idx + 1).decode(), os.O_RDONLY))
            return
        stored = list(self.runs())
        firsts = [first for first, _ in stored]
        for first, past in runs:
            place = bisect.bisect_right(firsts, first) - 1
            end = max(first, stored[place][1]) if place >= 0 else first
            if end < past:
                raise PageAbsent(f"handle {end + 1} holds no page")

    def drop(self, runs: list[tuple[int, int]]) -> None:
        """Drop the pages of runs."""
        step = system_calls.XATTR_SIZE_MAX // len(f"{MAX_HANDLE}-{MAX_HANDLE},")
        for start in range(0, len(runs), step):
            ranges = [(first + 1, past) for first, past in runs[start : start + step]]
            self.set_attribute("drop", format_ranges(ranges))


def _attribute(path: str, name: str) -> bytes:
    """Return an attribute. The call is repeated after a signal whose handler raises nothing, as PEP 475 has it."""
    while True:
        try:
            return os.getxattr(path, f"user.ttmfs.{name}")
        except InterruptedError as error:
            if error.filename != path:  # a signal handler raised it
                raise


def _number(path: str, name: str) -> int:
    text = _attribute(path, name)
    if not text.isdigit() or len(text) > LONGEST_NUMBER:  # the server may be hostile
        raise StoreFailed(f"the mount answers nonsense: user.ttmfs.{name} is {text[:LONGEST_NUMBER]!r}")
    return int(text)
