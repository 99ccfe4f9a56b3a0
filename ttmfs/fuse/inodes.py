"""Inode numbers and file handles are computed from (backup, handle), so there is no table to keep.

::

     63  62  61 ............. 30   29 ............. 0
    +---+---+---------------------+--------------------+
    | 0 | R |      backup id      |       handle       |
    +---+---+---------------------+--------------------+

A backup's id is the inode number of its file in the store, 2 or more. Handle 0 is the backup's directory, the two
highest handles are its ``.image`` and ``.shmem``, and all between are pages: 2**30 - 3 of them, 4 TiB of 4 KiB pages.
The backup id 0 belongs to the mount itself, whose inodes are the small numbers below.

The file handle of a file of a backup is its inode number. R is set in it if the caller may not write the backup. The
file handles of open directories, and of the mount's own files, have a serial number in place of a page's handle. So no
two of them are the same.

Ids are never used twice. 2**32 of them last for 49 days at 1,000 new backups a second.
"""

__all__ = [
    "CONFIG",
    "FIRST_BACKUP",
    "HANDLE_BITS",
    "HANDLE_MASK",
    "IMAGE",
    "MAX_BACKUP_ID",
    "MAX_HANDLE",
    "READER",
    "ROOT",
    "SHMEM",
    "STATS",
    "backup_of",
    "handle_of",
    "inode",
    "own_of",
    "split",
    "with_serial",
]

HANDLE_BITS = 30
ID_BITS = 32

READER = 1 << 62

ROOT, STATS, CONFIG = 1, 2, 3  # FUSE_ROOT_ID is 1

MAX_BACKUP_ID = (1 << ID_BITS) - 1
SHMEM = (1 << HANDLE_BITS) - 1
IMAGE = SHMEM - 1
MAX_HANDLE = IMAGE - 1

FIRST_BACKUP = 1 << HANDLE_BITS
"""All inodes of backups are larger, all of the mount's own are smaller."""

HANDLE_MASK = (1 << HANDLE_BITS) - 1


def inode(backup: int, handle: int) -> int:
    """The inode number of a page, of a backup's directory (handle 0), or of its IMAGE or SHMEM."""
    return backup << HANDLE_BITS | handle


def backup_of(ino: int) -> int:
    """The backup's id in an inode number or file handle; 0 for the mount's own."""
    return ino >> HANDLE_BITS & MAX_BACKUP_ID


def handle_of(ino: int) -> int:
    """The page's handle in an inode number or file handle, or 0, IMAGE or SHMEM."""
    return ino & HANDLE_MASK


def split(ino: int) -> tuple[int, int]:
    """:func:`backup_of` and :func:`handle_of` at once, for each request that is read or written."""
    return ino >> HANDLE_BITS & MAX_BACKUP_ID, ino & HANDLE_MASK


def with_serial(ino: int, serial: int) -> int:
    """The file handle of the `serial`-th opening of a directory or of one of the mount's own inodes."""
    if backup := backup_of(ino):
        return inode(backup, serial & HANDLE_MASK)
    return (serial << 2 | ino) & HANDLE_MASK


def own_of(fh: int) -> int:
    """ROOT, STATS or CONFIG: what a file handle of the mount's own refers to."""
    return fh & 3
