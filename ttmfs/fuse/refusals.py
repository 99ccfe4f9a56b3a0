"""The reasons of refusals: the last ones, and lines in the log.

A caller gets only an errno. The reason goes to the log: for each kind of refusal at most one line in ten seconds, for
all kinds one a second. ``ttmfs why`` shows the last ones. Ordinary refusals are left out: a name that does not exist, a
page that was dropped. No page contents are shown. Errors quote the names and values that callers chose.

Concurrency: one thread.
"""

import contextlib
import errno
import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

from ..errors import (
    BackupAbsent,
    BackupEnded,
    BackupExists,
    NoData,
    NoSuchAttribute,
    NoSuchName,
    PageAbsent,
    PageDropped,
    StoreFailed,
    TextForgotten,
    TtmfsError,
    WrongParent,
    XattrBufferTooSmall,
)
from ..linux.system_calls import XATTR_SIZE_MAX

__all__ = ["Refusals"]

log = logging.getLogger(__name__)

KEPT = 64
"""Refusals that are kept."""

KIND_SECONDS, LINE_SECONDS = 10.0, 1.0
"""The least time between two lines of the log for one kind (operation and errno), and for any kind."""

LONGEST_REASON = 200
"""Characters of a reason that are kept: a caller's value in it can have 64 KiB."""

ORDINARY = (
    PageAbsent,
    BackupAbsent,
    NoSuchName,
    NoSuchAttribute,
    NoData,
    XattrBufferTooSmall,
    BackupExists,
    BackupEnded,
    PageDropped,
    TextForgotten,
    WrongParent,  # mv(1) copies then
)
LOOKS = frozenset(("lookup", "getattr", "access", "readlink"))
"""Operations that change and open nothing."""


class Refusals:
    """The refusals of one mount. They are lost with the daemon."""

    def __init__(self) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._logged: dict[tuple[str, int], float] = {}  # by kind: when it was logged last
        self._left_out: dict[tuple[str, int], int] = {}  # by kind: how many were not logged since
        self._logged_at = 0.0

    def note(self, operation: str, number: int, error: TtmfsError, caller: Any = None) -> None:
        """Keep a refusal, and log it if its turn has come. `caller` may have uid and pid."""
        if isinstance(error, ORDINARY) or operation in LOOKS:
            return
        uid, pid = getattr(caller, "uid", None), getattr(caller, "pid", None)
        reason, command = str(error)[:LONGEST_REASON], None
        if pid:
            with contextlib.suppress(OSError):  # it has ended, or /proc hides it
                command = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        self._kept.append({
            "time": time.time(), "operation": operation, "errno": errno.errorcode[number], "reason": reason,
            "uid": uid, "pid": pid, "command": command,
        })  # fmt: skip
        if isinstance(error, StoreFailed):  # it is logged as a fault
            return
        kind, now = (operation, number), time.monotonic()
        if now < self._logged.get(kind, 0.0) + KIND_SECONDS or now < self._logged_at + LINE_SECONDS:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._logged[kind] = self._logged_at = now
        who = "" if uid is None else f" for user {uid}, process {pid}"
        left_out = self._left_out.pop(kind, 0)
        more = f" ({left_out} more before this were not logged)" if left_out else ""
        log.info("refused: %s%s: %s: %s%s", operation, who, errno.errorcode[number], reason, more)

    def text(self) -> str:
        """The last refusals as JSON, the newest last; as many as fit into an extended attribute."""
        rows: list[str] = []
        room = XATTR_SIZE_MAX - len("[]")
        for refusal in reversed(self._kept):
            row = json.dumps(refusal)  # ASCII
            room -= len(row) + 1
            if room < 0:
                break
            rows.append(row)
        return f"[{','.join(reversed(rows))}]"
