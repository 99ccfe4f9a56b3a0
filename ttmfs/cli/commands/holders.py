"""The processes that keep a mount from being unmounted: by open files, mappings, directories that they are in.

Nothing here touches the mount: the kernel remembers on which device a file lies. Only root sees processes of others.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter

from ...linux import system_calls
from ...linux.mountinfo import Mounted, is_listed
from ..keepers import pids, status_of
from .users import User, mappings

__all__ = ["Holders", "other_namespaces"]

LINKS = {"cwd": "working directory", "root": "root directory", "exe": "running program"}


class Holders:
    """The processes that hold a mount, and how many could not be examined."""

    def __init__(self, mount: Mounted) -> None:
        self._device = mount.st_dev
        self.found: list[User] = []
        self.hidden = 0
        self.holds_this_process = self._is_inside("/proc/self/cwd")
        for pid in pids():
            if pid != os.getpid():
                self._examine(pid)

    def _examine(self, pid: int) -> None:
        uses = Counter[str]()
        try:
            for name, use in LINKS.items():
                uses[use] += self._is_inside(f"/proc/{pid}/{name}")
            for fd in os.listdir(f"/proc/{pid}/fd"):
                uses["open file"] += self._is_inside(f"/proc/{pid}/fd/{fd}")
            uses["mapping"] += sum(mapping.device == self._device for mapping in mappings(pid))
        except PermissionError:
            with contextlib.suppress(OSError):
                self.hidden += "VmSize" in status_of(f"/proc/{pid}")  # kernel threads and zombies have no memory
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            pass
        if uses := +uses:
            self.found.append(User(pid, uses))

    def _is_inside(self, link: str) -> bool:
        """Whether a link in /proc leads into the mount. PermissionError if this user may not know."""
        try:
            return system_calls.device_and_inode(link)[0] == self._device
        except PermissionError:
            raise
        except OSError:  # it was closed, or a kernel thread has none
            return False


def other_namespaces(mount: Mounted) -> list[User]:
    """A process of each other mount namespace that has a copy of the mount, as a container made meanwhile does."""
    found: dict[str, User] = {}
    own = os.readlink("/proc/self/ns/mnt")
    for pid in pids():
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace != own and namespace not in found and is_listed(pid, mount.device):
                found[namespace] = User(pid, Counter({"mount namespace with a copy": 1}))
    return [*found.values()]
