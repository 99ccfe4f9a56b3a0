"""Copy backups out of a keeper that gave up, or out of any directory of backups, to sparse files with checksums.

It imports only the standard library and two neighbours, and can be run by its path. So it works when the rest of the
package is broken. It does not change the backups, except that it makes a file readable while it opens it.

The files may be a stranger's: links, pipes and devices instead of files, or checksums that name any file. So it opens
each file once, relative to an open directory, and accepts only regular files. It shows names quoted.

The checksum of a backup combines the checksums of its parts of 16 MiB. A part consists of pieces of 4096 bytes. Pieces
that are all zeros, and parts that have only such pieces, do not count. The checksum of a part is the SHA-256 of this
input: for each piece, its number in the backup (8 bytes, little-endian) and its content. The checksum of the backup is
the SHA-256 of this input: for each part, its number (8 bytes, little-endian) and its checksum (32 bytes). So the
checksum depends neither on the page size nor on where a filesystem has holes.
DIRECTORY/.CHECKSUMS has a line for each backup: checksum, pieces, size in bytes, and the name as JSON.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __package__:
    from .exit_status import ExitStatus
    from .keepers import NAME, keepers, process, stores
else:  # run by its path
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from exit_status import ExitStatus  # type: ignore[import-not-found,no-redef]
    from keepers import NAME, keepers, process, stores  # type: ignore[import-not-found,no-redef]

__all__ = [
    "DESCRIPTION", "EXAMPLES", "INTERRUPTED", "PIECE", "RescueError", "add_arguments", "data_runs", "open_file",
    "partial_name", "run", "write_all",
]  # fmt: skip

DESCRIPTION = "Copy backups out of a keeper that gave up, or of any directory of backups: sparse files with checksums."
EXAMPLES = """\
examples:
  ttmfs rescue 4711 /var/tmp/pages             from the keeper that the log names
  ttmfs rescue /mnt/ttm /var/tmp/pages         from the keeper of a dead mount point
  ttmfs rescue /proc/1/fd/57 /var/tmp/pages    from a descriptor of a service manager
  ttmfs rescue --check /var/tmp/pages          check that the copies are unchanged

A backup becomes a file of its name, page i at byte i * page_size. To use copies: ttmfs mount MNT -o store=DIRECTORY."""

INTERRUPTED = "interrupted; the backups listed above are complete, the others were not copied"

PIECE, PART, BLOCK = 4096, 16 << 20, 1 << 20  # bytes; a block is what one call reads
ZEROS = bytes(PIECE)
CHECKSUMS = ".CHECKSUMS"  # no backup has such a name
MAP, WITH_MAP = ".ttmfs-map-", "only a mount knows which of its pages exist: mount the store again"
LONGEST_LINE, LONGEST_CHECKSUMS = 4096, 1 << 30  # bytes
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class RescueError(Exception):
    """What is wrong, then what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``ttmfs rescue``."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="the keeper's process id, the mount point, or the path of a directory or descriptor (/proc/PID/fd/N)",
    )  # fmt: skip
    parser.add_argument("directory", metavar="DIRECTORY", help="where to write; existing files are not overwritten")
    parser.add_argument("--check", action="store_true", help="compare the copies in DIRECTORY with their checksums")
    parser.add_argument("--json", action="store_true", help="a list of objects: backup, bytes, checksum, error")


