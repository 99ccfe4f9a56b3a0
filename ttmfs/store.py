"""Where backups live: one directory, in which each backup is a sparse file. All the state of ttmfs is in there.

A backup's id is its file's inode number, which a tmpfs never gives out twice. The store remembers which id has which
name and keeps the files used last open; both can be had from the directory again at any time. Names that begin with a
dot are no backups.

Concurrency: used from one thread; no method waits for anything but the filesystem below.
"""

import contextlib
import errno
import os
import resource
import stat
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from typing import Self

from . import linux
from .errors import BackupAbsent, BackupEnded, InvalidArgument, NotPermitted, NotSupported, from_os_error
from .options import BASE_PAGE_SIZE, Options

__all__ = ["Store"]

OPEN_FILES = 256
"""How many backups' files are kept open, where the limit is twice that. To open and close one costs 4 us."""


@contextlib.contextmanager
def _failures_of(what: str) -> Iterator[None]:
    """Turn an OSError of the filesystem below into the error of ours that says what it means."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, what) from error


def _give(fd: int, uid: int, gid: int) -> None:
    """Make a file someone's. A daemon without privilege can give nothing away; its own user's keep their group."""
    try:
        os.fchown(fd, uid, gid)
    except OSError as error:
        if uid != os.geteuid():
            raise NotPermitted("this mount's daemon is no root: it makes backups for its own user only") from error


class Store:
    """The directory of the backups' files, however it was got.

    Owns the descriptors that it is made from; :meth:`close` gives them up, and with them a tmpfs and all its pages.
    """

    def __init__(self, directory: int, user_namespace: int | None = None) -> None:
        self._directory = directory
        self._user_namespace = user_namespace
        self._open: OrderedDict[int, int] = OrderedDict()  # id: descriptor, the one used last at the end
        self._most_open = min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._names: dict[int, str] = {}
        self._ids: list[int] = []  # the keys of _names, sorted
        try:
            self._probe()
            self.scan()
        except BaseException:
            self.close()
            raise

    @classmethod
    def on_tmpfs(cls, options: Options) -> Self:
        """A new private tmpfs, attached nowhere: as root directly, as a user through a user namespace."""
        asked: dict[str, str | None] = {
            "size": str(options.size),
            "mode": f"{options.mode:o}",
            "uid": str(options.uid),
            "gid": str(options.gid),
            "huge": "never",  # a huge folio would make up to 2 MiB look like data after one page was written
            "inode64": None,  # inode numbers that are never used twice
        }
        if options.nr_inodes is not None:
            asked["nr_inodes"] = str(options.nr_inodes)
        try:
            return cls(linux.new_tmpfs(**asked))
        except OSError as error:
            if error.errno != errno.EPERM:
                raise NotSupported(f"cannot make a private tmpfs: {error.strerror}") from error
        try:
            return cls(*linux.new_tmpfs_as_user(**asked))
        except OSError as error:
            raise NotSupported(
                f"cannot make a private tmpfs: {error.strerror}. A user needs user namespaces for it (see the sysctls "
                "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns), and uid= and gid= "
                "can be no one else's; root needs neither"
            ) from error

    def close(self) -> None:
        """Give up every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])
        for fd in self._directory, self._user_namespace:
            if fd is not None and fd >= 0:
                os.close(fd)
        self._directory, self._user_namespace = -1, None
        self._names, self._ids = {}, []

    def _probe(self) -> None:
        """Refuse a filesystem on which "is data" does not mean "was written", page by page."""
        size = BASE_PAGE_SIZE
        with _failures_of("probing the store"):
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            try:
                os.ftruncate(fd, 1024 * size)
                os.pwrite(fd, b"\1", 512 * size)
                found = os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 512 * size, os.SEEK_HOLE)
                linux.punch_hole(fd, 512 * size, size)
                left = os.fstat(fd).st_blocks
            finally:
                os.close(fd)
        if found != (512 * size, 513 * size) or left:
            raise NotSupported(
                f"the store's filesystem cannot tell pages apart: a page of {size} bytes was written at {512 * size}, "
                f"data is found from {found[0]} to {found[1]}, and {left * 512} bytes stay after it was punched out"
            )

    # --- the directory ---

    def scan(self) -> list[int]:
        """Read the directory anew; the ids of all backups in ascending order, which is the order of their making."""
        with _failures_of("reading the store"), os.scandir(self._directory) as entries:
            self._names = {e.inode(): e.name for e in entries if e.name[0] != "." and e.is_file(follow_symlinks=False)}
        self._ids = sorted(self._names)
        return self._ids

    @property
    def count(self) -> int:
        """How many backups there are."""
        return len(self._ids)

    def ids_after(self, id: int) -> list[int]:
        """The ids of the backups made after the one of `id`, ascending. `id` itself need not exist."""
        return self._ids[bisect_right(self._ids, id) :]

    def name_of(self, id: int) -> str:
        """The name of a backup; BackupEnded if there is none with that id any more."""
        try:
            return self._names[id]
        except KeyError:
            raise BackupEnded("the backup was ended") from None

    def find(self, name: str) -> os.stat_result:
        """The stat of a backup's file, by name; its ``st_ino`` is the id. BackupAbsent if there is none."""
        absent = BackupAbsent(f"there is no backup {name!r}")
        if not name or name[0] == "." or "/" in name:  # a path could lead out of the store
            raise absent
        try:
            found = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except ValueError:  # it holds a NUL, or what no bytes stand for
            raise absent from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise absent from None
            raise from_os_error(error, f"looking up {name!r}") from error
        if not stat.S_ISREG(found.st_mode):
            raise absent
        self._remember(found.st_ino, name)
        return found

    def create(self, name: str, size: int, mode: int, uid: int, gid: int) -> int:
        """Make the file of a new backup, whole or not at all, and give its id. BackupExists if the name is taken."""
        with _failures_of(f"creating {name!r}"):
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            try:
                made = os.fstat(fd)
                if (made.st_uid, made.st_gid) != (uid, gid):
                    _give(fd, uid, gid)
                os.fchmod(fd, mode)
                os.ftruncate(fd, size)
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=self._directory, follow_symlinks=True)
            except BaseException:
                os.close(fd)
                raise
        self._remember(made.st_ino, name)
        self._keep_open(made.st_ino, fd)
        return made.st_ino

    def remove(self, id: int) -> None:
        """Remove a backup's file. Its memory is the system's again at once, unless another process has it open."""
        name = self.name_of(id)
        with _failures_of(f"removing {name!r}"):
            os.unlink(name, dir_fd=self._directory)
        self._forget(id)

    def rename(self, id: int, new: str, *, replace: bool) -> None:
        """Give a backup another name; one that has it is ended if `replace`, else BackupExists is raised."""
        old = self.name_of(id)
        replaced = None
        with contextlib.suppress(BackupAbsent):
            replaced = self.find(new).st_ino
        with _failures_of(f"renaming {old!r} to {new!r}"):
            linux.rename(self._directory, old, new, replace=replace)
        if replaced is not None and replaced != id:
            self._forget(replaced)
        self._names[id] = new

    def _remember(self, id: int, name: str) -> None:
        if id not in self._names:
            self._ids.insert(bisect_right(self._ids, id), id)
        self._names[id] = name

    def _forget(self, id: int) -> None:
        del self._names[id]
        self._ids.remove(id)
        if (fd := self._open.pop(id, None)) is not None:
            os.close(fd)

    # --- the files ---

    def descriptor(self, id: int) -> int:
        """An open descriptor of a backup's file. It is the store's and good until the next call of any method."""
        try:
            self._open.move_to_end(id)
            return self._open[id]
        except KeyError:
            return self._reopen(id)

    def _reopen(self, id: int) -> int:
        name = self.name_of(id)
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            if error.errno == errno.ENOENT:  # removed by someone who went round us
                self._forget(id)
                raise BackupEnded("the backup was ended") from None
            raise from_os_error(error, f"opening {name!r}") from error
        if os.fstat(fd).st_ino != id:  # another file was put in its place
            os.close(fd)
            self._forget(id)
            raise BackupEnded("the backup was ended")
        self._keep_open(id, fd)
        return fd

    def _keep_open(self, id: int, fd: int) -> None:
        self._open[id] = fd
        if len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1])

    def path(self, name: str) -> str:
        """Where another process finds a backup's file as long as this one lives (root and this process' user only)."""
        return f"/proc/{os.getpid()}/fd/{self._directory}/{name}"

    # --- the whole ---

    def stat(self) -> os.stat_result:
        """Mode, owner and times of the directory itself."""
        with _failures_of("looking at the store"):
            return os.fstat(self._directory)

    def change(self, id: int | None, *, mode: int | None = None, uid: int = -1, gid: int = -1,
               times: tuple[int, int] | None = None) -> None:  # fmt: skip
        """Change mode, owner or (access, modification) times in ns, of a backup's file or (None) of the directory."""
        fd = self._directory if id is None else self.descriptor(id)
        with _failures_of("changing attributes"):
            if (uid, gid) != (-1, -1):
                os.fchown(fd, uid, gid)  # first: it clears set-id bits that mode may set
            if mode is not None:
                os.fchmod(fd, mode)
            if times is not None:
                os.utime(fd, ns=times)

    def room(self) -> os.statvfs_result:
        """Size, free blocks and free inodes, as the kernel keeps them."""
        with _failures_of("asking for room"):
            return os.fstatvfs(self._directory)

    def resize(self, size: int) -> None:
        """Change the budget, in bytes. InvalidArgument if more than that is stored."""
        try:
            if self._user_namespace is None:
                linux.resize_tmpfs(self._directory, size)
            else:
                linux.resize_tmpfs_as_user(self._directory, self._user_namespace, size)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise InvalidArgument(f"the budget cannot be {size} bytes: more is stored") from error
            raise from_os_error(error, "changing the budget") from error
