"""``save`` and ``load``: a backup to a sparse file, and back to the same handles.

FILE is the backup's bytes at their places, as ``ttmfs rescue`` and ``store=`` have them, and can be read without ttmfs.
What a sparse file cannot be relied on to carry stands in a text beside it, FILE.ttmfs: the page size, which handles
hold pages (many copying tools make holes of zeros, or zeros of holes), and the checksum of each part of 16 MiB with
data. It is a file, since extended attributes are left behind by most tools and filesystems:

    {"ttmfs": 1, "page_size": 4096, "size": 67108864, "mode": 493, "of": [...]}
    NUMBER PIECES CHECKSUM HANDLES          of each part, in any order: 0 4096 9f86d0... 1-4096
    end PIECES CHECKSUM PAGES               of all; without this line it is not whole

The checksums are those of :mod:`ttmfs.rescue`, whose copies can be loaded too.

Going on. ``save`` writes to hidden files, .FILE.partial and .FILE.partial.ttmfs, and adds a part's line once the part
is written. They get their names when all of it is on the disk, so what is called FILE is whole. Run again, parts with a
line are not copied again if they still have its checksum; everything is, if the backup was changed since (st_mtime).
``load`` keeps no note: a part of a backup that has the checksum it should have is left as it is.

Concurrency: parts are copied by several threads; a part belongs to one. All that is noted, and told, is the main
thread's.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .. import linux
from ..errors import NoRoom
from ..handles import format_ranges, parse_ranges
from ..pages import flat
from ..rescue import (
    BLOCK,
    CHECKSUMS,
    PART,
    PIECE,
    Digest,
    data_runs,
    digests_of,
    line_of,
    partial_name,
    total_of,
    write_all,
)
from .command import Command, CommandError, reason
from .descriptor import file_of
from .mounts import check_backup, check_new
from .terminal import Progress, quoted, size

if TYPE_CHECKING:
    from ..client import Backup

__all__ = ["COMMANDS"]

SIDECAR = ".ttmfs"
VERSION = 1
THREADS = 4
TRIES = 5
SET_MODE = 0o777

Runs = list[tuple[int, int]]
"""Runs of pages, as (first index, index past the last)."""


class _Part(NamedTuple):
    """A part of 16 MiB: which pages it has, and their checksum, if that is known."""

    number: int
    runs: Runs
    sum: Digest | None

    @property
    def pages(self) -> int:
        return sum(past - first for first, past in self.runs)

    @property
    def line(self) -> str:
        assert self.sum
        ranges = format_ranges([(first + 1, past) for first, past in self.runs])
        return f"{self.number} {self.sum.pieces} {self.sum.sha256} {ranges}\n"

    @classmethod
    def parse(cls, line: str) -> _Part:
        number, pieces, digest, ranges = line.split(" ")
        if len(bytes.fromhex(digest)) != 32:
            raise ValueError("no checksum")
        return cls(
            int(number), [(first - 1, last) for first, last in parse_ranges(ranges)], Digest(digest, int(pieces))
        )


@dataclass
class _Text:
    """What stands in FILE.ttmfs."""

    header: dict[str, Any]
    parts: dict[int, _Part] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        return sum(part.pages for part in self.parts.values())

    @property
    def total(self) -> tuple[str, int]:
        """The checksum of all, and the pieces."""
        return total_of({number: part.sum for number, part in self.parts.items() if part.sum})

    @property
    def end(self) -> str:
        """The last line."""
        checksum, pieces = self.total
        return f"end {pieces} {checksum} {self.pages}\n"

    @classmethod
    def read(cls, path: Path, *, whole: bool) -> _Text:
        """OSError if there is none. ValueError if it is not what it should be; unless `whole`, it may end anywhere."""
        first, *lines = path.read_text(encoding="ascii").split("\n")
        text = cls(json.loads(first))
        if not isinstance(text.header, dict) or text.header.get("ttmfs") != VERSION:
            raise ValueError("of another version, or no such text")
        end = ""
        for line in lines[:-1]:  # what has no line end was cut off
            if line.startswith("end "):
                end = line + "\n"
                continue
            part = _Part.parse(line)
            text.parts[part.number] = part  # the last line of a part counts
        if whole:
            if end != text.end:
                raise ValueError("it is not whole")
            if not all(isinstance(text.header.get(key), int) for key in ("page_size", "size", "mode")):
                raise ValueError("its first line lacks something")
        return text


def _by_part(runs: Iterable[tuple[int, int]], page_size: int) -> dict[int, Runs]:
    """Runs of pages, cut at the parts' borders, by part."""
    step, parts = PART // page_size, dict[int, Runs]()
    for first, past in runs:
        while first < past:
            number = first // step
            end = min(past, (number + 1) * step)
            parts.setdefault(number, []).append((first, end))
            first = end
    return parts