class _Report(NamedTuple):
    """What is told about each backup: a line at once, or with --json a row of the list that is written at the end."""

    rows: list[dict[str, object]] | None

    def tell(self, text: str, **row: object) -> None:
        """Tell about one backup. Without a `row` the text is a summary."""
        if self.rows is None:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        elif row:
            self.rows.append({"bytes": None, "checksum": None, "error": None, **row})

    def fail(self, name: str, error: OSError) -> None:
        """Tell that a backup was not copied."""
        why = error.strerror or str(error)
        sys.stderr.write(f"ttmfs rescue: {name!r}: {why}; continuing with the others\n")
        if self.rows is not None:
            self.tell("", backup=name, error=why)


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Rescue, or check."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names can be anything
    path = Path(arguments.directory)
    try:
        if bool(arguments.source) == arguments.check:
            raise RescueError(
                "--check takes a DIRECTORY alone" if arguments.check
                else "give a SOURCE: a keeper's process id, a mount point, or /proc/PID/fd/N"
            )  # fmt: skip
        report = _Report([] if arguments.json else None)
        if arguments.check:
            status = check(path, report)
        else:
            with _closing(find(arguments.source)) as source:
                status = rescue(source, path, report)
        if arguments.json:
            sys.stdout.write(json.dumps(report.rows, indent=2) + "\n")
        return status
    except RescueError as error:
        sys.stderr.write(f"ttmfs rescue: {_plain(str(error))}\n")
        return ExitStatus.FAILED


def _plain(text: str) -> str:
    """A message without control characters."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


# --- where the backups are ---


def find(source: str) -> int:
    """A descriptor of the directory that a keeper's process id, a mount point or a path stands for."""
    if source.isdecimal():
        return _store_of(int(source))
    above, name = os.path.split(os.path.abspath(source))
    mount_point = os.path.join(os.path.realpath(above), name)  # not opened: it may be dead, or hang
    pids = [keeper.pid for keeper in keepers() if mount_point in keeper.words]
    if len(pids) > 1:  # one gave up, and someone has mounted again
        raise RescueError(f"{source} has several keepers: give the one that gave up, {' or '.join(map(str, pids))}")
    return _store_of(pids[0]) if pids else _open_directory(source)


def _store_of(pid: int) -> int:
    try:
        with process(pid) as directory:
            if len(found := stores(directory)) == 1:
                return _open_directory(found[0])
            raise RescueError(f"process {pid} holds {len(found) or 'no'} directories: give /proc/{pid}/fd/N of the one")
    except FileNotFoundError:
        raise RescueError(f"there is no process {pid}; pgrep {NAME} lists the keepers") from None
    except PermissionError:
        raise RescueError(f"process {pid} is another user's: run this as that user, or give /proc/{pid}/fd/N") from None


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        hint = "; its keeper is gone, or is another user's" if error.errno in (errno.ENOTCONN, errno.EACCES) else ""
        raise RescueError(f"{path}: {error.strerror}{hint}") from None


# --- files that may be a stranger's ---


def _checked_name(name: object) -> str:
    """The name of a backup. ValueError if no backup can have it, such as a path."""
    if not isinstance(name, str) or not 0 < len(os.fsencode(name)) < 256 or name[0] == "." or set(name) & {"/", "\0"}:
        raise ValueError("it has a name that no backup can have")
    return name


def open_file(name: str, directory: int, *, follow: bool = False) -> int:
    """Open a regular file to read. OSError for anything else, which is not opened, so nothing waits for it."""
    with _located(name, directory, follow=follow) as path:
        return os.open(path, READ)


@contextlib.contextmanager
def _located(name: str, directory: int, *, follow: bool = False) -> Iterator[str]:
    """A path of a regular file that stays valid if its name changes."""
    flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with _closing(os.open(name, flags, dir_fd=directory)) as file:
        if stat.S_ISLNK(mode := os.fstat(file).st_mode):
            raise OSError(errno.ELOOP, "it is a symbolic link")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        yield f"/proc/self/fd/{file}"


def _open_to_read(name: str, directory: int) -> int:
    """Open a backup's file, even if its mode denies reading to its owner, who may run this."""
    with _located(name, directory) as path:
        try:
            return os.open(path, READ)
        except PermissionError:
            found = os.stat(path)
            if found.st_uid != os.geteuid():
                raise
            os.chmod(path, stat.S_IMODE(found.st_mode) | stat.S_IRUSR)
            try:
                return os.open(path, READ)
            finally:
                os.chmod(path, stat.S_IMODE(found.st_mode))


# --- checksums ---


