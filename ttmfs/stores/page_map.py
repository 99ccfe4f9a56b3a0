"""Which pages a backup holds, where the filesystem does not tell: in memory, and in a file beside the backup's.

The file has a bit for each page, in groups of GROUP pages; a group of absent pages may be a hole, or past its end. Bit
``i`` of byte ``n`` is the page at index ``8 n + i``.

A change takes two steps, so that the file can be written in a thread: :meth:`PageMap.changed` gives what is to be
written, and :meth:`PageMap.set` changes what is in memory once it is.

Concurrency: one thread. :func:`write` may run in another.
"""

import contextlib
import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["GROUP", "Change", "Doubt", "PageMap", "read", "rewrite", "write"]

GROUP = 4096
"""Pages a group: what is held in memory for a backup with one page. A multiple of 8."""

_ABSENT, _PRESENT = b"0", b"1"


class Change(NamedTuple):
    """Bytes of the file from an offset on."""

    offset: int
    data: bytes


@dataclass
class Doubt:
    """Whether absent pages may have data after a change that succeeded."""

    stays: bool = False


class PageMap:
    """The pages of one backup, by index."""

    def __init__(self, content: bytes = b"", *, clean: bool = True) -> None:
        """`content` is the file's. `clean`: whether absent pages are known to be holes of the backup's file."""
        self.clean = clean
        self.is_sure = True
        """Whether the file says what is in memory. Else it is to be written whole before the next change."""
        self.count = 0
        self._groups: dict[int, bytearray] = {}  # a digit for each page, in groups that hold one
        self._numbers: list[int] = []  # of the groups, sorted
        for number in range(-(-len(content) * 8 // GROUP)):
            packed = content[number * GROUP // 8 : (number + 1) * GROUP // 8]
            if any(packed):
                self._groups[number] = _unpacked(packed)
                self._numbers.append(number)
        self.count = sum(group.count(_PRESENT) for group in self._groups.values())

    @contextlib.contextmanager
    def doubtful(self) -> "Iterator[Doubt]":
        """Wrap a change of the backup's file and its map's. Unless it succeeds, nobody knows what became of them."""
        doubt, before = Doubt(), self.clean
        self.clean = self.is_sure = False
        yield doubt
        self.clean, self.is_sure = before and not doubt.stays, True

    def __contains__(self, idx: int) -> bool:
        group = self._groups.get(idx // GROUP)
        return group is not None and group[idx % GROUP] == _PRESENT[0]

    def next(self, idx: int) -> int | None:
        """The index of the first page from an index on; None if there is none."""
        number, at = divmod(idx, GROUP)
        for key in self._numbers[bisect_left(self._numbers, number) :]:
            if (found := self._groups[key].find(_PRESENT, at if key == number else 0)) >= 0:
                return key * GROUP + found
        return None

    def first_absent(self, first: int, past: int) -> int | None:
        """The first index of a range without a page; None if every page exists."""
        while first < past:
            number, at = divmod(first, GROUP)
            if (group := self._groups.get(number)) is None:
                return first
            if (found := group.find(_ABSENT, at)) >= 0:
                return number * GROUP + found if number * GROUP + found < past else None
            first = (number + 1) * GROUP
        return None

    def runs(self, first: int, past: int) -> Iterator[tuple[int, int]]:
        """The runs of pages between two indices, as (first index, index past the last), ascending."""
        while (start := self.next(first)) is not None and start < past:
            end = self.first_absent(start, past)
            first = past if end is None else end
            yield start, first

    def counted(self, first: int, past: int) -> int:
        """The number of pages between two indices."""
        return sum(end - start for start, end in self.runs(first, past))

    def changed(self, first: int, past: int, *, present: bool) -> list[Change]:
        """What is to be written to the file before, or after, the pages between two indices are set."""
        changes = []
        for number, start, end in self._parts(first, past, present=present):
            group = self._groups.get(number) or bytearray(_ABSENT * GROUP)
            low, high = start // 8 * 8, -(-end // 8) * 8
            digits = bytearray(group[low:high])
            digits[start - low : end - low] = (_PRESENT if present else _ABSENT) * (end - start)
            changes.append(Change((number * GROUP + low) // 8, _packed(digits)))
        return changes

    def set(self, first: int, past: int, *, present: bool) -> None:
        """Have the pages between two indices exist, or not."""
        for number, start, end in self._parts(first, past, present=present):
            if (group := self._groups.get(number)) is None:
                group = self._groups[number] = bytearray(_ABSENT * GROUP)
                insort(self._numbers, number)
            before = group.count(_PRESENT, start, end)
            group[start:end] = (_PRESENT if present else _ABSENT) * (end - start)
            self.count += (end - start if present else 0) - before
            if not present and _PRESENT not in group:
                del self._groups[number]
                self._numbers.remove(number)

    def packed(self) -> dict[int, bytes]:
        """The groups that have a page, as the file has them, by number."""
        return {number: _packed(group) for number, group in self._groups.items()}

    def cut(self, pages: int) -> None:
        """Forget what the file says of pages that the backup is too small for."""
        if self.next(pages) is not None:
            self.set(pages, (self._numbers[-1] + 1) * GROUP, present=False)
            self.is_sure = False

    def _parts(self, first: int, past: int, *, present: bool) -> list[tuple[int, int, int]]:
        """The parts of a range that differ, as (group, first digit, digit past the last)."""
        numbers: Sequence[int] = range(first // GROUP, -(-past // GROUP))
        if not present:  # a range that is dropped can be far longer than the map
            numbers = [number for number in self._numbers if number in numbers]
        parts = []
        for number in numbers:
            start, end = max(0, first - number * GROUP), min(GROUP, past - number * GROUP)
            group = self._groups.get(number)
            if present if group is None else group.find(_ABSENT if present else _PRESENT, start, end) >= 0:
                parts.append((number, start, end))
        return parts


def _packed(digits: bytearray) -> bytes:
    return int(digits[::-1], 2).to_bytes(len(digits) // 8, "little")


def _unpacked(content: bytes) -> bytearray:
    return bytearray(f"{int.from_bytes(content, 'little'):0{GROUP}b}"[::-1].encode())


def read(fd: int) -> bytes:
    """The content of a map's file."""
    size, content = os.fstat(fd).st_size, b""
    while len(content) < size and (part := os.pread(fd, size - len(content), len(content))):
        content += part
    return content


def write(fd: int, changes: Sequence[Change]) -> None:
    """Write changes to a map's file."""
    for offset, data in changes:
        view, position = memoryview(data), offset
        while view:
            done = os.pwrite(fd, view, position)
            view, position = view[done:], position + done


def rewrite(fd: int, groups: dict[int, bytes]) -> None:
    """Write a map's file whole: the groups that have a page, and zeros wherever else the file says something."""
    size = GROUP // 8
    for number in range(max(-(-os.fstat(fd).st_size // size), max(groups, default=-1) + 1)):
        offset, data = number * size, groups.get(number, bytes(size))
        if os.pread(fd, size, offset).ljust(size, b"\0") != data:
            write(fd, [Change(offset, data)])
