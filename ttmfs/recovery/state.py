"""What outlasts the daemon besides the pages: one memfd, which the keeper holds.

::

    RECORD      4 KiB               a Record and its format, as JSON, written whole
    NOTES       16,384 numbers      one request in flight each; 0: none
    PROGRESS    1024 rows of 2      a request that is carried out in steps, and how far it got
    CACHED      256 numbers         inodes whose bytes the kernel may keep in its page cache
    BACKING     16,384 numbers      the backing files that the kernel has, see ttmfs.fuse.backing_files
    ANSWER      512 bytes           the answer to the change that was carried out last, behind its request's number
    LAST WORDS  to the end          what the interpreter wrote when the daemon died of a fault

A request is known by the number that the kernel gave it, which is the same when the kernel sends it again.

The memfd is mapped: a note is one write to memory, and a SIGKILL between two of them loses nothing. Any change of the
layout, of the record's fields or of what a field means takes the next FORMAT, or tests/store/test_format.py fails.

A file of the store's tmpfs would not do: it would count against size= and nr_inodes=, and be visible in store=DIR.

Concurrency: one thread.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import NotSupported
from ..linux.fuse_protocol import RESENT
from .progress import Progress

__all__ = ["BACKING", "LATEST", "POINTS", "POINT_BITS", "Record", "State"]

FORMAT = 6
"""Formats 1 to 5 belong to versions before the first release. They are refused."""

RECORD = 4096  # one page: a SIGKILL leaves the old record or the new one
NOTES, STEPPED, CACHED, BACKING, ANSWER = 16384, 1024, 256, 16384, 512
_NOTES_AT = RECORD
_PROGRESS_AT = _NOTES_AT + NOTES * 8
_CACHED_AT = _PROGRESS_AT + STEPPED * 16
_BACKING_AT = _CACHED_AT + CACHED * 8
_ANSWER_AT = _BACKING_AT + BACKING * 8
_LAST_WORDS_AT = _ANSWER_AT + ANSWER

_ANSWERED = struct.Struct("=QQ")
"""What stands before the noted answer: its request's number, and its length in bytes."""

UNFINISHED_SECONDS = 10.0
"""How long after its start a daemon expects the kernel to repeat what the previous daemon left unfinished."""

POINT_BITS = 4
POINTS = (1 << POINT_BITS) - 1
"""The bits of a note that hold the request's score. The request's number stands above them."""

FAULT, KILL = 2, 1
"""Points that a death adds to a request's score. A fault of the daemon or an OOM kill adds FAULT to the request that
began last, and KILL to the others in flight. Any other SIGKILL adds KILL to the request that held the loop: requests
that only waited are not to blame, and may take longer than the time between two kills."""

LATEST = NOTES - 1
"""The last note is no request. It holds the slot of the request that began last, unless slot 0 is in use."""


@dataclass(frozen=True)
class Record:
    """What the next daemon must know of a mount, besides the options and the descriptors."""

    version: str  # of the daemon that mounted
    page_size: int
    backup_size: int
    temporary: str | None = None  # the directory to remove at the end
    init: str = ""  # the kernel's FUSE_INIT, in hexadecimal digits
    device: str | None = None
    size: int = 0  # the budget of store=DIR, if it was changed; else 0
    unsynced: tuple[int, ...] = ()  # the ids of backups whose fsync failed
    restarts: int = 0  # how many daemons took over
    oom_kills: int = 0  # of the whole machine, when the last daemon started
    log_level: str = ""  # if it was changed while the mount served


