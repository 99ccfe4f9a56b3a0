"""Writeback of pages that programs have mapped, such as the memory of a virtual machine.

MADV_PAGEOUT takes only pages that no other process has mapped. So the daemon cannot page these out, and the kernel is
asked to do it in the program that has mapped them. A page that several programs have mapped stays in memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...fuse.inodes import backup_of
from ...linux import system_calls
from .users import MAPPED, BackupIdentity, Users, in_a_line, mappings

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["page_out_mappings"]


def page_out_mappings(backup: Backup) -> list[str]:
    """Page out what programs have mapped of a backup. Returns for each program that prevents it the reason."""
    identity = BackupIdentity.of(backup)
    users = [user for user in Users([identity]).of(identity) if user.uses[MAPPED]]
    refused = []
    for user in users:
        try:
            _page_out(user.pid, identity)
        except PermissionError:
            refused.append(f"{user}; its pages stay in memory unless root runs ttmfs writeback")
        except OSError:  # it has ended, so nothing is mapped
            pass
    if len(users) > 1 and not refused and backup.residency().resident:
        refused.append(f"pages stay in memory that several programs have mapped: {in_a_line(users)}")
    return refused


def _page_out(pid: int, backup: BackupIdentity) -> None:
    process = os.pidfd_open(pid)  # before its mappings are read, so that they are those of this process
    try:
        for start, past, device, ino in mappings(pid):
            if (device, backup_of(ino)) == (backup.device, backup_of(backup.ino)):
                system_calls.page_out_in(process, start, past - start)
    finally:
        os.close(process)
