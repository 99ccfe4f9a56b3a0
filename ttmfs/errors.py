"""What can go wrong, and the one table from that to errno.

The model raises these; the FUSE face turns them into the errno of the table, a program that uses the Python API catches
them by class. Each carries a sentence for a person.
"""

import errno

__all__ = [
    "ERRNO",
    "AccessDenied",
    "BackupAbsent",
    "BackupBusy",
    "BackupClosed",
    "BackupEnded",
    "BackupExists",
    "BackupNotEmpty",
    "InvalidArgument",
    "NameTooLong",
    "NoRoom",
    "NoSuchAttribute",
    "NoSuchName",
    "NotPermitted",
    "NotSupported",
    "OutOfBounds",
    "OverQuota",
    "PageAbsent",
    "PageDropped",
    "ReadOnlyEntry",
    "StoreBusy",
    "StoreFailed",
    "TextForgotten",
    "TooLong",
    "TooMuchHeld",
    "TtmfsError",
    "WrongParent",
    "errno_of",
    "from_os_error",
]


class TtmfsError(Exception):
    """Whatever ttmfs itself refuses or fails at."""


class InvalidArgument(TtmfsError, ValueError):
    """An index outside the backup, a page of the wrong size, a name that no backup may have."""


class PageAbsent(TtmfsError, LookupError):
    """The handle holds no page."""


class BackupAbsent(TtmfsError, LookupError):
    """No backup has that name."""


class NoSuchName(TtmfsError, LookupError):
    """The name looked up cannot stand for anything there."""


class NoSuchAttribute(TtmfsError, LookupError):
    """No extended attribute of that name can be had there."""


class BackupExists(TtmfsError):
    """The name is taken by another backup."""


class BackupNotEmpty(TtmfsError):
    """The backup still holds pages."""


class BackupBusy(TtmfsError):
    """The backup is being changed on a slow disk, and its name cannot be changed just now."""


class BackupEnded(TtmfsError):
    """The backup was ended (fini, rmdir) after the caller got hold of it."""


class BackupClosed(TtmfsError):
    """The caller closed it; the backup and its pages are still there."""


class PageDropped(TtmfsError):
    """The page was dropped after the caller opened it."""


class TextForgotten(TtmfsError):
    """The text of which the caller has read a part is gone: the daemon was replaced, or too many are open."""


class NoRoom(TtmfsError):
    """The budget, the memory reserve or the number of backups is used up."""


class OverQuota(NoRoom):
    """The owner of the backup has used up what one user may store."""


class TooMuchHeld(TtmfsError):
    """The writes that wait for swap or a disk hold as much of the daemon's memory as they may."""


class OutOfBounds(TtmfsError):
    """A page, or bytes, past the end of the backup, or bytes past the end of a page."""


class NotPermitted(TtmfsError):
    """No one may do this here, whatever the mode bits say."""


class AccessDenied(TtmfsError):
    """The mode bits do not allow it."""


class ReadOnlyEntry(TtmfsError):
    """The entry can be read only."""


class WrongParent(TtmfsError):
    """A page cannot be renamed: it belongs to its backup and its index."""


class NameTooLong(TtmfsError):
    """A backup's name has at most 255 bytes."""


class TooLong(TtmfsError):
    """The answer is longer than an extended attribute may be."""


class NotSupported(TtmfsError):
    """This system, kernel or daemon cannot do it."""


class StoreBusy(TtmfsError):
    """The directory is another mount's or pool's store at the moment."""


class StoreFailed(TtmfsError):
    """The store below failed; ``__cause__`` is its OSError."""


ERRNO: dict[type[TtmfsError], int] = {
    InvalidArgument: errno.EINVAL,
    PageAbsent: errno.ENOENT,  # the kernel reads zeros from such a handle; a directory must not show what is not there
    BackupAbsent: errno.ENOENT,
    NoSuchName: errno.ENOENT,
    NoSuchAttribute: errno.ENODATA,
    BackupExists: errno.EEXIST,
    BackupNotEmpty: errno.ENOTEMPTY,
    BackupBusy: errno.EBUSY,
    BackupEnded: errno.ESTALE,
    BackupClosed: errno.EBADF,  # of the client alone, as of a descriptor that was closed
    PageDropped: errno.ESTALE,  # not ENOENT: on ESTALE from open the VFS looks the name up once more by itself
    TextForgotten: errno.ESTALE,
    NoRoom: errno.ENOSPC,
    OverQuota: errno.EDQUOT,
    TooMuchHeld: errno.ENOMEM,
    OutOfBounds: errno.EFBIG,  # as at RLIMIT_FSIZE; EINVAL would make tools blame their own flags
    NotPermitted: errno.EPERM,
    ReadOnlyEntry: errno.EACCES,
    AccessDenied: errno.EACCES,
    WrongParent: errno.EXDEV,  # what makes mv copy and remove instead
    NameTooLong: errno.ENAMETOOLONG,
    TooLong: errno.E2BIG,
    NotSupported: errno.EOPNOTSUPP,
    StoreBusy: errno.EBUSY,  # only while a store is opened, so no caller at a mount ever sees it
    StoreFailed: errno.EIO,
}


def errno_of(error: TtmfsError) -> int:
    """The errno that stands for an error at the mount."""
    return ERRNO[type(error)]


def from_os_error(error: OSError, what: str) -> TtmfsError:
    """What an OSError of the store means to a caller. Raise it ``from`` the OSError, which is its cause."""
    match error.errno:
        # ENOMEM is a memory cgroup that can reclaim nothing more: no room, and nothing is wrong with the store.
        case errno.ENOSPC | errno.EDQUOT | errno.ENOMEM:
            return NoRoom(f"{what}: no room is left in the store")
        case errno.EEXIST:
            return BackupExists(f"{what}: there is a backup of that name already")
        case errno.EFBIG:
            return OutOfBounds(f"{what}: larger than the store's files can be")
        case errno.ENAMETOOLONG:
            return NameTooLong(f"{what}: the name is too long")
        case errno.EPERM | errno.EACCES:
            return NotPermitted(f"{what}: {error.strerror}")
        case _:
            return StoreFailed(f"{what}: {error.strerror or error}")
