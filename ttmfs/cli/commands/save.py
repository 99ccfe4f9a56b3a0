"""``ttmfs save``: a backup to a sparse file.

It is written to a hidden file, .FILE.partial. Run again, it compares each part of that with the backup and copies those
that differ. There is no journal, which could be torn, or tell of another backup, or of this one as it was. When all is
on the disk the manifest gets its name, then FILE. Interrupted in between, FILE is not what the manifest tells, which
``load`` finds, and the same command ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TtmfsError
from ...linux import system_calls
from ...linux.mountinfo import ttmfs_on
from ...quoting import quoted
from ..rescue import BLOCK, PART, PIECE, Digest, data_runs, open_file, partial_name, write_all
from .command import Command, CommandError, reason
from .manifest import MANIFEST, Manifest, Part, Source, blocks_of, by_part, in_threads, manifest_of, matches, report
from .mounts import backup_at
from .terminal import ProgressBar

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["COMMANDS"]

TRIES = 5


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
    target: Path = arguments.file
    with backup_at(arguments.backup) as backup, _partial_of(target) as partial:
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
    report(arguments, manifest, "saved")
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
        names = [self.target] if os.fstat(self.file).st_size else [self.target, manifest_of(self.target)]
        return next((path for path in names if self._stat(path.name)), None)

    def is_in_place(self) -> bool:
        """Whether its name is still that of the file that is open."""
        found = self._stat(self.path.name)
        return found is not None and os.path.samestat(found, os.fstat(self.file))

    def publish(self, manifest: Manifest, mode: int) -> None:
        """Give the file and its manifest their names, once both are on the disk."""
        if not self.is_in_place():
            raise OSError(errno.ENOENT, "it was taken away meanwhile")
        written = self._written(manifest, mode)
        # The manifest first: interrupted in between, the next save finds all of the file there, and ends what was left.
        self._rename(written, manifest_of(self.target).name)
        self._rename(self.path.name, self.target.name)
        _let_in(self.file, mode)
        os.fsync(self.directory)

    def _written(self, manifest: Manifest, mode: int) -> str:
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
        if ttmfs_on(os.fstat(directory).st_dev):
            raise CommandError(f"{quoted(target)} lies in a mount of ttmfs, which holds no files: save it elsewhere")
        for place in target, manifest_of(target):
            _check_replaceable(place, directory)
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


def _check_replaceable(path: Path, directory: int) -> None:
    """CommandError for what is no file: one in the place of a device would be hard to find."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            what = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link"}.get(stat.S_IFMT(mode), "a device or pipe")
            raise CommandError(f"{quoted(path)} is {what}: give the name of a file")


def _open_partial(path: Path, directory: int) -> int:
    """Make the file, or open what an earlier save has left. Whoever may write to the directory may have put it there.

    So no link is followed, and nobody else may be able to write to it, or to open it under another name.
    """
    refused = CommandError(
        f"{quoted(path)} is in the way, and no ttmfs save of yours has left it: see whose it is, and remove it"
    )
    try:
        with contextlib.suppress(FileExistsError):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            return os.open(path.name, flags, 0o600, dir_fd=directory)
        file = open_file(path.name, directory, flags=os.O_RDWR)
    except OSError as error:
        is_none = error.errno in (errno.ELOOP, errno.EINVAL)
        raise refused if is_none else CommandError(reason(error, path)) from None
    found = os.fstat(file)
    if found.st_uid != os.geteuid() or found.st_nlink != 1 or found.st_mode & 0o022:
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
        os.close(self._backup.open_file(".", os.O_RDONLY | os.O_DIRECTORY))  # so that the kernel asks anew
        return self._backup.status()

    def file_mode(self) -> int:
        """The file's: it is the caller's, and lets in others as the backup does; a group only if it is the same."""
        group = 0o060 if os.fstat(self._file).st_gid == self._found.st_gid else 0
        return 0o600 | self._found.st_mode & (0o006 | group)

    def run(self, *, verify: bool) -> Manifest:
        """Make the file what the backup is, and see that it is on the disk."""
        backup = self._backup
        with Source(backup, self._size) as source:
            parts = [Part(number, runs, None) for number, runs in source.parts().items()]
            self._prepare({part.number for part in parts})
            total = sum(part.pages for part in parts) * backup.page_size
            with ProgressBar(f"save {quoted(self._path)}", total) as progress:
                copied = self._copy(source, parts, progress)
                os.utime(self._file, ns=(self._found.st_atime_ns, self._found.st_mtime_ns))
                progress.note("to the disk")
                os.fsync(self._file)
                if verify:
                    progress.note("reading it back")
                    self._verify(copied.values())
        return Manifest(backup.page_size, self._size, self._found.st_mode & 0o777, copied)

    def _prepare(self, numbers: set[int]) -> None:
        """Take away what an earlier save has left in parts without pages."""
        os.ftruncate(self._file, self._size)
        for number in by_part(((start // PIECE, end // PIECE) for start, end in data_runs(self._file)), PIECE):
            if number not in numbers and self._digest(number).pieces:
                self._clear(number)

    def _copy(self, source: Source, parts: list[Part], progress: ProgressBar) -> dict[int, Part]:
        copied: dict[int, Part] = {}
        for part, (done, was_there) in in_threads(lambda part: self._copied(source, part), parts):
            if done:
                copied[done.number] = done
            progress.advance(part.pages * self._backup.page_size, skipped=was_there)
        return copied

    def _copied(self, source: Source, part: Part) -> tuple[Part | None, bool]:
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
        return Digest.of(blocks_of(self._file, data_runs(self._file, start, min(start + PART, self._size))))

    def _clear(self, number: int) -> None:
        start, end = number * PART, min((number + 1) * PART, self._size)
        try:
            system_calls.punch_hole(self._file, start, end - start)
        except OSError:  # a filesystem without
            for position in range(start, end, BLOCK):
                write_all(self._file, bytes(min(BLOCK, end - position)), position)

    def _verify(self, parts: Iterable[Part]) -> None:
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        for part, is_sound in in_threads(lambda part: matches(self._file, part, self._backup.page_size), parts):
            if not is_sound:
                raise OSError(errno.EIO, f"part {part.number} is not what was written; is the disk sound?")


COMMANDS = (
    Command(
        "save",
        "Save a backup to a sparse file FILE, page i at byte i * page_size, and what is to be known of it to\n"
        "FILE.ttmfs: page size, mode, which handles hold pages, checksums. Both get their names when they are whole\n"
        "and on the disk. After an interruption of any kind the same command goes on: it compares what is there with\n"
        "the backup, and copies the rest. FILE is yours, and lets in others as the backup does.\n\n"
        "What is stored or dropped meanwhile may be in FILE or not, and a page stored at that very moment in part.\n"
        "If the backup was changed, that is said, and the exit status is 1.",
        """\
examples:
  ttmfs save /mnt/ttm/bo7 /var/backups/bo7
  ttmfs save --verify --force /mnt/ttm/bo7 /media/usb/bo7      read back before it replaces the old one
  tar -cSf bo7.tar bo7 bo7.ttmfs                               what to send elsewhere""",
        _add_save,
        _save,
        "interrupted; the same command goes on where it was",
        uses_client=True,
        waits_for=lambda arguments: [arguments.backup],
    ),
)
