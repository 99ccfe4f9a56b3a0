"""What must outlast the daemon beside its pages: one memfd, which a keeper holds. Nothing else of a daemon is kept.

::

    HEADER    4 KiB    JSON, written whole: format, page size, the kernel's FUSE_INIT, ...
    KEYS      1024 rows of 48 bytes    what is counted in the row of the same number of
    VALUES    1024 rows of 2 numbers   a count and a sum
    NOTES     16,384 numbers            a request that is being carried out; 0: none
    PROGRESS  1024 rows of 2 numbers   a request that changes things bit by bit, and how far it got
    WORDS     to the end               what the interpreter wrote when the daemon died of a fault

It is mapped, so that counting and noting are writes to memory: a SIGKILL between any two of them loses nothing. Rows
are only ever added, and found by key, so that a newer version goes on with an older one's. Whatever else changes (the
layout, the header's entries, what a key means) takes the next FORMAT, or tests/store/test_format.py fails.

(Not a file of the store's tmpfs: it would count against size= and nr_inodes=, and lie about in store=DIR.)

Concurrency: one thread.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..errors import NotSupported
from .progress import Progress

__all__ = ["LATEST", "POINTS", "State", "identity"]

FORMAT = 3
"""1 and 2 each stood for several layouts while ttmfs was made, and are refused."""

HEADER = 4096  # one page: written at once, or not at all
ROWS, KEY = 1024, 48
NOTES, LONG = 16384, 1024
_VALUES_AT = HEADER + ROWS * KEY
_NOTES_AT = _VALUES_AT + ROWS * 16
_PROGRESS_AT = _NOTES_AT + NOTES * 8
_WORDS_AT = _PROGRESS_AT + LONG * 16

UNFINISHED_SECONDS = 10.0
"""So long after its start a daemon looks out for what the one before has not finished."""

POINTS = 0xF
"""The bits of a note that count what speaks against the request. The others are its identity."""

FAULT, KILL = 2, 1
"""What a death speaks against the request that was begun last, if it was a fault of the daemon's, or the kernel killed
it for want of memory; and what it speaks against the others under way then, and a kill by whomever against the one that
the loop was at. Requests that waited are no reason for that, and may take longer than from one kill to the next."""

LATEST = NOTES - 1
"""The note that is none, but the slot of the request that was begun last, unless slot 0 holds one."""


class State:
    """The state of one mount. Owns its descriptor, until :meth:`close`."""

    def __init__(self, fd: int) -> None:
        """Map a state that :meth:`new` made, in whichever process. Raises NotSupported if it is none of this format."""
        self.fd = fd
        try:
            self.header: dict[str, Any] = json.loads(os.pread(fd, HEADER, 0).rstrip(b"\0"))
            found = self.header["format"]
        except (ValueError, KeyError, TypeError, OSError):
            raise NotSupported(
                "what is kept of the mount is no state of ttmfs; its pages are safe with the keeper"
            ) from None
        if found != FORMAT:
            raise NotSupported(
                f"the running mount was left by ttmfs {self.header.get('version')} in format {found}, and this version "
                f"knows format {FORMAT} alone; its pages are safe with the keeper: install that version again to go on"
            )
        if os.fstat(fd).st_size < _WORDS_AT:
            raise NotSupported("what is kept of the mount is cut short; its pages are safe with the keeper")
        self._map = mmap.mmap(fd, _WORDS_AT)
        whole = memoryview(self._map)
        self._keys = whole[HEADER:_VALUES_AT]
        self.values = whole[_VALUES_AT:_NOTES_AT].cast("Q")
        self.notes = whole[_NOTES_AT:_PROGRESS_AT].cast("Q")
        self._progress = whole[_PROGRESS_AT:_WORDS_AT].cast("Q")
        left = [(self._progress[2 * row], row) for row in range(LONG)]
        self._unfinished = {request: row for request, row in left if request}  # of the daemon before
        self._unfinished_until = time.monotonic() + UNFINISHED_SECONDS
        self._free = [row for request, row in left if not request]
        self._rows: dict[str, int] = {}
        for row in range(ROWS - 1):
            key = bytes(self._keys[row * KEY : (row + 1) * KEY])
            if not key[0]:
                break
            self._rows.setdefault(key.rstrip(b"\0").decode(errors="replace"), row)
        self._words: int | None = None
        self._faulted = os.fstat(fd).st_size > _WORDS_AT  # now: the words may be taken before anyone asks for suspects

    @classmethod
    def new(cls, **header: Any) -> "State":
        """A new one. The header is JSON of less than 4 KiB."""
        fd = os.memfd_create("ttmfs-state")
        try:
            os.ftruncate(fd, _WORDS_AT)
            _write_header(fd, {"format": FORMAT, **header})
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Give up the descriptor and the mapping."""
        if self.fd >= 0:
            if self._words is not None:
                faulthandler.disable()
                os.close(self._words)
                self._words = None
            for view in self._keys, self.values, self.notes, self._progress:
                view.release()
            self._map.close()  # it has a descriptor of its own
            os.close(self.fd)
        self.fd = -1

    def update(self, **header: Any) -> None:
        """Change entries of the header, all at once."""
        changed = self.header | header
        _write_header(self.fd, changed)
        self.header = changed

    # --- counting ---

    def at(self, key: str) -> int:
        """Where in `values` the count of a key is; its sum follows. A key has at most 48 bytes."""
        if (row := self._rows.get(key)) is None:
            if (row := len(self._rows)) >= ROWS - 1:
                return 2 * (ROWS - 1)  # the last is for all that there is no room for
            text = key.encode().ljust(KEY, b"\0")[:KEY]
            start = row * KEY
            self._keys[start + 1 : start + KEY] = text[1:]
            self._keys[start] = text[0]  # last: with it the row exists
            self._rows[key] = row
        return 2 * row

    def get(self, key: str) -> int:
        """The count of a key; 0 if it was never set."""
        return self.values[2 * self._rows[key]] if key in self._rows else 0

    def set(self, key: str, count: int) -> None:
        """Set the count of a key."""
        self.values[self.at(key)] = count

    def keys(self, kind: str) -> list[str]:
        """The keys that begin with a word, without it, sorted."""
        return sorted(key.removeprefix(kind + " ") for key in self._rows if key.startswith(kind + " "))

    # --- what is carried out bit by bit ---

    @contextlib.contextmanager
    def progress(self, *request: object) -> "Iterator[Progress]":
        """Around a change that others are served in the middle of: a daemon that repeats it goes on where it stopped.

        `request` are numbers and texts that tell it from all others under way. Where there are more than there is room
        for, one begins from the start.
        """
        if self._unfinished and time.monotonic() > self._unfinished_until:  # whoever asked has gone
            self.forget_unfinished()
        key = zlib.crc32(repr(request).encode()) | 1 << 32
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
        except Exception:  # which is its answer
            self._release(row)
            raise
        self._release(row)  # but not if it was cancelled, since another daemon takes over: that carries it out again

    def forget_unfinished(self) -> None:
        """Nothing is carried out again that a daemon before has begun: whoever asks for the like asks anew."""
        for row in self._unfinished.values():
            self._release(row)
        self._unfinished.clear()

    def _release(self, row: int) -> None:
        self._progress[2 * row] = 0
        self._free.append(row)

    # --- what a daemon died of ---

    def suspects(self) -> dict[int, int]:
        """The points against the requests that were being carried out when the last daemon died, by identity.

        Forgets them: who is killed while it starts has not carried them out again.
        """
        killed = _killed_for_memory()
        guilty = self._faulted or killed > self.get("memory kills")
        self.set("memory kills", killed)
        found: Counter[int] = Counter()
        latest = 0 if self.notes[0] else self.notes[LATEST]
        for slot, note in enumerate(self.notes[:LATEST]):
            if note:
                more = (FAULT if slot == latest else KILL) if guilty else KILL if slot == 0 else 0
                found[note & ~POINTS] = max(found[note & ~POINTS], min(POINTS, (note & POINTS) + more))
                self.notes[slot] = 0
        return {request: points for request, points in found.items() if points}

    def take_last_words(self) -> str:
        """What the interpreter said when the last daemon died of a fault, in one line; empty if it did not."""
        text = os.pread(self.fd, 1 << 16, _WORDS_AT).decode(errors="replace")
        os.ftruncate(self.fd, _WORDS_AT)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        here = next((number for number, line in enumerate(lines) if line.startswith("Current thread ")), 0)
        frames = [line for line in lines[here:] if line.startswith("File ")]  # idle threads may come before it
        return " < ".join([*lines[:1], *frames[:5]])

    def keep_last_words(self) -> None:
        """Have the interpreter write here if this daemon dies of a fault."""
        self._words = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        faulthandler.enable(self._words)


def identity(operation: int, first: object, second: object) -> int:
    """A number that is the same for the same request in every daemon; its lowest bits are free for points.

    `operation` is what is asked, `first` and `second` are its first arguments, which count if they are numbers or
    bytes. (Python's own hash of bytes differs from one process to the next, that of numbers does not.)
    """
    if not isinstance(second, int):
        second = zlib.crc32(second) if isinstance(second, bytes) else 0
    return hash((operation, first, second)) & 0xFFFFFFFFFFFFFFF0 or POINTS + 1


def _write_header(fd: int, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    if len(text) > HEADER:
        raise NotSupported(f"what is kept of the mount does not fit into {HEADER} bytes")
    os.pwrite(fd, text.ljust(HEADER, b"\0"), 0)


def _killed_for_memory() -> int:
    """How many processes of this machine the kernel has killed for want of memory, whosoever."""
    with open("/proc/vmstat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
