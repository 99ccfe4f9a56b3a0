"""ttmfs: page backups as files, and as a Python API.

A backup keeps pages that had to leave a device, in kernel shmem, by index. In a trio program::

    async with ttmfs.open_pool(size=1 << 30) as pool:
        backup = await pool.create("a", size=64 << 20)
        handle = await backup.backup_page(page, 0)
        await backup.copy_page(page, handle)
        await backup.drop(handle)
        await backup.fini()

``ttmfs.handles`` is the arithmetic of handles and tagged pointers; ``mount.py`` shows a pool as a filesystem.
"""

from . import handles
from .backup import Backup
from .errors import (
    BackupAbsent,
    BackupEnded,
    BackupExists,
    BackupNotEmpty,
    InvalidArgument,
    NameTooLong,
    NoRoom,
    NotSupported,
    PageAbsent,
    StoreBusy,
    StoreFailed,
    TtmfsError,
)
from .pool import Pool, Room, bytes_avail, open_pool
from .version import __version__

__all__ = [
    "Backup",
    "BackupAbsent",
    "BackupEnded",
    "BackupExists",
    "BackupNotEmpty",
    "InvalidArgument",
    "NameTooLong",
    "NoRoom",
    "NotSupported",
    "PageAbsent",
    "Pool",
    "Room",
    "StoreBusy",
    "StoreFailed",
    "TtmfsError",
    "__version__",
    "bytes_avail",
    "handles",
    "open_pool",
]