def _in_threads(work: Callable[[_Part], _Part | None], parts: Iterable[_Part]) -> Iterator[tuple[_Part, _Part | None]]:
    """What `work` makes of each part, as it is done. At an exception no further part is begun."""
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads:
        waiting: dict[Future[_Part | None], _Part] = {}
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


class _Source:
    """A backup to read from: its own file if that can be had, else ``.image``. Neither tells an absent page from zeros.

    (Backup.copy_pages() does, by looking for every page before and after; here that is done where zeros were read.)
    """

    def __init__(self, backup: Backup, path: str) -> None:
        self._backup = backup
        self._own = file_of(backup)
        self._file = self._own if self._own >= 0 else os.open(f"{path}/.image", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file != self._own:
            os.close(self._file)

    def sum(self, part: _Part, then: Callable[[int, memoryview], object] = lambda *_: None) -> Digest | None:
        """The checksum of a part, each block of which is given to `then`. None if a page of it is no more."""
        page_size, buffer = self._backup.page_size, memoryview(bytearray(BLOCK))

        def blocks() -> Iterator[tuple[int, memoryview]]:
            for first, past in part.runs:
                for start in range(first * page_size, past * page_size, BLOCK):
                    block = buffer[: min(BLOCK, past * page_size - start)]
                    _fill(self._file, block, start)
                    then(start, block)
                    yield start, block

        found = Digest.of(blocks())
        is_full = found.pieces == part.pages * page_size // PIECE  # and so none was read where there is nothing
        return found if is_full or self._has(part) else None

    def _has(self, part: _Part) -> bool:
        if self._own < 0:
            return _by_part(self._backup.runs(), self._backup.page_size).get(part.number) == part.runs
        page_size = self._backup.page_size
        return all(
            linux.is_data(self._own, idx * page_size, page_size)
            for first, past in part.runs
            for idx in range(first, past)
        )


def _fill(file: int, view: memoryview, offset: int) -> None:
    """Fill a buffer from a file, which is as long."""
    while view:
        if not (read := os.preadv(file, [view], offset)):
            raise OSError(errno.EIO, "it has become shorter")
        view, offset = view[read:], offset + read


# --- save ---


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="the backup")
    parser.add_argument("file", metavar="FILE", type=Path, help="the file to make, and FILE.ttmfs beside it")
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE, once the new one is whole")
    parser.add_argument("--verify", action="store_true", help="read FILE back before it gets its name")
    parser.add_argument("--json", action="store_true", help="say in JSON what was saved")


def _save(arguments: argparse.Namespace) -> int:
    check_backup(arguments.backup)
    target: Path = arguments.file
    partial = target.parent / partial_name(target.name)
    note = partial.with_name(partial.name + SIDECAR)
    sidecar = target.with_name(target.name + SIDECAR)
    if target.is_dir():
        raise CommandError(f"{quoted(target)} is a directory: give the name of a file")
    if os.path.lexists(target) and not partial.exists() and _is_whole(note):  # only its last step was left
        os.replace(note, sidecar)
        text = _Text.read(sidecar, whole=True)
        return _told(arguments, text, "saved, but for its name, before this")
    if os.path.lexists(target) and not arguments.force:
        raise CommandError(f"{quoted(target)} is there already; --force replaces it once the new one is whole")
    from ..client import Backup

    with Backup.open(arguments.backup) as backup, _locked(partial) as file:
        saved = _Saving(backup, arguments.backup, file, note)
        try:
            text = saved.run(verify=arguments.verify)
            with open(note, "a", encoding="ascii") as written:
                written.write(text.end)
                written.flush()
                os.fsync(written.fileno())
        except OSError as error:
            raise CommandError(
                f"{reason(error, error.filename or partial)}; what is there stays, and the same command goes on", 1
            ) from None
        os.replace(partial, target)
        os.replace(note, sidecar)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        if saved.changed():
            _told(arguments, text, "saved")
            raise CommandError(
                f"{quoted(arguments.backup)} was changed meanwhile: {quoted(target)} has each page as of when it was "
                "read, not all as of one moment; to have that, let no one write, and save it again with --force",
                1,
            )
    return _told(arguments, text, "saved")


