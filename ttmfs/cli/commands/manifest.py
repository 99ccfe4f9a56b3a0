"""The format of a saved copy, and the loop that copies chunks of pages between a backup, a file and a stream.

A copy is a list of chunks. A chunk is the pages in up to 4 MiB of the backup. Lines of text describe a copy::

    ttmfs 3 page_size=4096 size=67108864 mode=755
    1-1024 9f86d0...                 for each chunk: the handles of its pages, and the SHA-256 of their bytes
    1030,1040-1041 60303a...
    end 5feceb...                    the SHA-256 of all lines before this one

``ttmfs save MNT/a FILE`` writes each page to its offset in FILE, a sparse file, and the lines to FILE.ttmfs. The lines
name the pages because copying tools turn zeros into holes and holes into zeros. ``ttmfs save MNT/a -`` writes a stream:
the same lines, with the pages of each chunk after its line.

Concurrency: threads read, hash and write chunks. The main thread reads and writes the lines and the stream, in order.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from ...client.backup import Backup
from ...errors import PageAbsent
from ...handles import format_ranges, parse_ranges
from ...model.arguments import runs as runs_of
from ..rescue import PIECE, write_all
from .command import CommandError
from .terminal import ProgressBar
from .terminal import size as size_text

__all__ = [
    "STREAM", "SUFFIX", "BackupPages", "Chunk", "FilePages", "Header", "Item", "Pages", "Reader", "Writer", "chunks_of",
    "copy", "report",
]  # fmt: skip

STREAM = Path("-")
SUFFIX = ".ttmfs"
FORMAT = 3
CHUNK = 4 << 20  # bytes; at least the largest page
LONGEST_LINE = 1 << 16  # bytes; the line of a chunk with 512 runs has up to 11 KiB
THREADS = 4

Pages = NDArray[np.uint8]  # a row for each page


class Chunk(NamedTuple):
    """Runs of pages, as (first index, index past the last), and the SHA-256 of their bytes, or "" if it is unknown."""

    runs: tuple[tuple[int, int], ...]
    sha256: str = ""

    @property
    def pages(self) -> int:
        """The number of pages."""
        return sum(past - first for first, past in self.runs)

    @property
    def handles(self) -> str:
        """The handles of the pages, as ranges."""
        return format_ranges([(first + 1, past) for first, past in self.runs])

    def hashed(self, pages: Pages) -> "Chunk":
        """The chunk with the SHA-256 of `pages`."""
        return self._replace(sha256=hashlib.sha256(pages.reshape(-1).data).hexdigest())

    def rows(self, pages: Pages) -> Iterator[tuple[int, Pages]]:
        """The first index of each run, and the rows of `pages` that belong to the run."""
        done = 0
        for first, past in self.runs:
            yield first, pages[done : done + past - first]
            done += past - first


Item = tuple[Chunk, Pages | None]  # the pages, if they came from a stream


def chunks_of(runs: Iterable[tuple[int, int]], page_size: int) -> list[Item]:
    """Divide runs of pages into chunks."""
    step = CHUNK // page_size

    def divided() -> Iterator[tuple[int, int]]:
        for first, past in runs:
            yield from itertools.pairwise([first, *range((first // step + 1) * step, past, step), past])

    return [(Chunk(tuple(group)), None) for _, group in itertools.groupby(divided(), lambda run: run[0] // step)]


class Header(NamedTuple):
    """The first line of a copy: sizes in bytes, and the permission bits of the backup."""

    page_size: int
    size: int
    mode: int


class Writer:
    """Makes the lines of a copy, and writes them with the pages into a stream, if there is one."""

    def __init__(self, header: Header, stream: BinaryIO | None = None) -> None:
        self.header, self.items, self.lines, self.checksum = header, list[Item](), list[bytes](), ""
        self._stream = stream
        self._put(b"ttmfs %d page_size=%d size=%d mode=%03o\n" % (FORMAT, *header))

    def add(self, chunk: Chunk, pages: Pages | None) -> None:
        """Add a chunk, unless it has no pages any more."""
        if not chunk.runs:
            return
        self.items.append((chunk, None))
        self._put(f"{chunk.handles} {chunk.sha256}\n".encode())
        if self._stream and pages is not None:
            self._stream.write(pages.reshape(-1).data)

    def end(self) -> None:
        """Add the last line. Its checksum covers all pages, since the lines contain their SHA-256."""
        self.checksum = _checksum(self.lines)
        self._put(f"end {self.checksum}\n".encode())
        if self._stream:
            self._stream.flush()

    def _put(self, line: bytes) -> None:
        self.lines.append(line)
        if self._stream:
            self._stream.write(line)


class Reader:
    """Reads a copy: the lines, and the pages from a stream. CommandError if :class:`Writer` did not write it."""

    def __init__(self, file: BinaryIO, name: str, *, is_stream: bool) -> None:
        self._file, self._name, self._is_stream = file, name, is_stream
        self._lines: list[bytes] = []
        header = rb"ttmfs (\d{1,9}) page_size=(\d{1,9}) size=(\d{1,18}) mode=([0-7]{3})\n"
        if not (match := re.fullmatch(header, self._line())):
            raise self._damaged("it does not begin as a saved copy does")
        number, page_size, size = map(int, match.groups()[:3])
        if number != FORMAT:
            raise self._damaged(f"it has format {number}, and this version of ttmfs reads format {FORMAT}")
        if not page_size or page_size % PIECE or CHUNK % page_size or not size or size % page_size:
            raise self._damaged("no backup has such sizes")
        self.header = Header(page_size, size, int(match[4], 8))

    def items(self) -> Iterator[Item]:
        """Read each chunk."""
        end, (page_size, size, _) = 0, self.header
        while not (line := self._line()).startswith(b"end "):
            handles, _, sha256 = line[:-1].decode("ascii", "replace").partition(" ")
            edges: list[int] = []
            with contextlib.suppress(ValueError):
                edges = [edge for first, last in parse_ranges(handles) for edge in (first - 1, last)]
            chunk = Chunk(tuple(zip(edges[::2], edges[1::2], strict=True)), sha256)
            edges = [end, *edges, size // page_size]
            if edges != sorted(edges) or not 0 < chunk.pages <= CHUNK // page_size:
                raise self._damaged(f"it has an impossible line, {line[:50]!r}")
            yield chunk, self._pages(chunk) if self._is_stream else None
            end = edges[-2]
        if line != f"end {_checksum(self._lines[:-1])}\n".encode() or self._file.read(1):
            raise self._damaged("it does not end with the checksum of its lines")

    def _pages(self, chunk: Chunk) -> Pages:
        pages = np.empty((chunk.pages, self.header.page_size), np.uint8)
        if self._file.readinto(pages.reshape(-1)) < pages.nbytes:  # type: ignore[attr-defined]
            raise self._damaged("it is cut short")
        return pages

    def _line(self) -> bytes:
        line = self._file.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise self._damaged("it is cut short")
        self._lines.append(line)
        return line

    def _damaged(self, why: str) -> CommandError:
        return CommandError(f"{self._name} is damaged: {why}")


def _checksum(lines: list[bytes]) -> str:
    return hashlib.sha256(b"".join(lines)).hexdigest()


class FilePages:
    """The pages in a sparse file, page i at byte i * page_size. Methods raise OSError."""

    def __init__(self, file: int, page_size: int, *, resume: bool = False) -> None:
        self._file, self._page_size, self._resume = file, page_size, resume

    def read(self, chunk: Chunk) -> tuple[Chunk, Pages]:
        """Read the pages of a chunk; gives it with their SHA-256. Bytes after the end of the file are zeros."""
        pages = np.zeros((chunk.pages, self._page_size), np.uint8)
        for first, rows in chunk.rows(pages):
            view, offset = rows.reshape(-1).data, first * self._page_size
            while view and (count := os.preadv(self._file, [view], offset)):
                view, offset = view[count:], offset + count
        return chunk.hashed(pages), pages

    def write(self, chunk: Chunk, pages: Pages) -> None:
        """Write the pages of a chunk; to resume, only if the file does not have them."""
        if self._resume and self.read(chunk)[0] == chunk:
            return
        for first, rows in chunk.rows(pages):
            write_all(self._file, rows.reshape(-1).data, first * self._page_size)


class BackupPages:
    """The pages of a backup. Methods raise TtmfsError."""

    def __init__(self, backup: Backup) -> None:
        self._backup = backup

    def read(self, chunk: Chunk) -> tuple[Chunk, Pages]:
        """Read the pages of a chunk that exist; gives what exists of the chunk, with the SHA-256."""
        handles = np.concatenate([np.arange(first + 1, past + 1, dtype=np.uint64) for first, past in chunk.runs])
        pages = np.empty((len(handles), self._backup.page_size), np.uint8)
        try:
            self._backup.copy_pages(pages, handles)
        except PageAbsent:
            existing: list[int] = []
            for handle in handles.tolist():
                with contextlib.suppress(PageAbsent):
                    self._backup.copy_page(pages[len(existing)], handle)
                    existing.append(handle)
            chunk, pages = Chunk(tuple(runs_of(np.array(existing, np.uint64)))), pages[: len(existing)]
        return chunk.hashed(pages), pages

    def write(self, chunk: Chunk, pages: Pages) -> None:
        """Store the pages of a chunk."""
        for first, rows in chunk.rows(pages):
            done = 0
            while done < len(rows):  # where room ends, the next call raises the reason
                done += len(self._backup.backup_pages(rows[done:], first + done))


def copy(
    label: str,
    items: Iterable[Item],
    read: Callable[[Chunk], tuple[Chunk, Pages]],
    writer: Writer,
    write: Callable[[Chunk, Pages], None] | None = None,
    has: Callable[[Chunk], bool] | None = None,
) -> None:
    """Read the pages of each chunk, verify its SHA-256, if known, write the pages, and add the chunk to a copy.

    Skips a chunk that the target `has`. Raises CommandError at a damaged chunk, and does not write it.
    """

    def copied(chunk: Chunk, pages: Pages | None) -> Item:
        if has and has(chunk):
            return chunk, None
        found, pages = read(chunk) if pages is None else (chunk.hashed(pages), pages)
        if chunk.sha256 and found != chunk:
            raise CommandError(
                f"the copy is damaged: the pages of handles {chunk.handles} are not those that were saved"
            )
        if write:
            write(found, pages)
        return found, pages

    page_size, total, _ = writer.header
    if isinstance(items, list):
        total = sum(chunk.pages for chunk, _ in items) * page_size
    with ProgressBar(label, total) as progress, contextlib.closing(_in_threads(copied, items)) as results:
        for chunk, pages in results:
            writer.add(chunk, pages)
            progress.advance(chunk.pages * page_size)
    writer.end()


def _in_threads(work: Callable[[Chunk, Pages | None], Item], items: Iterable[Item]) -> Generator[Item, None, None]:
    """Do work on each item in threads. Yield the results in the order of the items."""
    waiting = deque[Future[Item]]()
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads:
        try:
            for item in itertools.chain(items, itertools.repeat(None, 2 * THREADS)):
                if item:
                    waiting.append(threads.submit(work, *item))
                if waiting and (not item or len(waiting) == 2 * THREADS):
                    yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def report(arguments: argparse.Namespace, verb: str, writer: Writer, output: TextIO) -> None:
    """Say what was copied."""
    pages = sum(chunk.pages for chunk, _ in writer.items)
    count = pages * writer.header.page_size
    text = f"{verb}: {pages} pages, {size_text(count)}, checksum {writer.checksum[:16]}"
    if arguments.json:
        found = {"backup": arguments.backup, "file": str(arguments.file), "pages": pages, "bytes": count}
        text = json.dumps({**found, "checksum": writer.checksum})
    output.write(text + "\n")