def _checksum(fd: int, copy_to: int | None = None) -> tuple[str, int]:
    """The checksum of a sparse file, and how many of its pieces are not all zeros. It can copy the data on the way."""
    total, total_pieces = hashlib.sha256(), 0
    for number, blocks in itertools.groupby(_blocks(fd, copy_to), key=lambda block: block[0] // PART):
        part, pieces = hashlib.sha256(), 0
        for position, block in blocks:
            for start in range(0, len(block), PIECE):
                piece = block[start : start + PIECE]
                if piece != ZEROS:
                    part.update(((position + start) // PIECE).to_bytes(8, "little") + piece.ljust(PIECE, b"\0"))
                    pieces += 1
        if pieces:
            total.update(number.to_bytes(8, "little") + part.digest())
            total_pieces += pieces
    return total.hexdigest(), total_pieces


def _blocks(fd: int, copy_to: int | None) -> Iterator[tuple[int, bytes]]:
    """The data of a sparse file, with positions."""
    for start, end in data_runs(fd):
        while start < end and (block := os.pread(fd, min(end, (start // BLOCK + 1) * BLOCK) - start, start)):
            if copy_to is not None:
                write_all(copy_to, block, start)
            yield start, block
            start += len(block)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the data, by as many calls as necessary."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def data_runs(fd: int) -> Iterator[tuple[int, int]]:
    """The runs of data of a file, as (start, end) in bytes, rounded to whole pieces."""
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = -(-os.lseek(fd, start, os.SEEK_HOLE) // PIECE) * PIECE
        yield start // PIECE * PIECE, position


class Line(NamedTuple):
    """A line of .CHECKSUMS."""

    checksum: str
    pieces: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.checksum} {self.pieces} {self.size} {json.dumps(self.name)}\n"

    @classmethod
    def parse(cls, text: str) -> "Line":
        """Parse a line. Raises ValueError."""
        match = re.fullmatch(r'([0-9a-f]{64}) (\d{1,19}) (\d{1,19}) (".*")', text)
        if not match:
            raise ValueError("it is not a line of checksums")
        return cls(match[1], int(match[2]), int(match[3]), _checked_name(json.loads(match[4])))


@contextlib.contextmanager
def _checksums(directory: int) -> Iterator[tuple[int, Iterator[str]]]:
    """The owner of the checksums in a directory, and their lines. OSError if they cannot be read."""
    with open(open_file(CHECKSUMS, directory), "rb") as file:

        def lines() -> Iterator[str]:
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE or file.tell() > LONGEST_CHECKSUMS:
                    raise ValueError("it is too long")
                yield line.decode("ascii").removesuffix("\n")

        yield os.fstat(file.fileno()).st_uid, lines()


# --- copying ---


def rescue(source: int, path: Path, report: _Report) -> ExitStatus:
    """Copy every backup of a directory."""
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            target = stack.enter_context(_closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
            names = _names(source)
            if taken := set(os.listdir(target)).intersection([*names, CHECKSUMS]):
                raise RescueError(
                    f"{path} already has {min(taken)!r}, and nothing is overwritten: give another directory"
                )
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            sums = stack.enter_context(_closing(os.open(CHECKSUMS, flags, 0o644, dir_fd=target)))
        except OSError as error:
            raise RescueError(f"{path}: {error.strerror}; give a directory that can be made or written to") from None
        failed = sum(not _rescued(name, source, target, sums, report) for name in names)
        os.fsync(sums)
    report.tell(f"{len(names) - failed} of {len(names)} backups are in {_plain(str(path))}")
    return ExitStatus.PARTLY if failed else ExitStatus.DONE


def _names(source: int) -> list[str]:
    """The backups in a directory."""
    try:
        with os.scandir(source) as entries:
            names = sorted(e.name for e in entries if e.name[0] != "." and e.is_file(follow_symlinks=False))
    except OSError as error:
        raise RescueError(f"the backups cannot be listed: {error.strerror}") from None
    if not names:
        raise RescueError("there are no backups; is this the right SOURCE?")
    return names


def _rescued(name: str, source: int, target: int, sums: int, report: _Report) -> bool:
    """Copy one backup, add its line to the checksums, and report it. Returns whether that worked."""
    try:
        line = _copy(name, source, target)
        os.write(sums, str(line).encode())
    except OSError as error:
        report.fail(name, error)
        return False
    text = f"{name!r}: {line.pieces * PIECE >> 10} KiB, {line.checksum[:16]}"
    report.tell(text, backup=name, bytes=line.pieces * PIECE, checksum=line.checksum)
    return True


def _copy(name: str, source: int, target: int) -> Line:
    """Copy one backup, completely or not at all."""
    partial, flags = partial_name(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with (
            _closing(_open_to_read(name, source)) as there,
            _closing(os.open(partial, flags, 0o600, dir_fd=target)) as here,
        ):
            found = os.fstat(there)
            with contextlib.suppress(FileNotFoundError):
                os.stat(f"{MAP}{found.st_ino}", dir_fd=source, follow_symlinks=False)
                raise OSError(errno.EINVAL, WITH_MAP)
            os.ftruncate(here, found.st_size)
            total = _checksum(there, copy_to=here)
            os.fsync(here)
            if _checksum(here) != total:
                raise OSError(errno.EIO, "the copy differs from what was read; check the disk, and stop all writers")
            _give(here, found)
            os.rename(partial, name, src_dir_fd=target, dst_dir_fd=target)
    except FileExistsError:  # it is another's
        raise
    except BaseException:  # an interruption can come before the new file has a name here
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=target)
        raise
    return Line(*total, found.st_size, name)


def _give(file: int, found: os.stat_result) -> None:
    """Give a copy the owner, mode and times of its backup. Users other than root may always read and write theirs."""
    with contextlib.suppress(OSError):  # not root, or a filesystem or user namespace without such an owner
        os.fchown(file, found.st_uid, found.st_gid)
    os.fchmod(file, found.st_mode & 0o777 | (0o600 if os.geteuid() else 0))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def partial_name(name: str) -> str:
    """The name of a copy until it is complete. The names of backups do not begin with a dot."""
    return "." + os.fsdecode(os.fsencode(name)[:200]) + ".partial"


# --- checking copies ---


def check(path: Path, report: _Report) -> ExitStatus:
    """Compare copies with their checksums."""
    place, wrong, count = path / CHECKSUMS, 0, 0
    with _closing(_open_directory(str(path))) as directory:
        try:
            with _checksums(directory) as (owner, lines):
                if owner not in (0, os.geteuid(), os.fstat(directory).st_uid):
                    raise RescueError(
                        f"{place} belongs neither to you nor to the owner of {path}: find out who put it there"
                    )
                for text in lines:
                    name, difference = _compared(text, directory)
                    count, wrong = count + 1, wrong + bool(difference)
                    report.tell(f"{json.dumps(name)}: {difference or 'OK'}", backup=name, error=difference or None)
        except OSError as error:
            raise RescueError(f"{place}: {error.strerror}; ttmfs rescue SOURCE {path} writes it") from None
        except ValueError:
            raise RescueError(f"{place} was not written by ttmfs rescue") from None
    report.tell(f"{count - wrong} of {count} backups are unchanged")
    return ExitStatus.PARTLY if wrong else ExitStatus.DONE


def _compared(text: str, directory: int) -> tuple[str, str]:
    """The name in a line of checksums, and how the copy differs from the line, or nothing."""
    try:
        line = Line.parse(text)
    except ValueError as error:
        return text[:80], str(error)
    try:
        with _closing(_open_to_read(line.name, directory)) as file:
            same = Line(*_checksum(file), os.fstat(file).st_size, line.name) == line
    except OSError as error:
        return line.name, error.strerror or str(error)
    return line.name, "" if same else "is not what was rescued"


def _main() -> int:
    """This module run as a program."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except KeyboardInterrupt:
        sys.stderr.write(f"ttmfs rescue: {INTERRUPTED}\n")
        return ExitStatus.INTERRUPTED


if __name__ == "__main__":
    sys.exit(_main())