def _is_whole(path: Path) -> bool:
    try:
        _Text.read(path, whole=True)
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[int]:
    """The file that is being made, which no one else makes at the same time."""
    try:
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CommandError(reason(error)) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file), os.stat(partial)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise CommandError(f"{quoted(partial)} is being written by another ttmfs save") from None
        yield file
    finally:
        with contextlib.suppress(OSError):
            if not os.fstat(file).st_size:  # it has not begun
                partial.unlink()
        os.close(file)


class _Saving:
    """A save under way."""

    def __init__(self, backup: Backup, path: str, file: int, note: Path) -> None:
        self._backup = backup
        self._path = path
        self._file = file
        self._note = note
        self._now = self._state()

    def changed(self) -> bool:
        """Whether the backup is not any more what it was at the beginning."""
        return self._state() != self._now

    def _state(self) -> list[int]:
        os.close(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY))  # so that the kernel asks anew
        found = os.stat(self._path)
        return [found.st_ino, found.st_mtime_ns, self._backup.size]

    def run(self, *, verify: bool) -> _Text:
        """Copy what is not copied yet; what is to stand beside the file."""
        backup, found = self._backup, os.stat(self._path)
        header: dict[str, Any] = {"ttmfs": VERSION, "page_size": backup.page_size, "size": backup.size}
        header |= {"mode": stat.S_IMODE(found.st_mode) & SET_MODE, "of": self._now}
        text = _Text(header)
        parts = [_Part(number, runs, None) for number, runs in _by_part(backup.runs(), backup.page_size).items()]
        with _Source(backup, self._path) as source:
            before = self._before(header)
            os.ftruncate(self._file, backup.size)
            total = sum(part.pages for part in parts) * backup.page_size
            with Progress(f"save {quoted(self._path)}", total) as progress:
                self._copy(source, parts, before, text, progress)
                os.fchmod(self._file, stat.S_IMODE(found.st_mode) & 0o666)
                with contextlib.suppress(OSError):  # not root
                    os.fchown(self._file, found.st_uid, found.st_gid)
                progress.note("to the disk")
                os.fsync(self._file)
                if verify:
                    progress.note("reading it back")
                    self._verify(text.parts.values())
        os.utime(self._file, ns=(found.st_atime_ns, found.st_mtime_ns))
        return text

    def _copy(
        self, source: _Source, parts: list[_Part], before: dict[int, _Part], text: _Text, progress: Progress
    ) -> None:
        """Copy the parts that are not there from `before`, and note each."""

        def work(part: _Part) -> _Part | None:
            if (known := before.get(part.number)) and known.runs == part.runs and self._is_sound(known):
                return known
            return self._copied(source, part)

        with open(self._note, "a", encoding="ascii") as note:
            for part, done in _in_threads(work, parts):
                is_old = done is before.get(part.number)
                if done:
                    if not is_old:
                        note.write(done.line)
                        note.flush()
                    text.parts[done.number] = done
                progress.advance(part.pages * self._backup.page_size, skipped=is_old)

    def _verify(self, parts: Iterable[_Part]) -> None:
        for part, done in _in_threads(lambda part: part if self._is_sound(part) else None, parts):
            if not done:
                raise OSError(errno.EIO, f"part {part.number} is not what was written; is the disk sound?")

    def _before(self, header: dict[str, Any]) -> dict[int, _Part]:
        """The parts that were copied before an interruption, if nothing has changed since; else it is begun anew."""
        try:
            text = _Text.read(self._note, whole=False)
        except (OSError, ValueError):
            text = _Text({})
        if text.header == header:
            return text.parts
        if text.header:
            sys.stderr.write("ttmfs save: the backup was changed since the save was interrupted; it begins anew\n")
        os.ftruncate(self._file, 0)
        self._note.write_text(json.dumps(header) + "\n", encoding="ascii")
        return {}

    def _is_sound(self, part: _Part) -> bool:
        """Whether a part of the file has the checksum noted: a machine that failed may have lost some of it."""
        return _is_sound(self._file, part, self._backup.page_size)

    def _copied(self, source: _Source, part: _Part) -> _Part | None:
        """Copy a part. None if by now there is nothing in it."""
        backup = self._backup
        for _ in range(TRIES):
            with contextlib.suppress(OSError):  # a filesystem without: zeros are there then, and the text tells
                linux.punch_hole(self._file, part.number * PART, PART)

            if not part.runs:
                return None
            if found := source.sum(part, lambda start, block: write_all(self._file, block, start)):
                return part._replace(sum=found)
            part = part._replace(runs=_by_part(backup.runs(), backup.page_size).get(part.number, []))
        raise CommandError(f"{quoted(self._path)}: its pages are being dropped all the time; let no one write to it", 1)


