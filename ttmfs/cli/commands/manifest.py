"""A saved backup: what ``save`` writes and ``load`` reads.

FILE is the backup's bytes at their places, as ``ttmfs rescue`` and ``store=`` have them, and can be read without ttmfs.
What a sparse file cannot be relied on to carry stands in a manifest beside it, FILE.ttmfs: page size, mode, which
handles hold pages (many copying tools make holes of zeros, or zeros of holes), and the digest of each part of 16 MiB
with pages. It is a file, since extended attributes are left behind by most tools and filesystems:

    ttmfs 2 page_size=4096 size=67108864 mode=755
    NUMBER PIECES SHA256 HANDLES            of each part, ascending: 0 4096 9f86d0... 1-4096
    end SHA256                              of every byte before this line

The digests of parts are those of :mod:`ttmfs.cli.rescue`, whose copies can be loaded too.

Concurrency: parts are worked at by several threads; a part belongs to one. What became of them is the main thread's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from ...errors import StoreFailed
from ...handles import format_ranges, parse_ranges
from ...linux import system_calls
from ..rescue import BLOCK, PART, PIECE, Digest, total_of
from .terminal import size

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from ...client.backup import Backup

__all__ = [
    "MANIFEST",
    "Manifest",
    "Part",
    "Runs",
    "Source",
    "blocks_of",
    "by_part",
    "fill",
    "in_threads",
    "longest_manifest",
    "manifest_of",
    "matches",
    "report",
]

MANIFEST = ".ttmfs"
VERSION = 2
MOST_MANIFEST = 1 << 30  # bytes that are read of a file that says it is one
THREADS = 4

Runs = list[tuple[int, int]]
"""Runs of pages, as (first index, index past the last)."""

T = TypeVar("T")


# --- the manifest ---


class Part(NamedTuple):
    """A part of 16 MiB: which pages it has, and their digest, if that is known."""

    number: int
    runs: Runs
    digest: Digest | None

    @property
    def pages(self) -> int:
        """How many."""
        return sum(past - first for first, past in self.runs)

    @property
    def ranges(self) -> str:
        """Their handles."""
        return format_ranges([(first + 1, past) for first, past in self.runs])

    @property
    def line(self) -> str:
        """Its line of the manifest, once its digest is known."""
        assert self.digest
        return f"{self.number} {self.digest.pieces} {self.digest.sha256} {self.ranges}\n"

    @classmethod
    def parse(cls, line: str, page_size: int, length: int) -> Part:
        """ValueError if it is none of a backup that spans `length` bytes."""
        number, pieces, sha256, ranges = line.split(" ")
        if not re.fullmatch(r"\d{1,9} \d{1,9} [0-9a-f]{64}", f"{number} {pieces} {sha256}"):
            raise ValueError("a line of it does not begin as that of a part")
        part = cls(
            int(number), [(first - 1, last) for first, last in parse_ranges(ranges)], Digest(sha256, int(pieces))
        )
        step = PART // page_size
        borders = part.number * step, min((part.number + 1) * step, length // page_size)
        edges = [borders[0], *itertools.chain(*part.runs), borders[1]]
        if edges != sorted(edges):
            raise ValueError(f"part {part.number} has handles that do not ascend, or do not lie in it")
        return part


@dataclass(frozen=True)
class Manifest:
    """What FILE.ttmfs tells."""

    page_size: int
    size: int
    mode: int
    parts: dict[int, Part]

    @property
    def pages(self) -> int:
        """How many all parts have."""
        return sum(part.pages for part in self.parts.values())

    @property
    def checksum(self) -> str:
        """That of the whole, as ``ttmfs rescue`` reckons it."""
        return total_of({number: part.digest for number, part in self.parts.items() if part.digest})[0]

    @property
    def text(self) -> str:
        """What :meth:`parse` reads."""
        head = f"ttmfs {VERSION} page_size={self.page_size} size={self.size} mode={self.mode:03o}\n"
        lines = head + "".join(self.parts[number].line for number in sorted(self.parts))
        return f"{lines}end {hashlib.sha256(lines.encode()).hexdigest()}\n"

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """ValueError if it is not what was written."""
        if not data.startswith(b"ttmfs %d " % VERSION):
            raise ValueError("of another version, or no manifest")
        lines, _, end = data.rpartition(b"end ")
        if end != hashlib.sha256(lines).hexdigest().encode() + b"\n":
            raise ValueError("it is not whole, or was changed")
        first, *rest = lines.decode("ascii").split("\n")[:-1]
        if not (match := re.fullmatch(r"ttmfs \d+ page_size=(\d{1,9}) size=(\d{1,18}) mode=([0-7]{3})", first)):
            raise ValueError("its first line lacks something")
        page_size, length, mode = int(match[1]), int(match[2]), int(match[3], 8)
        if not page_size or page_size % PIECE or PART % page_size or not length or length % page_size:
            raise ValueError("no backup has such sizes")
        parts = [Part.parse(line, page_size, length) for line in rest]
        if any(after.number <= before.number for before, after in itertools.pairwise(parts)):
            raise ValueError("its parts do not ascend")
        return cls(page_size, length, mode, {part.number: part for part in parts})


def manifest_of(path: Path) -> Path:
    """Where the manifest of a file lies."""
    return path.with_name(path.name + MANIFEST)


def longest_manifest(length: int) -> int:
    """How many bytes the manifest of a file of `length` bytes has at most: where every other page is there."""
    ranges = PART // PIECE // 2 * len("1073741824,")
    return min(MOST_MANIFEST, 1024 + -(-length // PART) * (128 + ranges))


def by_part(runs: Iterable[tuple[int, int]], page_size: int) -> dict[int, Runs]:
    """Runs of pages, cut at the parts' borders, by part."""
    step, parts = PART // page_size, dict[int, Runs]()
    for first, past in runs:
        while first < past:
            number = first // step
            end = min(past, (number + 1) * step)
            parts.setdefault(number, []).append((first, end))
            first = end
    return parts


