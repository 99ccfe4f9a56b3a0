"""The default kind of store: a private, unmounted tmpfs. The kernel keeps ids, counts and the budget.

A backup's id is the inode number of its file, which a tmpfs never uses twice.

Concurrency: see :mod:`.store`.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from typing import Self

from ..errors import InvalidArgument, NoRoom, NotSupported, OverQuota, from_os_error, translated
from ..linux.tmpfs import NeedsUserNamespace, new_tmpfs, resize_tmpfs
from ..options import Options
from .store import STORE, Store, check_filesystem
from .tmpfs_file import TmpfsFile

__all__ = ["NAMESPACE", "PrivateTmpfs"]

NAMESPACE = "namespace"
"""The name under which a keeper holds the user namespace of a tmpfs, if there is one."""

FEWEST_INODES = 4096
"""Smallest default of nr_inodes. The kernel needs 1 KiB of memory for each inode: for a backup, and for extended
attributes that users set on its file. The default of tmpfs depends only on the RAM."""


class PrivateTmpfs(Store):
    """A store in a private tmpfs."""

    page_file = TmpfsFile
    is_private = True

    def __init__(
        self, directory: int, options: Options, namespace: int | None = None, *, failed: Iterable[int] = ()
    ) -> None:
        self._namespace = namespace
        self._sets_inodes = options.nr_inodes is None
        super().__init__(directory, options, failed)
        self.counts_changes = self._quota.is_set
        self._first_scan()

    @classmethod
    def make(cls, options: Options) -> Self:
        """Make a new one. Raises NotSupported. Its cause is NeedsUserNamespace if the caller cannot make a tmpfs."""
        nr_inodes = options.nr_inodes
        if nr_inodes is None:
            nr_inodes = _default_inodes(options.size, options.page_size)
        try:
            directory, namespace = new_tmpfs(
                size=str(options.size),
                mode=f"{options.mode:o}",
                uid=str(options.uid),
                gid=str(options.gid),
                huge="never",  # a huge folio would make up to 2 MiB look like data after one page was written
                inode64=None,  # inode numbers that are never used twice
                nr_inodes=str(nr_inodes),
            )
        except NeedsUserNamespace as error:
            raise NotSupported(
                f"cannot make a private tmpfs: {error.strerror}. Users other than root need user namespaces (see the "
                "sysctls kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns), and can "
                "give only their own uid= and gid="
            ) from error
        except OSError as error:
            raise NotSupported(f"cannot make a private tmpfs: {error.strerror}") from error
        store = cls(directory, options, namespace)
        try:
            check_filesystem(directory, options.page_size)
        except BaseException:
            store.close()
            raise
        return store

    def ids_of(self, entries: "Iterator[os.DirEntry[str]]") -> dict[int, str]:
        return {entry.inode(): entry.name for entry in entries}

    def id_of(self, name: str, found: os.stat_result) -> int | None:
        return found.st_ino

    def new_id(self, fd: int, found: os.stat_result) -> int:
        return found.st_ino

    def is_backup(self, fd: int, id: int) -> bool:
        return os.fstat(fd).st_ino == id

    def create(self, name: str, size: int, mode: int, uid: int, gid: int) -> int:
        try:
            return super().create(name, size, mode, uid, gid)
        except OverQuota:
            raise
        except NoRoom as error:
            if self.room().f_ffree:
                raise
            more = "give the mount more: ttmfs resize" if self._sets_inodes else "mount with a larger nr_inodes="
            raise NoRoom(f"the number of backups (nr_inodes=) is used up; end backups, or {more}") from error

    def taken(self, id: int) -> int:
        with translated("counting pages"):
            return os.fstat(self.files.descriptor(id)).st_blocks * 512

    def room(self) -> os.statvfs_result:
        with translated("asking for room"):
            return os.fstatvfs(self.files.directory)

    def resize(self, size: int) -> None:
        limits = {"size": size}
        if self._sets_inodes and self.room().f_files < (wanted := _default_inodes(size, self.page_size)):
            limits["nr_inodes"] = wanted
        try:
            resize_tmpfs(self.files.directory, self._namespace, **limits)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise InvalidArgument(f"the budget cannot be {size} bytes: more is stored; drop pages first") from error
            raise from_os_error(error, "changing the budget") from error

    def descriptors(self) -> dict[str, int]:
        namespace = {} if self._namespace is None else {NAMESPACE: self._namespace}
        return {STORE: self.files.directory, **namespace}

    def close(self, *, leave: bool = False) -> None:
        super().close(leave=leave)
        if self._namespace is not None:
            os.close(self._namespace)
        self._namespace = None


def _default_inodes(size: int, page_size: int) -> int:
    """Return the default number of inodes of a tmpfs: one for each page, but at least FEWEST_INODES."""
    return max(FEWEST_INODES, size // page_size)
