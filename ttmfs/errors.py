"""The exceptions of ttmfs, the table from them to errno, and the translation of an OSError into one of them.

The model raises these exceptions. The FUSE face turns them into the errno of the table; a program that uses the Python
API catches them by class. Each message is a sentence for a person.
"""

import errno
from collections.abc import Mapping


class TtmfsError(Exception):
    """The base class: a refusal or a failure of ttmfs itself."""


class InvalidArgument(TtmfsError, ValueError):
    """An argument is wrong: an index past the size, a page of the wrong length, a name that no backup can have."""


class PageAbsent(TtmfsError, LookupError):
    """The backup has no page with that handle."""


class BackupAbsent(TtmfsError, LookupError):
    """No backup has that name."""


class NoSuchName(TtmfsError, LookupError):
    """The directory cannot have an entry of that name."""


class NoSuchAttribute(TtmfsError, LookupError):
    """The file has no extended attribute of that name."""


class AttributeExists(TtmfsError):
    """The file already has an extended attribute of that name."""


class NoData(TtmfsError, LookupError):
    """There is no data at or after the offset."""


class BackupExists(TtmfsError):
    """Another backup has that name."""


class BackupNotEmpty(TtmfsError):
    """The backup still holds pages."""


class BackupBusy(TtmfsError):
    """The backup cannot be renamed while a slow disk changes it."""


class BackupEnded(TtmfsError):
    """The backup was ended (fini, rmdir) after the caller opened it."""


class BackupClosed(TtmfsError):
    """The caller closed the backup; its pages are still there."""


class PageDropped(TtmfsError):
    """The page was dropped after the caller opened it."""


class TextForgotten(TtmfsError):
    """The rest of a text is gone: the daemon was replaced, or too many texts are open."""


class NoRoom(TtmfsError):
    """The budget, the memory reserve or the number of backups is used up."""


class OverQuota(NoRoom):
    """The owner of the backup has stored as much as one user may."""


class TooMuchHeld(TtmfsError):
    """Pending writes, which wait for swap or a disk, have used up their share of the daemon's memory."""


class OutOfBounds(TtmfsError):
    """The range lies past the end of the backup, or of a page."""


class NotPermitted(TtmfsError):
    """The operation is forbidden here, whatever the mode bits are."""


class AccessDenied(TtmfsError):
    """The mode bits forbid it."""


class ReadOnlyEntry(TtmfsError):
    """The file is read-only."""


class WrongParent(TtmfsError):
    """A page cannot be renamed: it belongs to its backup and its index."""


class NameTooLong(TtmfsError):
    """The name of the backup is longer than 255 bytes."""


class TooLong(TtmfsError):
    """The answer does not fit into an extended attribute."""


class XattrBufferTooSmall(TtmfsError):
    """The caller has less room than the extended attribute has bytes."""


class NotSupported(TtmfsError):
    """This system, kernel or daemon cannot do it."""


class StoreBusy(TtmfsError):
    """Another mount or pool has the directory as its store."""


class StoreFailed(TtmfsError):
    """The filesystem under the store failed; ``__cause__`` is its OSError."""


ERRNO: dict[type[TtmfsError], int] = {
    InvalidArgument: errno.EINVAL,
    PageAbsent: errno.ENOENT,  # the kernel reads zeros from such a handle; a directory shows only files that exist
    BackupAbsent: errno.ENOENT,
    NoSuchName: errno.ENOENT,
    NoSuchAttribute: errno.ENODATA,
    AttributeExists: errno.EEXIST,
    NoData: errno.ENXIO,
    BackupExists: errno.EEXIST,
    BackupNotEmpty: errno.ENOTEMPTY,
    BackupBusy: errno.EBUSY,
    BackupEnded: errno.ESTALE,
    BackupClosed: errno.EBADF,  # only the client raises it
    PageDropped: errno.ESTALE,  # not ENOENT: after ESTALE from open(2) the VFS looks the name up once more
    TextForgotten: errno.ESTALE,
    NoRoom: errno.ENOSPC,
    OverQuota: errno.EDQUOT,
    TooMuchHeld: errno.ENOMEM,
    OutOfBounds: errno.EFBIG,  # as for RLIMIT_FSIZE; after EINVAL tools blame their own flags
    NotPermitted: errno.EPERM,
    ReadOnlyEntry: errno.EACCES,
    AccessDenied: errno.EACCES,
    WrongParent: errno.EXDEV,  # mv(1) then copies and removes
    NameTooLong: errno.ENAMETOOLONG,
    TooLong: errno.E2BIG,
    XattrBufferTooSmall: errno.ERANGE,
    NotSupported: errno.EOPNOTSUPP,
    StoreBusy: errno.EBUSY,  # raised while a store is opened, so no caller at a mount sees it
    StoreFailed: errno.EIO,
}

Meanings = Mapping[int | None, type[TtmfsError] | None]
"""Maps the errno of an OSError to an exception, or to None: raise the OSError unchanged. Others mean StoreFailed."""

OF_THE_STORE: Meanings = {
    errno.ENOSPC: NoRoom,
    errno.EDQUOT: NoRoom,
    errno.ENOMEM: NoRoom,  # the memory control group can reclaim nothing more
    errno.EEXIST: BackupExists,
    errno.EFBIG: OutOfBounds,
    errno.ENAMETOOLONG: NameTooLong,
    errno.EPERM: NotPermitted,
    errno.EACCES: NotPermitted,
}
"""The meanings of the errors of the filesystem that holds the backups' files."""


def errno_of(error: TtmfsError) -> int:
    """Return the errno that the mount answers for an exception."""
    return ERRNO[type(error)]


def from_os_error(error: OSError, what: str) -> TtmfsError:
    """Return the exception that an OSError of the store means. `what` names the operation; raise it ``from error``.

    For code that runs at each request; :class:`translated` is shorter, and takes 1 us more.
    """
    kind = OF_THE_STORE.get(error.errno) or StoreFailed
    return kind(_text(error, what))


def _text(error: OSError, what: str) -> str:
    advice = "; drop pages, or give the mount more: ttmfs resize" if error.errno == errno.ENOSPC else ""
    return f"{what}: {error.strerror or error}{advice}"


class translated:  # noqa: N801 # it is used like a function, as contextlib.suppress is
    """A context manager: translates an OSError that the block raises, which becomes the cause.

    `what` names the operation, for the message. ::

        with translated("dropping pages"):
            system_calls.punch_hole(fd, offset, length)
    """

    __slots__ = ("_meanings", "_what")

    def __init__(self, what: str, meanings: Meanings = OF_THE_STORE) -> None:
        self._what, self._meanings = what, meanings

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError) and (kind := self._meanings.get(error.errno, StoreFailed)):
            raise kind(_text(error, self._what)) from error
