"""Where backups live: one directory, in which each backup is a sparse file. All pages are in there.

The directory is the root of a private tmpfs, or one of somebody's on any filesystem that can tell pages apart. On the
tmpfs a backup's id is its file's inode number, which is never given out twice, and the kernel keeps the budget; in
a directory the ledger keeps both. The store remembers which id has which name and keeps the files used last open; both
can be had from the directory again at any time. Names that begin with a dot are no backups.

Concurrency: used from one thread; no method waits for anything but the filesystem below.
"""

import contextlib
import errno
import os
import resource
import stat
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import trio

from ..errors import (
    BackupAbsent,
    BackupBusy,
    BackupEnded,
    InvalidArgument,
    NoRoom,
    NotPermitted,
    NotSupported,
    OverQuota,
    StoreBusy,
    StoreFailed,
    TtmfsError,
    from_os_error,
)
from ..linux import system_calls
from ..linux.memory import Reserve, Swap
from ..options import Options, format_size
from . import temporary_directory
from .blocking_io import Waiting
from .ledger import FEW_IDS, FILE, Ledger
from .quota import UNBOUND, Quota

__all__ = ["LEDGER", "NAMESPACE", "STORE", "Store"]

STORE, NAMESPACE, LEDGER = "store", "namespace", "ledger"
"""Names of the descriptors that a store is made from; the last two only where there is one."""

OPEN_FILES = 16384
"""How many backups' files are kept open, where the limit is twice that. To open one anew takes 20 us, with which a page
read by path takes half as long again."""

FEWEST_INODES = 4096
"""The least default of nr_inodes. The kernel takes 1 KiB of memory for each, either for a backup or for extended
attributes, which whoever may write a backup can set on its file. The default of tmpfs follows from the RAM alone."""

RECOUNT_SECONDS = 1.0
"""So late is seen what others do to the files of a directory. (Not more than a fiftieth of the time goes into that.)"""

SHORT_LOOK_SECONDS = 0.002
"""A directory that is read within so long is read at each listing."""

NO_ROOM = "the budget (size), or the memory that must stay free (reserve), is used up"
OVER_QUOTA = "user {} has stored all that one user may (uid_size)"

NAMES_WAIT_SECONDS = 0.5
"""For so long renaming or removing a backup may wait for a change of it to end."""

_UNCOUNTED = _UNDISTURBED = contextlib.nullcontext()

T = TypeVar("T")

_SUITED = "use a directory on tmpfs, ext4, xfs or btrfs"


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