class State:
    """The state of one mount. It owns its descriptor until :meth:`close`."""

    def __init__(self, fd: int) -> None:
        """Map a state that :meth:`new` made, in this process or another. Raises NotSupported for any other format."""
        self.fd = fd
        self.record = _read_record(fd)
        if os.fstat(fd).st_size < _LAST_WORDS_AT:
            raise NotSupported("the mount's state is cut short; its pages are safe with the keeper")
        self._map = mmap.mmap(fd, _LAST_WORDS_AT)
        whole = memoryview(self._map)
        self.notes = whole[_NOTES_AT:_PROGRESS_AT].cast("Q")
        self._progress = whole[_PROGRESS_AT:_CACHED_AT].cast("Q")
        self.cached = whole[_CACHED_AT:_BACKING_AT].cast("Q")
        self.backing = whole[_BACKING_AT:_ANSWER_AT].cast("Q")
        self.answer = whole[_ANSWER_AT:_LAST_WORDS_AT]
        self._answered = self.answer[: _ANSWERED.size].cast("Q")
        rows = [(self._progress[2 * row], row) for row in range(STEPPED)]
        self._unfinished = {request: row for request, row in rows if request}  # of the previous daemon
        self._unfinished_until = time.monotonic() + UNFINISHED_SECONDS
        self._free = [row for request, row in rows if not request]
        self._last_words: int | None = None
        self._faulted = os.fstat(fd).st_size > _LAST_WORDS_AT  # now: take_last_words() may run before suspects()

    @classmethod
    def new(cls, record: Record) -> "State":
        """Make a new state."""
        fd = os.memfd_create("ttmfs-state")
        try:
            os.ftruncate(fd, _LAST_WORDS_AT)
            _write_record(fd, record)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the descriptor and the mapping."""
        if self.fd >= 0:
            if self._last_words is not None:
                faulthandler.disable()
                os.close(self._last_words)
                self._last_words = None
            for view in self.notes, self._progress, self.cached, self.backing, self._answered, self.answer:
                view.release()
            self._map.close()  # it has a descriptor of its own
            os.close(self.fd)
        self.fd = -1

    def update(self, **changes: Any) -> None:
        """Change fields of the record, all at once. Raises NotSupported if the record no longer fits."""
        changed = replace(self.record, **changes)
        _write_record(self.fd, changed)
        self.record = changed

    def begin_connection(self) -> None:
        """Forget all that belongs to an earlier connection: on a new one the kernel's numbers begin anew."""
        self.forget_unfinished()
        self.notes[:] = memoryview(bytes(NOTES * 8)).cast("Q")
        self.cached[:] = memoryview(bytes(CACHED * 8)).cast("Q")
        self.backing[:] = memoryview(bytes(BACKING * 8)).cast("Q")
        self.answer[:] = bytes(ANSWER)

    # --- answers ---

    def note_answer(self, request: int, answer: bytes) -> None:
        """Note what a change is answered, before the answer is sent. At most ANSWER - 16 bytes."""
        answered = self._answered  # the request's number and the length, each written by one store
        answered[0] = 0  # while the rest is of neither answer
        answered[1] = len(answer)
        self.answer[_ANSWERED.size : _ANSWERED.size + len(answer)] = answer
        answered[0] = request

    def noted_answer(self) -> dict[int, bytes]:
        """The answer that was noted last, by its request's number. Its sender may have died before it sent it."""
        request, length = _ANSWERED.unpack_from(self.answer)
        return {request: bytes(self.answer[_ANSWERED.size : _ANSWERED.size + length])} if request else {}

    # --- requests that are carried out in steps ---

    @contextlib.contextmanager
    def progress(self, unique: int) -> "Iterator[Progress]":
        """Note how far a change has got. The daemon serves other requests while it makes the change.

        `unique` is the request's number. A daemon that repeats the request continues where the previous one stopped. A
        request for which there is no free row begins at the start.
        """
        if self._unfinished and time.monotonic() > self._unfinished_until:  # nobody waits for them any more
            self.forget_unfinished()
        key = unique & ~RESENT
        if key in self._unfinished:
            row = self._unfinished.pop(key)
        elif self._free:
            row = self._free.pop()
            self._progress[2 * row + 1] = 0
            self._progress[2 * row] = key
        else:
            yield Progress()
            return
        try:
            yield Progress(self._progress, 2 * row + 1)
        except Exception:  # the caller gets it as the answer
            self._release(row)
            raise
        self._release(row)  # but not after a cancellation: the next daemon carries the request out

    def forget_unfinished(self) -> None:
        """Forget what the previous daemon left unfinished: its callers got errors."""
        for row in self._unfinished.values():
            self._release(row)
        self._unfinished.clear()

    def _release(self, row: int) -> None:
        self._progress[2 * row] = 0
        self._free.append(row)

    # --- what a daemon died of ---

    def suspects(self) -> dict[int, int]:
        """The scores of the requests that were in flight when the previous daemon died, by their numbers.

        This clears the notes: a daemon that is killed while it starts has carried out none of them.
        """
        oom_kills = _oom_kills()
        guilty = self._faulted or oom_kills > self.record.oom_kills
        self.update(oom_kills=oom_kills)
        found = dict[int, int]()
        latest = 0 if self.notes[0] else self.notes[LATEST]
        for slot, note in enumerate(self.notes[:LATEST]):
            if note:
                more = (FAULT if slot == latest else KILL) if guilty else KILL if slot == 0 else 0
                found[note >> POINT_BITS] = min(POINTS, (note & POINTS) + more)
                self.notes[slot] = 0
        return {request: points for request, points in found.items() if points}

    def take_last_words(self) -> str:
        """What the interpreter wrote when the previous daemon died of a fault, in one line; else nothing."""
        text = os.pread(self.fd, 1 << 16, _LAST_WORDS_AT).decode(errors="replace")
        os.ftruncate(self.fd, _LAST_WORDS_AT)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        here = next((number for number, line in enumerate(lines) if line.startswith("Current thread ")), 0)
        frames = [line for line in lines[here:] if line.startswith("File ")]  # idle threads may come before it
        return " < ".join([*lines[:1], *frames[:5]])

    def keep_last_words(self) -> None:
        """Let the interpreter write here if this daemon dies of a fault."""
        self._last_words = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        faulthandler.enable(self._last_words)


def _read_record(fd: int) -> Record:
    try:
        fields = json.loads(os.pread(fd, RECORD, 0).rstrip(b"\0"))
        found, version = fields.pop("format"), fields.get("version")
        if found == FORMAT:
            return Record(**fields | {"unsynced": tuple(fields["unsynced"])})
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        raise NotSupported("the mount's state was not made by ttmfs; its pages are safe with the keeper") from None
    raise NotSupported(
        f"ttmfs {version} left the running mount in format {found}, and this version knows format {FORMAT} alone; its "
        "pages are safe with the keeper: install that version again to continue"
    )


def _write_record(fd: int, record: Record) -> None:
    text = json.dumps({"format": FORMAT, **asdict(record)}).encode()
    if len(text) > RECORD:
        raise NotSupported(f"the mount's record does not fit into {RECORD} bytes")
    os.pwrite(fd, text.ljust(RECORD, b"\0"), 0)


def _oom_kills() -> int:
    """How many processes the kernel of this machine has killed for want of memory."""
    with open("/proc/vmstat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
