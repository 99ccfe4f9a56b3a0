"""``save`` and ``load``: a backup to a sparse file, and back to the same handles.

FILE is the backup's bytes at their places, as ``ttmfs rescue`` and ``store=`` have them, and can be read without ttmfs.
What a sparse file cannot be relied on to carry stands in a manifest beside it, FILE.ttmfs: page size, mode, which
handles hold pages (many copying tools make holes of zeros, or zeros of holes), and the digest of each part of 16 MiB
with pages. It is a file, since extended attributes are left behind by most tools and filesystems:

    ttmfs 2 page_size=4096 size=67108864 mode=755
    NUMBER PIECES SHA256 HANDLES            of each part, ascending: 0 4096 9f86d0... 1-4096
    end SHA256                              of every byte before this line

The digests of parts are those of :mod:`ttmfs.rescue`, whose copies can be loaded too.

Going on. ``save`` writes to a hidden file, .FILE.partial. Run again, it compares each part of it with the backup and
copies those that differ. There is no journal, which could be torn, or tell of another backup, or of this one as it was.
When all is on the disk the manifest gets its name, then FILE. Interrupted in between, FILE is not what the manifest
tells, which ``load`` finds, and the same command ends it. ``load`` keeps no journal either: a part of a backup that has
the digest it should have is left as it is.

Concurrency: parts are copied by several threads; a part belongs to one. What became of them is the main thread's.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from .. import linux
from ..errors import NoRoom, StoreFailed, TtmfsError
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

MANIFEST = ".ttmfs"
VERSION = 2
THREADS = 4
TRIES = 5
PRIVATE = 0o700
"""The mode of a backup until all of it is loaded."""

Runs = list[tuple[int, int]]
"""Runs of pages, as (first index, index past the last)."""

T = TypeVar("T")


# --- the manifest ---


class _Part(NamedTuple):
    """A part of 16 MiB: which pages it has, and their digest, if that is known."""

    number: int
    runs: Runs
    digest: Digest | None

    @property
    def pages(self) -> int:
        return sum(past - first for first, past in self.runs)

    @property
    def ranges(self) -> str:
        """Their handles."""
        return format_ranges([(first + 1, past) for first, past in self.runs])

    @property
    def line(self) -> str:
        assert self.digest
        return f"{self.number} {self.digest.pieces} {self.digest.sha256} {self.ranges}\n"

    @classmethod
    def parse(cls, line: str, page_size: int, length: int) -> _Part:
        """ValueError if it is none of a backup that spans `length` bytes."""
        number, pieces, sha256, ranges = line.split(" ")
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
class _Manifest:
    """What FILE.ttmfs tells."""

    page_size: int
    size: int
    mode: int
    parts: dict[int, _Part]

    @property
    def pages(self) -> int:
        return sum(part.pages for part in self.parts.values())

    @property
    def checksum(self) -> str:
        """That of the whole, as ``ttmfs rescue`` reckons it."""
        return total_of({number: part.digest for number, part in self.parts.items() if part.digest})[0]

    @property
    def text(self) -> str:
        head = f"ttmfs {VERSION} page_size={self.page_size} size={self.size} mode={self.mode:03o}\n"
        lines = head + "".join(self.parts[number].line for number in sorted(self.parts))
        return f"{lines}end {hashlib.sha256(lines.encode()).hexdigest()}\n"

    @classmethod
    def parse(cls, data: bytes) -> _Manifest:
        """ValueError if it is not what was written."""
        if not data.startswith(b"ttmfs %d " % VERSION):
            raise ValueError("of another version, or no manifest")
        lines, _, end = data.rpartition(b"end ")
        if end != hashlib.sha256(lines).hexdigest().encode() + b"\n":
            raise ValueError("it is not whole, or was changed")
        first, *rest = lines.decode("ascii").split("\n")[:-1]
        if not (match := re.fullmatch(r"ttmfs \d+ page_size=(\d+) size=(\d+) mode=([0-7]{3})", first)):
            raise ValueError("its first line lacks something")
        page_size, length, mode = int(match[1]), int(match[2]), int(match[3], 8)
        if not page_size or page_size % PIECE or PART % page_size or not length or length % page_size:
            raise ValueError("no backup has such sizes")
        parts = [_Part.parse(line, page_size, length) for line in rest]
        if any(after.number <= before.number for before, after in itertools.pairwise(parts)):
            raise ValueError("its parts do not ascend")
        return cls(page_size, length, mode, {part.number: part for part in parts})


def _manifest_of(path: Path) -> Path:
    return path.with_name(path.name + MANIFEST)


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


# --- reading parts ---


def _in_threads(work: Callable[[_Part], T], parts: Iterable[_Part]) -> Iterator[tuple[_Part, T]]:
    """What `work` makes of each part, as it is done. At an exception no further part is begun."""
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads:
        waiting: dict[Future[T], _Part] = {}
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


def _blocks(file: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
    """What a file has in ranges of bytes, with positions, each in the memory of the one before."""
    buffer = memoryview(bytearray(BLOCK))
    for start, end in ranges:
        for position in range(start, end, BLOCK):
            block = buffer[: min(BLOCK, end - position)]
            _fill(file, block, position)
            yield position, block


def _fill(file: int, view: memoryview, offset: int) -> None:
    """Fill a buffer from a file, which is as long."""
    while view:
        if not (read := os.preadv(file, [view], offset)):
            raise OSError(errno.EIO, "it has become shorter")
        view, offset = view[read:], offset + read


def _bytes_of(part: _Part, page_size: int) -> Iterator[tuple[int, int]]:
    """The ranges of bytes of its pages."""
    return ((first * page_size, past * page_size) for first, past in part.runs)


def _is_sound(file: int, part: _Part, page_size: int) -> bool:
    """Whether a file can be read where the pages of a part should be, and has there what it should have."""
    with contextlib.suppress(OSError):
        return Digest.of(_blocks(file, _bytes_of(part, page_size))) == part.digest
    return False


class _Source:
    """A backup to read from: its own file if that can be had, else ``.image``. Neither tells an absent page from zeros.

    Where zeros were read that is looked for. (As Backup.copy_pages() does, which would need memory for each part.) What
    fails raises StoreFailed.
    """

    def __init__(self, backup: Backup, length: int) -> None:
        """Its first `length` bytes: it may be made larger meanwhile."""
        self._backup = backup
        self._limit = length // backup.page_size
        self._own = file_of(backup)
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
        return _by_part(runs, self._backup.page_size)

    def blocks(self, part: _Part) -> Iterator[tuple[int, memoryview]]:
        """What the pages of a part hold."""
        blocks = _blocks(self._file, _bytes_of(part, self._backup.page_size))
        while True:
            with _failing():
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def digest(self, part: _Part) -> Digest | None:
        """That of a part. None if a page of it is no more."""
        return self.confirmed(part, Digest.of(self.blocks(part)))

    def confirmed(self, part: _Part, digest: Digest) -> Digest | None:
        """The digest of what was read of a part, unless a page of it is no more, and was read as zeros."""
        is_full = (
            digest.pieces == part.pages * self._backup.page_size // PIECE
        )  # so none was read where there is nothing
        return digest if is_full or self._has(part) else None

    def _has(self, part: _Part) -> bool:
        if self._own < 0:
            return self.parts().get(part.number) == part.runs
        page_size = self._backup.page_size
        with _failing():
            return all(
                linux.is_data(self._own, idx * page_size, page_size)
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


def _report(arguments: argparse.Namespace, manifest: _Manifest, verb: str, **more: object) -> None:
    """Say what was done."""
    pages, count = manifest.pages, manifest.pages * manifest.page_size
    if arguments.json:
        found = {"backup": arguments.backup, "file": str(arguments.file), "pages": pages, "bytes": count}
        sys.stdout.write(json.dumps({**found, "checksum": manifest.checksum, **more}) + "\n")
    else:
        sys.stdout.write(f"{verb}: {pages} pages, {size(count)}, checksum {manifest.checksum[:16]}\n")


# --- save ---


def _file_name(text: str) -> Path:
    if text == "-" or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file, which it must be: a pipe cannot be sparse")
    return Path(text)


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="the backup")
    parser.add_argument("file", metavar="FILE", type=_file_name, help="the file to make, and FILE.ttmfs beside it")
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE, once the new one is whole")
    parser.add_argument("--verify", action="store_true", help="read FILE back before it gets its name")
    parser.add_argument("--json", action="store_true", help="say in JSON what was saved")


def _save(arguments: argparse.Namespace) -> int:
    check_backup(arguments.backup)
    target: Path = arguments.file
    for path in target, _manifest_of(target):
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode):  # a file in the place of a device would be hard to find
                what = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link"}.get(stat.S_IFMT(mode), "a device or pipe")
                raise CommandError(f"{quoted(path)} is {what}: give the name of a file")
    from ..client import Backup

    with Backup.open(arguments.backup) as backup, _partial_of(target) as partial:
        if (taken := partial.taken()) and not arguments.force:
            raise CommandError(f"{quoted(taken)} is there already; --force replaces it once the new one is whole")
        saving = _Saving(backup, arguments.backup, partial.file)
        try:
            manifest = saving.run(verify=arguments.verify)
            partial.publish(manifest, saving.file_mode())
        except (TtmfsError, OSError) as error:
            why = reason(error, arguments.backup if isinstance(error, TtmfsError) else partial.path_of(error))
            if not os.fstat(partial.file).st_size:
                raise CommandError(why) from None
            raise CommandError(f"{why}; what is there stays, and the same command goes on", 1) from None
        has_changed = saving.has_changed()
    _report(arguments, manifest, "saved")
    if has_changed:
        raise CommandError(
            f"{quoted(arguments.backup)} was changed meanwhile: {quoted(target)} has each page as of when it was "
            "read, not all as of one moment; to have that, let no one write, and save it again with --force",
            1,
        )
    return 0


@dataclass(frozen=True)
class _Partial:
    """FILE while it is made: its descriptor, and the directory, held open, in which it has a name of its own."""

    target: Path
    path: Path
    directory: int
    file: int

    def path_of(self, error: OSError) -> Path:
        """Which file an error is of."""
        return self.path.with_name(error.filename) if isinstance(error.filename, str) else self.path

    def taken(self) -> Path | None:
        """What would be replaced. A manifest without FILE is nobody's if an interrupted save may have left it."""
        names = [self.target] if os.fstat(self.file).st_size else [self.target, _manifest_of(self.target)]
        return next((path for path in names if self._stat(path.name)), None)

    def is_in_place(self) -> bool:
        """Whether its name is still that of the file that is open."""
        found = self._stat(self.path.name)
        return found is not None and os.path.samestat(found, os.fstat(self.file))

    def publish(self, manifest: _Manifest, mode: int) -> None:
        """Give the file and its manifest their names, once both are on the disk."""
        if not self.is_in_place():
            raise OSError(errno.ENOENT, "it was taken away meanwhile")
        written = self._written(manifest, mode)
        # The manifest first: interrupted in between, the next save finds all of the file there, and ends what was left.
        self._rename(written, _manifest_of(self.target).name)
        self._rename(self.path.name, self.target.name)
        _let_in(self.file, mode)
        os.fsync(self.directory)

    def _written(self, manifest: _Manifest, mode: int) -> str:
        """Write the manifest; under which name."""
        name = self.path.name + MANIFEST
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=self.directory), "w", encoding="ascii") as file:
            file.write(manifest.text)
            file.flush()
            _let_in(file.fileno(), mode)
            os.fsync(file.fileno())
        return name

    def _rename(self, old: str, new: str) -> None:
        os.replace(old, new, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return None


def _let_in(file: int, mode: int) -> None:
    with contextlib.suppress(PermissionError):  # a filesystem without modes
        os.fchmod(file, mode)


@contextlib.contextmanager
def _partial_of(target: Path) -> Iterator[_Partial]:
    """The file that is being made, which no one else makes at the same time."""
    with contextlib.ExitStack() as stack:
        path = target.parent / partial_name(target.name)
        try:
            directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CommandError(reason(error, target.parent)) from None
        stack.callback(os.close, directory)
        partial = _Partial(target, path, directory, _open_partial(path, directory))
        stack.callback(os.close, partial.file)
        try:
            fcntl.flock(partial.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not partial.is_in_place():  # the other is through, and it was FILE that was locked
                raise BlockingIOError
        except BlockingIOError:
            raise CommandError(f"{quoted(partial.path)} is being written by another ttmfs save") from None
        try:
            yield partial
        finally:
            if not os.fstat(partial.file).st_size and partial.is_in_place():  # it has not begun
                os.unlink(partial.path.name, dir_fd=directory)


def _open_partial(path: Path, directory: int) -> int:
    """Make the file, or open what an earlier save has left. Whoever may write to the directory may have put it there.

    So no link is followed, and nobody else may be able to write to it, or to open it under another name.
    """
    refused = CommandError(
        f"{quoted(path)} is in the way, and no ttmfs save of yours has left it: see whose it is, and remove it"
    )
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with contextlib.suppress(FileExistsError):
            return os.open(path.name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        file = os.open(path.name, flags, dir_fd=directory)
    except OSError as error:
        raise refused if error.errno == errno.ELOOP else CommandError(reason(error, path)) from None
    found = os.fstat(file)
    is_sole = found.st_nlink == 1 and not found.st_mode & 0o022
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or not is_sole:
        os.close(file)
        raise refused
    return file


class _Saving:
    """A save under way."""

    def __init__(self, backup: Backup, path: str, file: int) -> None:
        self._backup = backup
        self._path = path
        self._file = file
        self._found = self._stat()
        self._size = backup.size

    def has_changed(self) -> bool:
        """Whether the backup is not any more what it was at the beginning."""
        try:
            found, length = self._stat(), self._backup.size
        except (TtmfsError, OSError):  # it was ended
            return True
        before = self._found
        return (found.st_ino, found.st_mtime_ns, length) != (before.st_ino, before.st_mtime_ns, self._size)

    def _stat(self) -> os.stat_result:
        os.close(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY))  # so that the kernel asks anew
        return os.stat(self._path)

    def file_mode(self) -> int:
        """The file's: it is the caller's, and lets in others as the backup does; a group only if it is the same."""
        group = 0o060 if os.fstat(self._file).st_gid == self._found.st_gid else 0
        return 0o600 | self._found.st_mode & (0o006 | group)

    def run(self, *, verify: bool) -> _Manifest:
        """Make the file what the backup is, and see that it is on the disk."""
        backup = self._backup
        with _Source(backup, self._size) as source:
            parts = [_Part(number, runs, None) for number, runs in source.parts().items()]
            self._prepare({part.number for part in parts})
            total = sum(part.pages for part in parts) * backup.page_size
            with Progress(f"save {quoted(self._path)}", total) as progress:
                copied = self._copy(source, parts, progress)
                os.utime(self._file, ns=(self._found.st_atime_ns, self._found.st_mtime_ns))
                progress.note("to the disk")
                os.fsync(self._file)
                if verify:
                    progress.note("reading it back")
                    self._verify(copied.values())
        return _Manifest(backup.page_size, self._size, self._found.st_mode & 0o777, copied)

    def _prepare(self, numbers: set[int]) -> None:
        """Take away what an earlier save has left in parts without pages."""
        os.ftruncate(self._file, self._size)
        for number in _by_part(((start // PIECE, end // PIECE) for start, end in data_runs(self._file)), PIECE):
            if number not in numbers and self._digest(number).pieces:
                self._clear(number)

    def _copy(self, source: _Source, parts: list[_Part], progress: Progress) -> dict[int, _Part]:
        copied: dict[int, _Part] = {}
        for part, (done, was_there) in _in_threads(lambda part: self._copied(source, part), parts):
            if done:
                copied[done.number] = done
            progress.advance(part.pages * self._backup.page_size, skipped=was_there)
        return copied

    def _copied(self, source: _Source, part: _Part) -> tuple[_Part | None, bool]:
        """Copy a part, None if by now there is nothing in it; and whether it was there already."""
        there = self._digest(part.number)
        if there.pieces and source.digest(part) == there:
            return part._replace(digest=there), True
        is_clear = not there.pieces
        for _ in range(TRIES):
            if not is_clear:
                self._clear(part.number)
            if not part.runs:
                return None, False
            if digest := source.confirmed(part, Digest.of(self._written(source.blocks(part)))):
                return part._replace(digest=digest), False
            part, is_clear = part._replace(runs=source.parts().get(part.number, [])), False
        raise CommandError(f"{quoted(self._path)}: its pages are being dropped all the time; let no one write to it", 1)

    def _written(self, blocks: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
        for position, block in blocks:
            write_all(self._file, block, position)
            yield position, block

    def _digest(self, number: int) -> Digest:
        """That of all that the file has in a part."""
        start = number * PART
        return Digest.of(_blocks(self._file, data_runs(self._file, start, min(start + PART, self._size))))

    def _clear(self, number: int) -> None:
        start, end = number * PART, min((number + 1) * PART, self._size)
        try:
            linux.punch_hole(self._file, start, end - start)
        except OSError:  # a filesystem without
            for position in range(start, end, BLOCK):
                write_all(self._file, bytes(min(BLOCK, end - position)), position)

    def _verify(self, parts: Iterable[_Part]) -> None:
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        for part, is_sound in _in_threads(lambda part: _is_sound(self._file, part, self._backup.page_size), parts):
            if not is_sound:
                raise OSError(errno.EIO, f"part {part.number} is not what was written; is the disk sound?")


# --- load ---


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="what ttmfs save or rescue made, or any sparse file")
    parser.add_argument("backup", metavar="MNT/NAME", nargs="?", help="the backup; made if there is none")
    parser.add_argument(
        "--continue", dest="goes_on", action="store_true",
        help="go on with a load that was interrupted, or had no room: what is there already stays",
    )  # fmt: skip
    parser.add_argument(
        "--into", action="store_true",
        help="store into a backup that holds other pages, or is another user's; its mode stays",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read the pages back when all are stored")
    parser.add_argument("--check", action="store_true", help="compare FILE with its checksum, and load nothing")
    parser.add_argument("--json", action="store_true", help="say in JSON what was loaded")


def _load(arguments: argparse.Namespace) -> int:
    if bool(arguments.backup) == arguments.check:
        raise CommandError("--check takes a FILE alone" if arguments.check else "give the backup, MNT/NAME")
    with contextlib.ExitStack() as stack:
        try:
            file = _open(arguments.file)
        except OSError as error:
            raise CommandError(reason(error, arguments.file)) from None
        stack.callback(os.close, file)
        known = _known(arguments.file, file)
        return _check(arguments, file, known) if arguments.check else _loaded(arguments, file, known)


def _open(path: Path) -> int:
    """Open a file to read. OSError if it is none, at which nothing waits."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no file")
    return file


def _known(path: Path, file: int) -> _Manifest | dict[int, Digest] | None:
    """What is known of a file: its manifest; or the digests of a rescue, which are compared here; or nothing."""
    length, name = os.fstat(file).st_size, quoted(path)
    try:
        manifest = _read_manifest(_manifest_of(path), os.fstat(file).st_uid)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{quoted(_manifest_of(path))} is damaged ({reason(error)}): without it, {name} can be loaded unchecked"
        ) from None
    else:
        if manifest.size != length:
            raise CommandError(f"{name} is damaged: it has {length} bytes, and had {manifest.size} when saved")
        return manifest
    if not (line := line_of(path.name, path.parent)):
        return None
    digests = digests_of(file)
    if (*total_of(digests), length) != line:
        raise CommandError(f"{name} is damaged: its checksum is not the one in {quoted(path.parent / CHECKSUMS)}")
    return digests


def _read_manifest(path: Path, owner: int) -> _Manifest:
    """The manifest of a file of `owner`. OSError and ValueError if there is none, or none that can be believed."""
    with open(_open(path), "rb") as file:
        whose = os.fstat(file.fileno()).st_uid
        if not _is_trusted(whose) and whose != owner:
            raise CommandError(f"{quoted(path)} is another user's than the file that it is about: see who put it there")
        manifest = _Manifest.parse(file.read())
    return manifest if _is_trusted(whose) else replace(manifest, mode=PRIVATE)


def _is_trusted(uid: int) -> bool:
    """Whether a file of theirs may say whom to let in."""
    return uid in (0, os.geteuid())


def _check(arguments: argparse.Namespace, file: int, known: _Manifest | dict[int, Digest] | None) -> int:
    """``--check``."""
    name = quoted(arguments.file)
    if known is None:
        raise CommandError(f"{name} has no checksum beside it: neither {name}{MANIFEST} nor a line of {CHECKSUMS}")
    if isinstance(known, _Manifest):  # a rescue's was compared as a whole
        parts, page_size = known.parts.values(), known.page_size
        sound = [is_sound for _, is_sound in _in_threads(lambda part: _is_sound(file, part, page_size), parts)]
        if not all(sound):
            raise CommandError(f"{name} is damaged: {sound.count(False)} of {len(sound)} parts of 16 MiB", 1)
    found = json.dumps({"file": str(arguments.file), "ok": True}) if arguments.json else f"{name}: OK"
    sys.stdout.write(found + "\n")
    return 0


def _loaded(arguments: argparse.Namespace, file: int, known: _Manifest | dict[int, Digest] | None) -> int:
    name, path = quoted(arguments.file), arguments.backup
    length, is_new = os.fstat(file).st_size, not os.path.lexists(arguments.backup)
    if not length:
        raise CommandError(f"{name} is empty: no backup spans nothing")
    (check_new if is_new else check_backup)(path)
    from ..client import Backup

    with Backup.create(path, length, mode=PRIVATE) if is_new else Backup.open(path) as backup:
        try:
            manifest = _manifest_to_load(name, file, known, backup.page_size)
            if known is None:
                sys.stderr.write(f"ttmfs load: {name} has no checksum beside it: nothing tells whether it is sound\n")
            return _Loading(arguments, file, backup, manifest, is_new=is_new).run()
        except BaseException:
            if is_new:
                _end_if_empty(backup)
            raise


def _end_if_empty(backup: Backup) -> None:
    with contextlib.suppress(TtmfsError, OSError):  # what is in the way of that was in the way before
        if not backup.residency().pages:
            backup.fini()


def _manifest_to_load(name: str, file: int, known: _Manifest | dict[int, Digest] | None, page_size: int) -> _Manifest:
    """The manifest of a file: its own; or of what has none, wherever it has data."""
    if isinstance(known, _Manifest):
        if known.page_size != page_size:
            raise CommandError(
                f"{name} holds pages of {size(known.page_size)}, the mount such of {size(page_size)}: "
                "handles would not be the same; use a mount with that page_size="
            )
        return known
    found = os.fstat(file)
    if known and found.st_size % page_size:
        raise CommandError(f"{name} does not hold whole pages of {size(page_size)}")
    runs: Runs = []
    for start, end in data_runs(file):
        first, past = start // page_size, -(-min(end, found.st_size) // page_size)
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], past
        else:
            runs.append((first, past))
    digests = known or {}
    parts = {number: _Part(number, runs, digests.get(number)) for number, runs in _by_part(runs, page_size).items()}
    mode = found.st_mode & 0o666
    mode |= (mode & 0o444) >> 2  # who may read a file may enter a directory
    return _Manifest(page_size, found.st_size, mode if _is_trusted(found.st_uid) else PRIVATE, parts)


class _Loading:
    """A load under way."""

    def __init__(
        self, arguments: argparse.Namespace, file: int, backup: Backup, manifest: _Manifest, *, is_new: bool
    ) -> None:
        self._arguments = arguments
        self._file = file
        self._backup = backup
        self._manifest = manifest
        self._is_new = is_new
        self._goes_on = arguments.goes_on or arguments.into
        self._path = quoted(arguments.backup)
        self._end = os.fstat(file).st_size

    def run(self) -> int:
        """Store the parts that are not there yet. The exit status."""
        if (self._is_new or not self._arguments.into) and os.stat(self._backup.path).st_uid != os.geteuid():
            raise CommandError(
                f"{self._path} is another user's, who could read what is loaded: --into does it all the same"
            )
        before = self._backup.residency().pages
        if before and not self._goes_on:
            raise CommandError(
                f"{self._path} holds pages: --continue goes on with a load that was interrupted, "
                "--into stores over what is there"
            )
        stored: dict[int, _Part] = {}
        try:
            if self._backup.size < self._end:
                self._backup.resize(self._end)
            self._store(stored)
            damaged = [part for number, part in self._manifest.parts.items() if number not in stored]
            if not damaged and (self._is_new or self._arguments.goes_on):
                self._let_in()
            has_lost = self._backup.residency().pages < sum(part.pages for part in stored.values())
        except (TtmfsError, OSError) as error:
            raise self._stopped(error, before, is_partial=bool(stored)) from None
        self._tell(damaged)
        if damaged and not stored:
            what = "was not made" if self._is_new else "is as it was"
            raise CommandError(f"nothing of {quoted(self._arguments.file)} is what was saved; {self._path} {what}")
        if has_lost:
            raise CommandError(f"{self._path} has lost pages while they were loaded: others drop them", 1)
        done = replace(self._manifest, parts=stored)
        _report(self._arguments, done, "loaded", damaged=sum(part.pages for part in damaged))
        return 1 if damaged else 0

    def _store(self, stored: dict[int, _Part]) -> None:
        """Store the parts, each of which is added to `stored` once it is."""
        manifest, page_size = self._manifest, self._backup.page_size
        with Progress(f"load {self._path}", manifest.pages * page_size) as progress:
            for part, (done, was_there) in _in_threads(self._stored, manifest.parts.values()):
                if done:
                    stored[done.number] = done
                progress.advance(part.pages * page_size, skipped=was_there or not done)
            if self._arguments.verify:
                progress.note("reading it back")
                self._verify(stored.values())

    def _let_in(self) -> None:
        """Give the backup its mode, which may shut out even its owner from storing: so last of all."""
        path = self._backup.path
        if os.stat(path).st_mode & 0o777 != self._manifest.mode:
            os.chmod(path, self._manifest.mode)

    def _stopped(self, error: TtmfsError | OSError, before: int, *, is_partial: bool) -> CommandError:
        """Why it did not come to its end, what is there by now, and what to do. `before`: pages there were."""
        why, hint = reason(error, self._arguments.backup), ""
        with contextlib.suppress(TtmfsError, OSError):  # the mount may be what failed
            held = self._backup.residency().pages
            if self._is_new and not held:
                return CommandError(f"{why}; nothing is stored, and {self._path} was not made")
            is_partial |= held > before
            hint = f"; {held} pages are there, of {self._manifest.pages} to be stored"
        if isinstance(error, NoRoom):
            hint += ". Make room (setfattr -n user.ttmfs.size gives the mount more), then"
        else:
            hint += ". When that is mended,"
        file = quoted(self._arguments.file)
        how = "--into" if self._arguments.into else "--continue"
        return CommandError(f"{why}{hint} ttmfs load {how} {file} {self._path} goes on", 1 if is_partial else 2)

    def _tell(self, damaged: list[_Part]) -> None:
        name = quoted(self._arguments.file)
        for part in damaged:
            ranges = part.ranges if len(part.ranges) <= 60 else f"{part.runs[0][0] + 1} to {part.runs[-1][1]}"
            sys.stderr.write(f"ttmfs load: {name} is damaged: pages of the handles {ranges} were not stored\n")

    def _stored(self, part: _Part) -> tuple[_Part | None, bool]:
        """Store a part, None if it is damaged and nothing was stored; and whether it was there already."""
        import numpy as np

        backup, page_size = self._backup, self._backup.page_size
        if self._goes_on and part.digest and self._is_there(part):
            return part, True
        pages = [np.zeros((past - first, page_size), np.uint8) for first, past in part.runs]
        starts = [first * page_size for first, _ in part.runs]
        try:
            for start, those in zip(starts, pages, strict=True):
                _fill(self._file, flat(those)[: max(0, self._end - start)], start)  # the last page may not be whole
        except OSError:  # the file cannot be read there
            return None, False
        digest = Digest.of(_in_blocks(zip(starts, map(flat, pages), strict=True)))
        if part.digest not in (None, digest):
            return None, False
        for (first, past), those in zip(part.runs, pages, strict=True):
            done = 0
            while done < past - first:  # what was not stored is tried once more, to be told why
                done += len(backup.backup_pages(those[done:], first + done))
        return part._replace(digest=digest), False

    def _is_there(self, part: _Part) -> bool:
        with _Source(self._backup, self._backup.size) as source:
            return source.digest(part) == part.digest

    def _verify(self, parts: Iterable[_Part]) -> None:
        for part, is_there in _in_threads(self._is_there, parts):
            if not is_there:
                raise CommandError(
                    f"part {part.number} of {self._path} is not what was stored: does another write to it? "
                    "ttmfs load --continue stores it again", 1
                )  # fmt: skip


def _in_blocks(runs: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    for position, view in runs:
        for start in range(0, len(view), BLOCK):
            yield position + start, view[start : start + BLOCK]


COMMANDS = (
    Command(
        "save",
        "Save a backup to a sparse file FILE, page i at byte i * page_size, and what is to be known of it to\n"
        "FILE.ttmfs: page size, mode, which handles hold pages, checksums. Both get their names when they are whole\n"
        "and on the disk. After an interruption of any kind the same command goes on: it compares what is there with\n"
        "the backup, and copies the rest. FILE is yours, and lets in others as the backup does.\n\n"
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
        uses_client=True,
    ),
    Command(
        "load",
        "Load a backup from what ttmfs save or ttmfs rescue made: the same pages, at the same handles. Each part of\n"
        "16 MiB is stored only if it has its checksum; parts that are damaged are told and left out, and the exit\n"
        "status is 1. Another sparse file is loaded as it is: what is data there becomes pages.\n\n"
        "Until all of it is stored a new backup has mode 0700; then the one that was saved, or FILE's, unless those\n"
        "are another user's. After an interruption of any kind, and if there was no room, --continue goes on.",
        """\
examples:
  ttmfs load /var/backups/bo7 /mnt/ttm/bo7
  ttmfs load --continue /var/backups/bo7 /mnt/ttm/bo7      after an interruption
  ttmfs load --check /var/backups/bo7                      is the file sound?""",
        _add_load,
        _load,
        "interrupted; ttmfs load --continue goes on where it was",
        uses_client=True,
    ),
)
