"""The files of the backups in a store's directory: names, ids, open descriptors. Names with a dot first are hidden.

The store gives a backup its id. This module caches the names by id, and the descriptors used last. It can read them
from the directory again at any time.

Concurrency: one thread. Methods wait only for the filesystem below.
"""

import contextlib
import errno
import os
import resource
import stat
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import BackupAbsent, BackupEnded, NotPermitted, from_os_error, translated
from ..linux import system_calls
from .new_file import NewFile

if TYPE_CHECKING:
    from .store import Store

__all__ = ["BackupFiles", "Throttle"]

OPEN_FILES = 16384
"""Largest number of files kept open; at most half of RLIMIT_NOFILE. Opening a file takes 20 us and makes
reading a page by path half as long again."""

SHORT_SCAN_SECONDS = 0.002
"""A directory that is scanned within this time is scanned at every listing."""


class Throttle:
    """Limits how often work is done: not within `least` seconds, and for at most a fiftieth of the time."""

    def __init__(self, least: float = 0.0, free: float = 0.0) -> None:
        """The limit of a fiftieth does not apply to work of less than `free` seconds."""
        self._least, self._free = least, free
        self._next = self._start = 0.0

    def reset(self) -> None:
        """Make the work due now."""
        self._next = 0.0

    def is_due(self) -> bool:
        """Whether to do the work now. Call :meth:`done` after it."""
        self._start = time.monotonic()
        return self._start >= self._next

    def done(self) -> None:
        """Note that the work is done, and how long it took."""
        end = time.monotonic()
        took = end - self._start
        self._next = end + max(self._least, 50 * took if took > self._free else 0.0)


