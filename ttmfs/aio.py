"""Backups of a mount for programs on an event loop, asyncio's or trio's: see ``ttmfs.client.aio``."""

from .client.aio import Backup, PageArray

__all__ = ["Backup", "PageArray"]