def _is_sound(file: int, part: _Part, page_size: int) -> bool:
    """Whether a file has, where the pages of a part should be, what is to be there. OSError if it is too short."""
    buffer = memoryview(bytearray(BLOCK))

    def blocks() -> Iterator[tuple[int, memoryview]]:
        for first, past in part.runs:
            for start in range(first * page_size, past * page_size, BLOCK):
                block = buffer[: min(BLOCK, past * page_size - start)]
                _fill(file, block, start)
                yield start, block

    return Digest.of(blocks()) == part.sum


def _told(arguments: argparse.Namespace, text: _Text, verb: str, **more: object) -> int:
    """Say what was done."""
    checksum, _ = text.total
    pages, count = text.pages, text.pages * text.header["page_size"]
    if arguments.json:
        found = {"backup": arguments.backup, "file": str(arguments.file), "pages": pages, "bytes": count}
        sys.stdout.write(json.dumps({**found, "checksum": checksum, **more}) + "\n")
    else:
        sys.stdout.write(f"{verb}: {pages} pages, {size(count)}, checksum {checksum[:16]}\n")
    return 0


# --- load ---


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="what ttmfs save or rescue made, or any sparse file")
    parser.add_argument("backup", metavar="MNT/NAME", nargs="?", help="the backup; made if there is none")
    parser.add_argument(
        "--into", "--continue", dest="into", action="store_true",
        help="store into a backup that holds pages, over those of the same handles; what it has already stays: "
        "so a load that was interrupted goes on",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read the pages back when all are stored")
    parser.add_argument("--check", action="store_true", help="compare FILE with its checksum, and load nothing")
    parser.add_argument("--json", action="store_true", help="say in JSON what was loaded")


def _load(arguments: argparse.Namespace) -> int:
    if bool(arguments.backup) == arguments.check:
        raise CommandError("--check takes a FILE alone" if arguments.check else "give the backup, MNT/NAME")
    try:
        file = os.open(arguments.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError(reason(error)) from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CommandError(f"{quoted(arguments.file)} is no file")
        text = _beside(arguments.file, file)
        return _checked(arguments, file, text) if arguments.check else _loaded(arguments, file, text)
    finally:
        os.close(file)


def _beside(path: Path, file: int) -> _Text | None:
    """What is known of a file: from FILE.ttmfs; or from the checksums of a rescue, which are checked here."""
    length, name = os.fstat(file).st_size, quoted(path)
    sidecar = path.with_name(path.name + SIDECAR)
    try:
        text = _Text.read(sidecar, whole=True)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{quoted(sidecar)} is damaged ({reason(error)}): without it, {name} can be loaded unchecked"
        ) from None
    else:
        if text.header["size"] != length:
            raise CommandError(f"{name} is damaged: it has {length} bytes, and had {text.header['size']} when saved")
        return text
    if not (line := line_of(path.name, path.parent)):
        return None
    sums = digests_of(file)
    if (*total_of(sums), length) != line:
        raise CommandError(f"{name} is damaged: its checksum is not the one in {quoted(path.parent / CHECKSUMS)}")
    return _Text({"size": length}, {number: _Part(number, [], found) for number, found in sums.items()})


def _checked(arguments: argparse.Namespace, file: int, text: _Text | None) -> int:
    """``--check``."""
    name = quoted(arguments.file)
    if text is None:
        raise CommandError(f"{name} has no checksum beside it: neither {name}{SIDECAR} nor a line of {CHECKSUMS}")
    if "page_size" in text.header:  # a rescue's was checked as a whole
        damaged = [n for n, part in text.parts.items() if not _is_sound(file, part, text.header["page_size"])]
        if damaged:
            raise CommandError(f"{name} is damaged: {len(damaged)} of {len(text.parts)} parts of 16 MiB", 1)
    sys.stdout.write(f"{name}: OK\n" if not arguments.json else json.dumps({"file": name, "ok": True}) + "\n")
    return 0


def _loaded(arguments: argparse.Namespace, file: int, text: _Text | None) -> int:
    name, path = quoted(arguments.file), arguments.backup
    length, made = os.fstat(file).st_size, not os.path.lexists(arguments.backup)
    if not length:
        raise CommandError(f"{name} is empty: no backup spans nothing")
    (check_new if made else check_backup)(path)
    from ..client import Backup

    backup = Backup.create(path, length) if made else Backup.open(path)
    with backup:
        try:
            what = _what_to_load(name, file, text, backup.page_size)
            if not made and not arguments.into and backup.residency().pages:
                raise CommandError(
                    f"{quoted(path)} holds pages: --continue goes on with a load that was interrupted, "
                    "or stores over what is there"
                )
            if backup.size < length:
                backup.resize(length)
        except BaseException:
            if made:
                backup.fini()
            raise
        if text is None:
            sys.stderr.write(f"ttmfs load: {name} has no checksum beside it, so nothing tells whether it is sound\n")
        elif made and "mode" in text.header:
            os.chmod(path, text.header["mode"] & SET_MODE)
        return _Loading(arguments, file, backup, what).run()


def _what_to_load(name: str, file: int, text: _Text | None, page_size: int) -> _Text:
    """The parts of a file, with their pages: as they were saved; of another file, wherever it has data."""
    if text and "page_size" in text.header:
        if text.header["page_size"] != page_size:
            raise CommandError(
                f"{name} holds pages of {size(text.header['page_size'])}, the mount such of {size(page_size)}: "
                "handles would not be the same; use a mount with that page_size="
            )
        return text
    length = os.fstat(file).st_size
    if text and length % page_size:
        raise CommandError(f"{name} does not hold whole pages of {size(page_size)}")
    runs: Runs = []
    for start, end in data_runs(file):
        first, past = start // page_size, -(-min(end, length) // page_size)
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], past
        else:
            runs.append((first, past))
    known = text.parts if text else {}
    parts = {n: _Part(n, runs, known[n].sum if n in known else None) for n, runs in _by_part(runs, page_size).items()}
    return _Text({"size": length, "page_size": page_size}, parts)


