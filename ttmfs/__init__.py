"""ttmfs: page backups as files, and as a Python API.

A backup holds the pages that a device's driver evicted, in kernel shmem, by index. In a trio program::

    async with ttmfs.open_pool(size=1 << 30) as pool:
        backup = await pool.create("a", size=64 << 20)
        handle = await backup.backup_page(page, 0)
        await backup.copy_page(page, handle)
        await backup.drop(handle)
        await backup.fini()

``ttmfs.handles`` computes handles and tagged pointers. ``ttmfs mount`` mounts a pool as a filesystem.

This module imports ``Backup`` and ``Pool`` at their first use, so that the rescue program and the keeper need no trio.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import handles
from .errors import (
    BackupAbsent,
    BackupClosed,
    BackupEnded,
    BackupExists,
    BackupNotEmpty,
    InvalidArgument,
    NameTooLong,
    NoRoom,
    NotPermitted,
    NotSupported,
    OutOfBounds,
    OverQuota,
    PageAbsent,
    StoreBusy,
    StoreFailed,
    TtmfsError,
)
from .version import __version__

if TYPE_CHECKING:
    from .model.backup import Backup
    from .model.pool import Pool, Room, bytes_avail, open_pool

__all__ = [
    "Backup",
    "BackupAbsent",
    "BackupClosed",
    "BackupEnded",
    "BackupExists",
    "BackupNotEmpty",
    "InvalidArgument",
    "NameTooLong",
    "NoRoom",
    "NotPermitted",
    "NotSupported",
    "OutOfBounds",
    "OverQuota",
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

_MODULES = {"Backup": "backup", "Pool": "pool", "Room": "pool", "bytes_avail": "pool", "open_pool": "pool"}
"""Maps each name that is imported at its first use to its module in ``ttmfs.model``."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".model.{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