# --- reading parts ---


def in_threads(work: Callable[[Part], T], parts: Iterable[Part]) -> Iterator[tuple[Part, T]]:
    """What `work` makes of each part, as it is done. At an exception no further part is begun."""
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads:
        waiting: dict[Future[T], Part] = {}
        todo = iter(parts)
        try:
            while True:
                while len(waiting) < 2 * THREADS and (part := next(todo, None)):
                    waiting[threads.submit(work, part)] = part
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(done), done.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def blocks_of(file: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
    """What a file has in ranges of bytes, with positions, each in the memory of the one before."""
    buffer = memoryview(mmap.mmap(-1, BLOCK))  # begins at a page of memory, so that no request ends within a page
    for start, end in ranges:
        for position in range(start, end, BLOCK):
            block = buffer[: min(BLOCK, end - position)]
            fill(file, block, position)
            yield position, block


def fill(file: int, view: memoryview, offset: int) -> None:
    """Fill a buffer from a file, which is as long."""
    while view:
        if not (read := os.preadv(file, [view], offset)):
            raise OSError(errno.EIO, "it has become shorter")
        view, offset = view[read:], offset + read


def _bytes_of(part: Part, page_size: int) -> Iterator[tuple[int, int]]:
    """The ranges of bytes of its pages."""
    return ((first * page_size, past * page_size) for first, past in part.runs)


def matches(file: int, part: Part, page_size: int) -> bool:
    """Whether a file can be read where the pages of a part should be, and has there what it should have."""
    with contextlib.suppress(OSError):
        return Digest.of(blocks_of(file, _bytes_of(part, page_size))) == part.digest
    return False


class Source:
    """A backup to read from: its own file if that can be had, else ``.image``. Neither tells an absent page from zeros.

    Where zeros were read that is looked for. (As Backup.copy_pages() does, which would need memory for each part.) What
    fails raises StoreFailed.
    """

    def __init__(self, backup: Backup, length: int) -> None:
        """Its first `length` bytes: it may be made larger meanwhile."""
        self._backup = backup
        self._limit = length // backup.page_size
        self._own = backup.fileno() if backup.is_native else -1
        with _failing():
            self._file = self._own if self._own >= 0 else backup.open_file(".image", os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file != self._own:
            os.close(self._file)

    def parts(self) -> dict[int, Runs]:
        """The runs of its pages, by part."""
        runs = ((first, min(past, self._limit)) for first, past in self._backup.runs() if first < self._limit)
        return by_part(runs, self._backup.page_size)

    def blocks(self, part: Part) -> Iterator[tuple[int, memoryview]]:
        """What the pages of a part hold."""
        blocks = blocks_of(self._file, _bytes_of(part, self._backup.page_size))
        while True:
            with _failing():
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def digest(self, part: Part) -> Digest | None:
        """That of a part. None if a page of it is no more."""
        return self.confirmed(part, Digest.of(self.blocks(part)))

    def confirmed(self, part: Part, digest: Digest) -> Digest | None:
        """The digest of what was read of a part, unless a page of it is no more, and was read as zeros."""
        is_full = digest.pieces == part.pages * self._backup.page_size // PIECE  # so nothing was read of a hole
        return digest if is_full or self._has(part) else None

    def _has(self, part: Part) -> bool:
        if self._own < 0:
            return self.parts().get(part.number) == part.runs
        page_size = self._backup.page_size
        with _failing():
            return all(
                system_calls.is_data(self._own, idx * page_size, page_size)
                for first, past in part.runs
                for idx in range(first, past)
            )


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """A backup that cannot be read, as an error of its own: others are of files."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"reading pages: {error.strerror}") from error


def report(arguments: argparse.Namespace, manifest: Manifest, verb: str, **more: object) -> None:
    """Say what was done."""
    pages, count = manifest.pages, manifest.pages * manifest.page_size
    if arguments.json:
        found = {"backup": arguments.backup, "file": str(arguments.file), "pages": pages, "bytes": count}
        sys.stdout.write(json.dumps({**found, "checksum": manifest.checksum, **more}) + "\n")
    else:
        sys.stdout.write(f"{verb}: {pages} pages, {size(count)}, checksum {manifest.checksum[:16]}\n")