class _Loading:
    """A load under way."""

    def __init__(self, arguments: argparse.Namespace, file: int, backup: Backup, text: _Text) -> None:
        self._arguments = arguments
        self._file = file
        self._backup = backup
        self._text = text
        self._end = os.fstat(file).st_size

    def run(self) -> int:
        """Store the parts that are not there yet. The exit status."""
        arguments, text, page_size = self._arguments, self._text, self._backup.page_size
        path, name = quoted(arguments.backup), quoted(arguments.file)
        damaged: list[_Part] = []
        stored = 0
        try:
            with Progress(f"load {path}", text.pages * page_size) as progress:
                for part, done in _in_threads(self._stored, (text.parts[n] for n in sorted(text.parts))):
                    if done is None:
                        damaged.append(part)
                    else:
                        stored += part.pages
                    progress.advance(part.pages * page_size, skipped=done is not part)
                if arguments.verify:
                    progress.note("reading it back")
                    self._verify([part for part in text.parts.values() if part not in damaged])
        except NoRoom as error:
            raise CommandError(
                f"{reason(error, arguments.backup)}: {stored} of {text.pages} pages are stored, each whole. Make room "
                f"(setfattr -n user.ttmfs.size gives the mount more), then ttmfs load --continue {name} {path}", 1
            ) from None  # fmt: skip
        for part in damaged:
            ranges = format_ranges([(first + 1, past) for first, past in part.runs])
            if len(ranges) > 60:
                ranges = f"{part.runs[0][0] + 1} to {part.runs[-1][1]}"
            sys.stderr.write(f"ttmfs load: {name} is damaged: pages of the handles {ranges} were not stored\n")
        if damaged and not stored:
            raise CommandError(f"nothing of {name} is what was saved; {path} is as it was")
        if self._backup.residency().pages < stored:
            raise CommandError(f"{path} has lost pages while they were loaded: others drop them", 1)
        _told(arguments, text, "loaded", damaged=sum(part.pages for part in damaged))
        return 1 if damaged else 0

    def _stored(self, part: _Part) -> _Part | None:
        """Store a part: gives it; another if it was there already; None, and nothing is stored, if it is damaged."""
        import numpy as np

        backup, page_size = self._backup, self._backup.page_size
        if self._arguments.into and part.sum and self._is_there(part):
            return part._replace(runs=[])
        pages = [np.zeros((past - first, page_size), np.uint8) for first, past in part.runs]
        for (first, _), those in zip(part.runs, pages, strict=True):
            start = first * page_size  # the last page may not be whole: then it ends with zeros
            _fill(self._file, flat(those)[: max(0, self._end - start)], start)
        if part.sum:
            data = ((run[0] * page_size, flat(those)) for run, those in zip(part.runs, pages, strict=True))
            if Digest.of(_in_blocks(data)) != part.sum:
                return None
        for (first, past), those in zip(part.runs, pages, strict=True):
            if len(backup.backup_pages(those, first)) < past - first:
                raise NoRoom("no room for more pages")
        return part

    def _is_there(self, part: _Part) -> bool:
        with _Source(self._backup, self._arguments.backup) as source:
            return source.sum(part) == part.sum

    def _verify(self, parts: list[_Part]) -> None:
        for part, done in _in_threads(lambda part: part if not part.sum or self._is_there(part) else None, parts):
            if not done:
                raise CommandError(
                    f"part {part.number} of {quoted(self._arguments.backup)} is not what was stored: does another "
                    "write to it? ttmfs load --continue stores it again", 1
                )  # fmt: skip