class BackupFiles:
    """The backups' files by name and by id."""

    def __init__(self, directory: int, store: "Store") -> None:
        """`directory` is a descriptor. The caller closes it."""
        self.directory = directory
        self._store = store
        self.open: OrderedDict[int, int] = OrderedDict()
        """Open descriptors by id; the one used last at the end. For compiled code, which looks here first."""
        self._most_open = min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // store.files_each)
        self._names: dict[int, str] = {}
        self._ids: list[int] = []  # the keys of _names, sorted
        self._scans = Throttle(free=SHORT_SCAN_SECONDS)

    def close(self) -> None:
        """Close every file, and forget all backups."""
        while self.open:
            self._store.close_file(*self.open.popitem())
        self.directory, self._names, self._ids = -1, {}, []

    # --- names and ids ---

    def scan(self) -> list[int]:
        """Read the directory again. Returns the ids of all backups, ascending: the oldest first."""
        with translated("reading the store"), self._entries() as entries:
            names = self._store.ids_of(e for e in entries if e.name[0] != "." and e.is_file(follow_symlinks=False))
        for id in self._names.keys() - names.keys():
            self.forget(id)
        self._names, self._ids = names, sorted(names)
        return self._ids

    def scan_if_shared(self) -> None:
        """Notice the changes of other programs to the directory. Throttled: 50,000 files of a tmpfs take 60 ms."""
        if not self._store.is_private and self._scans.is_due():
            self.scan()
            self._scans.done()

    @contextlib.contextmanager
    def _entries(self) -> "Iterator[Iterator[os.DirEntry[str]]]":
        """The entries of the directory. It is opened again, as btrfs shows an open one as it was at its opening."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.directory)
        try:
            with os.scandir(fd) as entries:
                yield entries
        finally:
            os.close(fd)

    @property
    def count(self) -> int:
        """The number of backups."""
        return len(self._ids)

    def ids_after(self, id: int) -> list[int]:
        """Return the ids greater than `id`, ascending. `id` itself need not exist."""
        return self._ids[bisect_right(self._ids, id) :]

    def name_of(self, id: int) -> str:
        """Return the name of a backup. Raises BackupEnded if it no longer exists."""
        try:
            return self._names[id]
        except KeyError:
            raise BackupEnded("the backup was ended") from None

    def find(self, name: str) -> int:
        """Return the id of a backup by name. Raises BackupAbsent."""
        absent = BackupAbsent(f"there is no backup {name!r}")
        if not name or name[0] == "." or "/" in name:  # a path could lead out of the store
            raise absent
        try:
            found = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            id = self._store.id_of(name, found) if stat.S_ISREG(found.st_mode) else None
        except ValueError:  # the name holds a NUL, or cannot be encoded
            raise absent from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise absent from None
            raise from_os_error(error, f"looking up {name!r}") from error
        if id is None:
            raise absent
        self._remember(id, name)
        return id

    # --- making and removing ---

    def create(self, name: str, size: int, mode: int, uid: int, gid: int) -> int:
        """Make the file of a new backup, whole or not at all. Returns its id. BackupExists if the name is taken."""
        with translated(f"creating {name!r}"):
            new = NewFile(self.directory, unnamed=self._store.has_unnamed_files)
            fd = new.fd
            try:
                made = os.fstat(fd)
                if (made.st_uid, made.st_gid) != (uid, gid):
                    _set_owner(fd, uid, gid)
                os.ftruncate(fd, size)
                id = self._store.new_id(fd, made)
                os.fchmod(fd, self._store.file_mode(mode))  # last: setting an id needs a file that its owner may write
                try:
                    new.link(name)
                except BaseException:
                    self._store.forget(id)
                    raise
            except BaseException:
                new.discard()
                raise
        self._remember(id, name)
        self._keep_open(id, fd)
        return id

    def remove(self, id: int) -> None:
        """Remove a backup's file. That frees its memory, unless another process has the file open."""
        name = self.name_of(id)
        try:
            if self.find(name) != id:
                raise BackupAbsent("another backup has its name now")
        except BackupAbsent:
            raise BackupEnded("the backup was ended") from None
        with translated(f"removing {name!r}"):
            os.unlink(name, dir_fd=self.directory)
        self.forget(id)

    def rename(self, id: int, new: str, *, replace: bool) -> None:
        """Rename a backup. If another has the new name, end that one (`replace`), or raise BackupExists."""
        old = self.name_of(id)
        replaced = None
        with contextlib.suppress(BackupAbsent):
            replaced = self.find(new)
        with translated(f"renaming {old!r} to {new!r}"):  # never over a file that is not a backup
            system_calls.rename(self.directory, old, new, replace=replace and replaced is not None)
        if replaced is not None and replaced != id:
            self.forget(replaced)
        self._names[id] = new

    def _remember(self, id: int, name: str) -> None:
        if id not in self._names:
            self._ids.insert(bisect_right(self._ids, id), id)
        self._names[id] = name

    def forget(self, id: int) -> None:
        """Forget a backup whose file is here no more."""
        del self._names[id]
        self._ids.remove(id)
        self._store.forget(id)
        if (fd := self.open.pop(id, None)) is not None:
            self._store.close_file(id, fd)

    # --- descriptors, stat and paths ---

    def descriptor(self, id: int) -> int:
        """Return an open descriptor of a backup's file. It is valid until the next method call: do not close it."""
        try:
            self.open.move_to_end(id)
            return self.open[id]
        except KeyError:
            return self._reopen(id)

    def _reopen(self, id: int) -> int:
        name = self.name_of(id)
        try:
            fd = _open_file(name, self.directory)
        except FileNotFoundError:  # another program removed it
            self.forget(id)
            raise BackupEnded("the backup was ended") from None
        except OSError as error:
            raise from_os_error(error, f"opening {name!r}") from error
        if not self._store.is_backup(fd, id):  # another file has its name
            os.close(fd)
            self.forget(id)
            raise BackupEnded("the backup was ended")
        self._keep_open(id, fd)
        return fd

    def _keep_open(self, id: int, fd: int) -> None:
        try:
            self._store.file_was_opened(id, fd)
        except BaseException:
            os.close(fd)
            raise
        self.open[id] = fd
        if len(self.open) > self._most_open:
            unused = (other for other in self.open if other != id and self._store.may_close(other))
            if (oldest := next(unused, None)) is not None:
                self._store.close_file(oldest, self.open.pop(oldest))

    def stat(self, id: int | None = None) -> os.stat_result:
        """Return the stat of the directory, or of a backup's file, without opening it."""
        with translated("looking at the store"):
            if id is None:
                return os.fstat(self.directory)
            try:
                return os.stat(self.name_of(id), dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                raise BackupEnded("the backup was ended") from None

    def change(self, id: int | None, *, mode: int | None = None, uid: int = -1, gid: int = -1,
               times: tuple[int, int] | None = None) -> None:  # fmt: skip
        """Change mode, owner or times (access, modification; ns) of a backup's file, or (None) of the directory."""
        fd = self.directory if id is None else self.descriptor(id)
        with translated("changing attributes"):
            if (uid, gid) != (-1, -1):
                if mode is None and id is not None:
                    mode = stat.S_IMODE(os.fstat(fd).st_mode)
                os.fchown(fd, uid, gid)  # first, because it clears the set-id bits of a file (not of a directory)
            if mode is not None:
                os.fchmod(fd, mode if id is None else self._store.file_mode(mode))
            if times is not None:
                os.utime(fd, ns=times)

    def path(self, name: str) -> str:
        """Return a path by which other processes, of root or this user, reach a backup's file while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.directory}/{name}"


def _set_owner(fd: int, uid: int, gid: int) -> None:
    """Change a file's owner. A daemon without privilege cannot; then a file of the daemon's user keeps its group."""
    try:
        os.fchown(fd, uid, gid)
    except OSError as error:
        if uid != os.geteuid():
            raise NotPermitted("this mount's daemon is not root: it makes backups for its own user only") from error


def _open_file(name: str, directory: int) -> int:
    """Open a backup's file to read and write, even if its mode denies that to its owner, the daemon's user."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: do not wait for a lease
    try:
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EROFS:  # the filesystem has become read-only: pages can still be copied out
            return os.open(name, flags & ~os.O_RDWR | os.O_RDONLY, dir_fd=directory)
        if not isinstance(error, PermissionError):
            raise
        file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        path, mode = f"/proc/self/fd/{file}", stat.S_IMODE(os.fstat(file).st_mode)
        os.chmod(path, mode | 0o600)
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.chmod(path, mode)
    finally:
        os.close(file)