def _opened(name: str, directory: int) -> int:
    """Open a backup's file to read and write, also if its mode shuts out its owner, which a user's daemon is."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # not to wait for someone's lease of the file
    try:
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EROFS:  # the filesystem has become read-only: what is there can be copied out
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


class Store:
    """The directory of the backups' files, however it was got.

    Owns what it is made from, also if that fails; :meth:`close` gives it up, and with it a tmpfs and all its pages.

    What of it depends on how it was got::

                                   private tmpfs   directory on a tmpfs   directory on a disk
        in_memory                  yes             yes                    no
        is_private (no ledger)     yes             no                     no
        keeps_count                with uid_size   yes                    yes
        shares_files               not with uid_size   no                 no

    `in_memory`: pages are swapped out, not written to a disk. `is_private`: nobody else makes or removes files there.
    `keeps_count`: each change of pages is counted here, beside the kernel. `grain`: bytes, the least that the
    filesystem tells as data; pages larger than that are allocated whole before they are written.

    A *page* is there if any of its range is data; how many there are is told by :attr:`Backup.pages` alone. *Room* is
    what the budget, the quotas, df and du count, in bytes or in pages of it, rounded up.
    """

    def __init__(
        self,
        directory: int,
        options: Options,
        *,
        user_namespace: int | None = None,
        ledger: Ledger | None = None,
        temporary: str | None = None,
        failed: Iterable[int] = (),
        grain: int = 0,
    ) -> None:
        self.page_size = options.page_size
        self.in_memory = system_calls.is_tmpfs(directory)
        self.swap = Swap()
        self.waiting = Waiting()
        self._reserve = Reserve(options.reserve) if self.in_memory else None
        self._directory = directory
        self._user_namespace = user_namespace
        self._ledger = ledger
        self._quota = Quota(options.uid_size // options.page_size) if options.uid_size else None
        self.keeps_count = ledger is not None or self._quota is not None
        self.is_private = ledger is None  # a tmpfs of its own
        self._budget = options.size  # bytes, kept with the ledger; 0: all that the filesystem has
        self._nr_inodes = options.nr_inodes
        self._temporary = temporary
        self._place: str | None = None  # a path of the directory that outlasts this process
        self._read_only = options.ro and ledger is not None and temporary is None
        self._recount_at = self._look_at = 0.0
        self._failed = set(failed)
        self.remember: Callable[[str, int], object] = lambda _, __: None  # what the next daemon must know, by a key
        self._takes_ids = False
        self._open: OrderedDict[int, int] = OrderedDict()  # id: descriptor, the one used last at the end
        self._most_open = min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._names: dict[int, str] = {}
        self._ids: list[int] = []  # the keys of _names, sorted
        try:
            self.grain = grain or self._known_grain()
            self.scan()
            if self._ledger:
                self._ledger.settle()
            for id in self._ids if self._quota else ():
                with contextlib.suppress(TtmfsError):  # one that cannot be opened takes nothing more
                    self._charge(id)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, options: Options) -> Self:
        """What the options ask for: DIR, or a private tmpfs, or for those who may make none what comes nearest."""
        if options.store is not None:
            return cls.in_directory(options.store, options)
        try:
            return cls.on_tmpfs(options)
        except NotSupported as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno == errno.EINVAL:
                raise
            return cls.in_temporary_directory(options, error)

    @classmethod
    def on_tmpfs(cls, options: Options) -> Self:
        """A new private tmpfs, attached nowhere: as root directly, as a user through a user namespace."""
        nr_inodes = options.nr_inodes
        if nr_inodes is None:
            nr_inodes = _default_inodes(options.size, options.page_size)
        asked: dict[str, str | None] = {
            "size": str(options.size),
            "mode": f"{options.mode:o}",
            "uid": str(options.uid),
            "gid": str(options.gid),
            "huge": "never",  # a huge folio would make up to 2 MiB look like data after one page was written
            "inode64": None,  # inode numbers that are never used twice
            "nr_inodes": str(nr_inodes),
        }
        try:
            return cls(system_calls.new_tmpfs(**asked), options)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise NotSupported(f"cannot make a private tmpfs: {error.strerror}") from error
        try:
            directory, namespace = system_calls.new_tmpfs_as_user(**asked)
        except OSError as error:
            raise NotSupported(
                f"cannot make a private tmpfs: {error.strerror}. A user needs user namespaces for it (see the sysctls "
                "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns), and uid= and gid= "
                "can be no one else's; root needs neither"
            ) from error
        return cls(directory, options, user_namespace=namespace)

    @classmethod
    def in_directory(cls, path: str, options: Options, *, temporary: str | None = None) -> Self:
        """An existing directory, whose filesystem must be able to tell pages apart. No one else may use it."""
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            absent = error.errno in (errno.ENOENT, errno.ENOTDIR)
            hint = "give an existing directory" if absent else "whoever mounts must be able to read and write it"
            raise InvalidArgument(f"store={path}: {error.strerror}; {hint}") from None
        try:
            kept = Ledger(directory, options.page_size, read_only=options.ro and temporary is None)
        except OSError as error:
            os.close(directory)
            if error.errno == errno.EOPNOTSUPP:
                raise NotSupported(f"store={path}: its filesystem has no O_TMPFILE; {_SUITED}") from error
            hint = {
                errno.EROFS: "; if backups are there, mount it with ro",
                errno.EACCES: "; mount as root, or as the user to whom it belongs",
            }.get(error.errno or 0, "")
            raise InvalidArgument(f"store={path}: {FILE} cannot be written there: {error.strerror}{hint}") from error
        except (InvalidArgument, NotSupported, StoreBusy) as error:
            os.close(directory)
            raise type(error)(f"store={path}: {error}") from None
        try:
            return cls(directory, options, ledger=kept, temporary=temporary)
        except NotSupported as error:
            raise NotSupported(f"store={path}: {error}; {_SUITED}") from error.__cause__

    @classmethod
    def in_temporary_directory(cls, options: Options, why: NotSupported) -> Self:
        """A new directory in memory that is removed at the end. Raises `why` if no place for one is suitable."""
        for temporary in temporary_directory.candidates(options):
            try:
                store = cls.in_directory(temporary_directory.store_in(temporary), options, temporary=temporary)
            except TtmfsError:
                temporary_directory.remove(temporary)
                continue
            if store.in_memory:
                return store
            store.close()
        raise why

    @classmethod
    def resumed(cls, descriptors: dict[str, int], options: Options, **kept: Any) -> Self:
        """The store of a daemon before, from its :meth:`descriptors`, and what else was kept of it.

        It is probed no more, for which there may be no room.
        """
        directory, ledger = descriptors[STORE], None
        if LEDGER in descriptors:
            read_only = options.ro and kept.get("temporary") is None
            ledger = Ledger(directory, options.page_size, read_only=read_only, fd=descriptors[LEDGER])
        return cls(directory, options, user_namespace=descriptors.get(NAMESPACE), ledger=ledger, **kept)

    def descriptors(self) -> dict[str, int]:
        """What the store is made from, for another process to go on with, by the names that a keeper knows."""
        found = {STORE: self._directory}
        if self._user_namespace is not None:
            found[NAMESPACE] = self._user_namespace
        if self._ledger:
            found[LEDGER] = self._ledger.fd
        return found

    @property
    def temporary(self) -> str | None:
        """The directory to remove at the end, if there is one."""
        return self._temporary

    def close(self, *, leave: bool = False) -> None:
        """Give up every descriptor, and what is not meant to stay; with `leave` it stays for the next daemon."""
        while self._open:
            os.close(self._open.popitem()[1])
        if self._temporary is not None and not leave:
            temporary_directory.remove(self._temporary)
        if self._ledger:
            self._ledger.close()
        for fd in self._directory, self._user_namespace:
            if fd is not None and fd >= 0:
                os.close(fd)
        self._directory, self._user_namespace, self._ledger, self._temporary = -1, None, None, None
        self._names, self._ids = {}, []

    def _known_grain(self) -> int:
        if self._read_only and self._ledger:  # nothing of it is changed, not even for a moment
            return self._ledger.grain or self.page_size
        try:
            grain = self._probe()
        except NoRoom:
            if self._ledger is None or self._ledger.grain is None:
                raise
            return self._ledger.grain  # full: but it can be read, and pages be dropped
        if self._ledger:
            with _failures_of("writing to the store"):
                self._ledger.keep_grain(grain)
        return grain

    def _probe(self) -> int:
        """Refuse a filesystem on which "is data" does not mean "was written", page by page. Gives its grain."""
        size = self.page_size
        with _failures_of("probing the store"):
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            try:
                os.ftruncate(fd, 1024 * size)
                os.pwrite(fd, b"\1", 512 * size)
                start, end = system_calls.next_data(fd, 0) or (0, 0)
                taken = max(end - start, os.fstat(fd).st_blocks * 512)
                if start != 512 * size or taken > size:
                    raise NotSupported(
                        f"the filesystem cannot tell pages of {format_size(size)} apart: a byte was written at "
                        f"{512 * size}, data is found from {start} to {end}, and {taken} bytes of room were taken"
                    )
                try:
                    system_calls.punch_hole(fd, 512 * size, size)
                except OSError as error:
                    raise NotSupported(f"the filesystem cannot punch holes: {error.strerror}") from error
                left = os.fstat(fd).st_blocks * 512
                if left or system_calls.next_data(fd, 0):
                    raise NotSupported(f"the filesystem does not free a page that is punched out: {left} bytes stay")
            finally:
                os.close(fd)
        return end - start

    # --- the directory ---

    def scan(self) -> list[int]:
        """Read the directory anew; the ids of all backups in ascending order, which is the order of their making."""
        with _failures_of("reading the store"), self._entries() as entries:
            if self._ledger is None:
                names = {e.inode(): e.name for e in entries if e.name[0] != "." and e.is_file(follow_symlinks=False)}
            else:
                names = {}
                for entry in entries:
                    if entry.name[0] != "." and entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(OSError):  # it went meanwhile, or the disk fails just there
                            found = os.stat(entry.name, dir_fd=self._directory, follow_symlinks=False)
                            if id := self._ledger.identify(entry.name, found):
                                names[id] = entry.name
        for id in self._names.keys() - names.keys():
            self._forget(id)
        self._names = names
        self._ids = sorted(names)
        return self._ids

    def look_around(self) -> None:
        """See what others did to the directory, if there are others, and if looking takes no more than a fiftieth of
        the time. (50,000 files of a tmpfs take 60 ms.)
        """
        if not self.is_private and (start := time.monotonic()) >= self._look_at:
            self.scan()
            end = time.monotonic()
            self._look_at = end + 50 * (end - start) if end - start > SHORT_LOOK_SECONDS else 0.0

    @contextlib.contextmanager
    def _entries(self) -> "Iterator[Iterator[os.DirEntry[str]]]":
        """What is in the directory. It is opened anew: btrfs shows an open one as it was when it was opened."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            with os.scandir(fd) as entries:
                yield entries
        finally:
            os.close(fd)

    @property
    def directory(self) -> str | None:
        """The path of the directory; None if it is a private tmpfs."""
        return os.readlink(f"/proc/self/fd/{self._directory}") if self._ledger else None

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

    def find(self, name: str) -> int:
        """The id of a backup by name. BackupAbsent if there is none."""
        absent = BackupAbsent(f"there is no backup {name!r}")
        if not name or name[0] == "." or "/" in name:  # a path could lead out of the store
            raise absent
        try:
            found = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            id = self._ledger.identify(name, found) if self._ledger else found.st_ino
        except ValueError:  # it holds a NUL, or what no bytes stand for
            raise absent from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise absent from None
            raise from_os_error(error, f"looking up {name!r}") from error
        if id is None or not stat.S_ISREG(found.st_mode):
            raise absent
        self._remember(id, name)
        return id

    async def have_ids(self) -> None:
        """See that a backup can be made without waiting for a disk on the loop.

        More ids are taken from the ledger's file ahead of need, in a thread that no one waits for. Making a backup
        waits only if hundreds are made before the disk has answered once.
        """
        ledger = self._ledger
        if not ledger or self.in_memory or ledger.ids_left > FEW_IDS:
            return
        if not ledger.ids_left:
            with _failures_of("writing to the store"):
                await trio.to_thread.run_sync(ledger.take_ids, limiter=self.waiting.changes.limiter)
        elif not self._takes_ids:
            self._takes_ids = True
            trio.lowlevel.start_thread_soon(ledger.take_ids, self._took_ids)

    def _took_ids(self, _: object) -> None:
        self._takes_ids = False

    def create(self, name: str, size: int, mode: int, uid: int, gid: int) -> int:
        """Make the file of a new backup, whole or not at all, and give its id. BackupExists if the name is taken."""
        if self._ledger and self._nr_inodes and 1 + self.count >= self._nr_inodes:
            raise NoRoom("the number of backups (nr_inodes) is used up")
        if self._quota and not self._quota.left(uid):
            raise OverQuota(OVER_QUOTA.format(uid))
        with _failures_of(f"creating {name!r}"):
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            try:
                made = os.fstat(fd)
                if (made.st_uid, made.st_gid) != (uid, gid):
                    _give(fd, uid, gid)
                os.ftruncate(fd, size)
                id = self._ledger.mark(fd, made.st_ino) if self._ledger else made.st_ino
                os.fchmod(fd, self._file_mode(mode))  # last: without the owner's right to write it could not be marked
                try:
                    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=self._directory, follow_symlinks=True)
                except BaseException:
                    if self._ledger:
                        self._ledger.forget(id)
                    raise
            except BaseException:
                os.close(fd)
                raise
        self._remember(id, name)
        self._keep_open(id, fd)
        if self._quota:
            self._quota.count(id, uid, 0)
        return id

    def remove(self, id: int) -> None:
        """Remove a backup's file. Its memory is the system's again at once, unless another process has it open."""
        name = self.name_of(id)
        try:
            if self.find(name) != id:
                raise BackupAbsent("its name is another's now")
        except BackupAbsent:
            raise BackupEnded("the backup was ended") from None
        with _failures_of(f"removing {name!r}"):
            os.unlink(name, dir_fd=self._directory)
        self._forget(id)

    def rename(self, id: int, new: str, *, replace: bool) -> None:
        """Give a backup another name; one that has it is ended if `replace`, else BackupExists is raised."""
        old = self.name_of(id)
        replaced = None
        with contextlib.suppress(BackupAbsent):
            replaced = self.find(new)
        with _failures_of(f"renaming {old!r} to {new!r}"):  # never over a file that is no backup
            system_calls.rename(self._directory, old, new, replace=replace and replaced is not None)
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
        self._failed.discard(id)
        if self._ledger:
            self._ledger.forget(id)
        if self._quota:
            self._quota.forget(id)
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
            fd = _opened(name, self._directory)
        except OSError as error:
            if error.errno == errno.ENOENT:  # removed by someone who went round us
                self._forget(id)
                raise BackupEnded("the backup was ended") from None
            raise from_os_error(error, f"opening {name!r}") from error
        same = self._ledger.is_marked(fd, id) if self._ledger else os.fstat(fd).st_ino == id
        if not same:  # another file was put in its place
            os.close(fd)
            self._forget(id)
            raise BackupEnded("the backup was ended")
        self._keep_open(id, fd)
        return fd

    def _keep_open(self, id: int, fd: int) -> None:
        self._open[id] = fd
        if len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1])

    @property
    def shares_files(self) -> bool:
        """Whether a backup's file may be given to others to write to: what they do needs no counting here."""
        return self.in_memory and not self.keeps_count

    def opened_anew(self, id: int) -> int:
        """A descriptor of a backup's file for someone else: its offset and flags are its own."""
        self.descriptor(id)  # it is what it was
        with _failures_of("opening a backup"):
            return _opened(self.name_of(id), self._directory)

    def stat_by_name(self, id: int) -> os.stat_result:
        """The stat of a backup's file without opening it, which can fail where this does not."""
        with _failures_of("looking at a backup"):
            try:
                return os.stat(self.name_of(id), dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError:
                raise BackupEnded("the backup was ended") from None

    def path(self, name: str) -> str:
        """Where another process finds a backup's file as long as the store lives (root and this process' user only)."""
        if self._place and not os.path.exists(self._place):  # who held it was killed just now
            self._place = None
        return f"{self._place or f'/proc/{os.getpid()}/fd/{self._directory}'}/{name}"

    def lead_paths_through(self, pid: int) -> None:
        """Have :meth:`path` lead through a process that holds the directory open too, and may outlive this one."""
        ours, self._place = os.fstat(self._directory), None
        with contextlib.suppress(OSError):  # it has just died, or may not be looked into
            for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), ours):
                    self._place = f"/proc/{pid}/fd/{fd}"
                    return

    def locked(self, id: int) -> contextlib.AbstractAsyncContextManager[None]:
        """Around what looks at a backup's file or changes it, if the file is on a disk."""
        return _UNDISTURBED if self.in_memory else self.waiting.files.locked(id)

    @contextlib.asynccontextmanager
    async def locked_soon(self, *ids: int | None) -> AsyncIterator[None]:
        """As :meth:`locked`, of up to two backups whose names are to change. BackupBusy if that would take long.

        The kernel keeps everyone from all names of the mount until it is answered.
        """
        async with contextlib.AsyncExitStack() as locks:
            if not self.in_memory:
                with trio.move_on_after(NAMES_WAIT_SECONDS) as waiting:
                    for id in sorted({id for id in ids if id is not None}):  # always in one order
                        await locks.enter_async_context(self.locked(id))
                if waiting.cancelled_caught:
                    raise BackupBusy("the backup is being written to, and the disk is slow")
            yield

    async def in_thread(self, file: system_calls.Duplicate, change: Callable[..., T], *arguments: Any) -> T:
        """What changing a file on a disk gives. `change` is called with a descriptor of it and the arguments."""
        changes = self.waiting.changes
        async with changes.turn(os.fstat(file.fd).st_uid):
            return await trio.to_thread.run_sync(_changed, change, file, arguments, limiter=changes.limiter)

    # --- the whole ---

    def stat(self) -> os.stat_result:
        """Mode, owner and times of the directory itself."""
        with _failures_of("looking at the store"):
            return os.fstat(self._directory)

    def change(self, id: int | None, *, mode: int | None = None, uid: int = -1, gid: int = -1,
               times: tuple[int, int] | None = None) -> None:  # fmt: skip
        """Change mode, owner or (access, modification) times in ns, of a backup's file or (None) of the directory."""
        fd = self._directory if id is None else self.descriptor(id)
        if self._quota and id is not None and uid != -1 and self._quota.takes(id) > self._quota.left(uid):
            raise OverQuota(OVER_QUOTA.format(uid))
        with _failures_of("changing attributes"):
            if (uid, gid) != (-1, -1):
                if mode is None and id is not None:
                    mode = stat.S_IMODE(os.fstat(fd).st_mode)
                os.fchown(fd, uid, gid)  # first: of a file, though not of a directory, it clears the set-id bits
            if mode is not None:
                os.fchmod(fd, mode if id is None else self._file_mode(mode))
            if times is not None:
                os.utime(fd, ns=times)
        if self._quota and id is not None and uid != -1:
            self._charge(id)

    def _file_mode(self, mode: int) -> int:
        """The mode of a backup's file. In a directory that others can reach it must not be a set-id program."""
        return mode & ~(stat.S_ISUID | stat.S_ISGID) if self._ledger else mode

    # --- room ---

    def admit(self, id: int, pages: int) -> int:
        """How many of so many more pages a backup may store, as far as we have to see to that.

        That is the reserve, the budget of a directory, and what the backup's owner may have.
        Where the kernel keeps the budget, storing may find that there is less.
        """
        if self._reserve and not self._reserve.admits(pages * self.page_size):
            return 0
        if self._ledger and self._budget:
            self._recount(self._ledger)
            pages = min(pages, max(0, self._budget // self.page_size - self._ledger.stored))
        return min(pages, self._quota.left_for(id)) if self._quota else pages

    def refusal(self, id: int) -> NoRoom:
        """Why a backup was not admitted another page."""
        if self._quota and not self._quota.left_for(id):
            return OverQuota(OVER_QUOTA.format(self.stat_by_name(id).st_uid))
        return NoRoom(NO_ROOM)

    @contextlib.contextmanager
    def changing(self, id: int, first: int, past: int, fd: int = -1, *, adding: bool = False) -> Iterator[None]:
        """Around whatever makes pages between two indices of a backup come or go, where `keeps_count`.

        If that is awaited, `fd` is a descriptor of the backup's file that stays open, and with `adding` all these pages
        count from the beginning on, so that others who add some meanwhile do not get the same room.
        """
        fd = self.descriptor(id) if fd < 0 else fd
        try:
            with self._ledger.changing(id, fd, first, past, adding=adding) if self._ledger else _UNCOUNTED:
                if adding:
                    self._charge(id)
                yield
        finally:
            if self._quota:
                with contextlib.suppress(TtmfsError):  # it was ended by someone who went round us
                    self._charge(id)

    def _charge(self, id: int) -> None:
        """Count a backup for its owner."""
        if self._quota:
            found = self.stat_by_name(id)
            taken = self.taken(id) if self._ledger else found.st_blocks * 512
            self._quota.count(id, found.st_uid, -(-taken // self.page_size))

    def left_for(self, uid: int) -> int:
        """How many bytes more a user may store, as far as there is a bound for one."""
        return self._quota.left(uid) * self.page_size if self._quota and uid else UNBOUND

    def taken(self, id: int) -> int:
        """How many bytes of room a backup takes: what df and du show.

        In memory these are its blocks, with what is allocated and not written; on a disk its pages, all of each.
        """
        fd = self.descriptor(id)
        with _failures_of("counting pages"):
            if self._ledger and not self.in_memory:
                return self._ledger.pages(id, fd) * self.page_size
            return os.fstat(fd).st_blocks * 512

    @property
    def counts_pages_by_room(self) -> bool:
        """Whether each page takes the room of one, so that none need be looked for to count them.

        A page of several base pages can be there in part, in memory: whoever holds .shmem can store that.
        """
        return not self.in_memory or self.page_size <= self.grain

    def _recount(self, ledger: Ledger) -> None:
        """See what others did to the files."""
        if (start := time.monotonic()) < self._recount_at:
            return
        for id in list(self.scan()):
            if id in self.waiting.files and ledger.has_counted(id):  # it is right, and the kernel has the file locked
                continue
            with contextlib.suppress(TtmfsError), _failures_of("counting pages"):  # one that fails stops no other
                ledger.pages(id, self.descriptor(id))
        end = time.monotonic()
        self._recount_at = end + max(RECOUNT_SECONDS, 50 * (end - start))

    def room(self) -> os.statvfs_result:
        """Size, free blocks and free inodes: as the kernel keeps them, or as we do in their place.

        In a directory without a budget all that its filesystem has left is ours, with what we have stored there.
        """
        with _failures_of("asking for room"):
            below = os.fstatvfs(self._directory)
            if not self._ledger:
                return below
            self._recount(self._ledger)
        stored, left = self._ledger.stored, below.f_bavail * below.f_frsize // self.page_size
        size = self._budget // self.page_size or stored + left
        free = max(0, size - stored)
        files = self._nr_inodes or below.f_files
        files_free = max(0, files - 1 - self.count) if self._nr_inodes else below.f_favail
        return os.statvfs_result(
            (self.page_size, self.page_size, size, free, min(free, left), files, files_free, files_free,
             below.f_flag, below.f_namemax)
        )  # fmt: skip

    def headroom(self) -> int:
        """Bytes that may be stored before the memory reserve is touched."""
        return self._reserve.headroom() if self._reserve else 2**63 - 1

    def resize(self, size: int) -> None:
        """Change the budget, in bytes. InvalidArgument if more than that is stored."""
        too_small = InvalidArgument(f"the budget cannot be {size} bytes: more is stored")
        if self._ledger:
            self._recount_at = 0.0
            self._recount(self._ledger)
            if size < self._ledger.stored * self.page_size:
                raise too_small
            self._budget = size
            self.remember("size", size)
            return
        limits = {"size": size}
        if self._nr_inodes is None and self.room().f_files < (wanted := _default_inodes(size, self.page_size)):
            limits["nr_inodes"] = wanted
        try:
            if self._user_namespace is None:
                system_calls.resize_tmpfs(self._directory, **limits)
            else:
                system_calls.resize_tmpfs_as_user(self._directory, self._user_namespace, **limits)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise too_small from error
            raise from_os_error(error, "changing the budget") from error

    # --- durability ---

    async def sync(self, id: int | None) -> None:
        """fsync(2) of a backup and of its name, or (None) of all names, in a thread.

        After one failure every later one of that backup fails too: the kernel tells of lost pages only once, but there
        may be several who rely on theirs.
        """
        if id in self._failed:
            raise StoreFailed("syncing a backup: it failed before, so pages may be lost; copy out what is there")
        try:
            owner = os.fstat(self._directory if id is None else self.descriptor(id)).st_uid
            async with self.waiting.syncs.turn(owner):  # who waits has no descriptors of his own yet
                of = self._directory if id is None else self.descriptor(id)
                files = [system_calls.Duplicate(fd) for fd in (of, self._directory)]
                await trio.to_thread.run_sync(_sync, files, limiter=self.waiting.syncs.limiter)
        except OSError as error:
            if id is not None:
                self._failed.add(id)
                self.remember(f"unsynced {id}", 1)
            raise from_os_error(error, "syncing a backup") from error


def _default_inodes(size: int, page_size: int) -> int:
    """How many inodes a tmpfs of ours has if nobody says: as many as pages, or FEWEST_INODES."""
    return max(FEWEST_INODES, size // page_size)


def _changed(change: Callable[..., T], file: system_calls.Duplicate, arguments: tuple[Any, ...]) -> T:
    return change(file.fd, *arguments)  # which is open until then


def _sync(files: list[system_calls.Duplicate]) -> None:
    for file in files:
        os.fsync(file.fd)