def _in_blocks(runs: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    for position, view in runs:
        for start in range(0, len(view), BLOCK):
            yield position + start, view[start : start + BLOCK]


COMMANDS = (
    Command(
        "save",
        "Save a backup to a sparse file FILE, page i at byte i * page_size, and what is to be known of it to\n"
        "FILE.ttmfs: page size, which handles hold pages, checksums. Both get their names when they are whole and on\n"
        "the disk. After an interruption of any kind the same command goes on where it was.\n\n"
        "What is stored or dropped meanwhile may be in FILE or not: each page is as it was at some moment. If the\n"
        "backup was changed, that is said, and the exit status is 1.",
        """\
examples:
  ttmfs save /mnt/ttm/bo7 /var/backups/bo7
  ttmfs save --verify --force /mnt/ttm/bo7 /media/usb/bo7      read back before it replaces the old one
  tar -cSf bo7.tar bo7 bo7.ttmfs                               what to send elsewhere""",
        _add_save,
        _save,
        "interrupted; the same command goes on where it was",
    ),
    Command(
        "load",
        "Load a backup from what ttmfs save or ttmfs rescue made: the same pages, at the same handles. Each part of\n"
        "16 MiB is stored only if it has its checksum; parts that are damaged are told and left out, and the exit\n"
        "status is 1. Another sparse file is loaded as it is: what is data there becomes pages.\n\n"
        "After an interruption of any kind, and if there was no room, --continue goes on.",
        """\
examples:
  ttmfs load /var/backups/bo7 /mnt/ttm/bo7
  ttmfs load --continue /var/backups/bo7 /mnt/ttm/bo7      after an interruption
  ttmfs load --check /var/backups/bo7                      is the file sound?""",
        _add_load,
        _load,
        "interrupted; ttmfs load --continue goes on where it was",
    ),
)
