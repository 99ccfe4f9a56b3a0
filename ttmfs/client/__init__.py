"""Backups of a mount, for other processes: the verbs, synchronously, and arrays of pages. It needs no trio."""

from .backup import Backup, Residency
from .page_array import PageArray, shrink

__all__ = ["Backup", "PageArray", "Residency", "shrink"]
