"""ttmfs: page backups as files, and as a Python API.

A backup keeps pages that had to leave a device, in kernel shmem, by index. In a trio program::

    async with ttmfs.open_pool(size=1 << 30) as pool:
        backup = await pool.create("a", size=64 << 20)
        handle = await backup.backup_page(page, 0)
        await backup.copy_page(page, handle)
        await backup.drop(handle)
        await backup.fini()

``ttmfs.handles`` is the arithmetic of handles and tagged pointers; ``mount.py`` shows a pool as a filesystem.

What is named here is imported when it is first used: who rescues pages, or restarts a daemon, needs nothing of it, and
may do without trio.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from .model.backup import Backup
    from .model.pool import Pool, Room, bytes_avail, open_pool
    from .version import __version__

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

_ELSEWHERE = {
    "Backup": "model.backup",
    "Pool": "model.pool",
    "Room": "model.pool",
    "__version__": "version",
    "bytes_avail": "model.pool",
    "open_pool": "model.pool",
}
"""Which module has a name; the others are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "handles":
        return importlib.import_module(".handles", __name__)
    found = getattr(importlib.import_module("." + _ELSEWHERE.get(name, "errors"), __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
