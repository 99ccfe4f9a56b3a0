"""Getting backups out of a keeper that gave up, or out of any directory of backups: sparse files with checksums.

Standard library alone, and of the package only what is the same: it must work when the rest does not. So it can be run
by its path too. It changes nothing of what it reads, but for the moment in which it opens a file whose mode shuts out
its own user.

What it reads may be a stranger's: links, pipes and devices in place of files, or checksums that name any file. So it
opens each file once, by its name in a directory that is open, and takes regular ones alone. It shows names quoted.

The checksum of a backup is made of those of its parts of 16 MiB, so that parts can be summed, and found to be damaged,
by themselves. A part's is the SHA-256 over what is in it, in ascending order: of each piece of 4096 bytes that is not
all zeros, its number in the backup (8 bytes, little-endian) and its content. The backup's is the SHA-256 over each part
with such pieces: its number (8 bytes, little-endian) and its checksum (32 bytes). So it depends neither on the page
size nor on how a filesystem places holes, and takes no time for them. DIRECTORY/.CHECKSUMS has a line for each:
checksum, pieces, size in bytes, and the name as JSON. ``ttmfs save`` reckons in the same way.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

if __package__:
    from .keepers import NAME, keepers, process, stores
else:  # run by its path
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keepers import NAME, keepers, process, stores  # type: ignore[import-not-found,no-redef]

__all__ = [
    "BLOCK",
    "CHECKSUMS",
    "DESCRIPTION",
    "EXAMPLES",
    "INTERRUPTED",
    "PART",
    "PIECE",
    "Digest",
    "RescueError",
    "add_arguments",
    "checked_name",
    "data_runs",
    "digests_of",
    "line_of",
    "open_file",
    "partial_name",
    "run",
    "total_of",
    "write_all",
]

DESCRIPTION = "Get backups out of a keeper that gave up, or of any directory of backups: sparse files with checksums."
EXAMPLES = """\
examples:
  ttmfs rescue 4711 /var/tmp/pages             of the keeper that the log names
  ttmfs rescue /mnt/ttm /var/tmp/pages         of the keeper of a dead mount point
  ttmfs rescue /proc/1/fd/57 /var/tmp/pages    of a service manager's descriptor
  ttmfs rescue --check /var/tmp/pages          whether the copies are as they were

A backup becomes a file of its name, page i at byte i * page_size. To use copies: mount.py MNT -o store=DIRECTORY."""

INTERRUPTED = "interrupted; backups that were told of are whole, others are not there"

PIECE = 4096
PART = 16 << 20
ZEROS = bytes(PIECE)
CHECKSUMS = ".CHECKSUMS"  # no backup has such a name
PARTIAL = ".partial"
LONGEST_LINE, MOST_CHECKSUMS = 4096, 1 << 30  # bytes of the file of checksums
BLOCK = 1 << 20
_AT_ONCE = 16 * PIECE  # each update has its price, and so has memory that the cache does not hold


class RescueError(Exception):
    """What stands in the way, and what to do about it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``ttmfs rescue``."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="the keeper's process id, the mount point, or the path of a directory or descriptor (/proc/PID/fd/N)",
    )  # fmt: skip
    parser.add_argument("directory", metavar="DIRECTORY", help="where to write; nothing there is overwritten")
    parser.add_argument("--check", action="store_true", help="compare the copies in DIRECTORY with their checksums")


def run(arguments: argparse.Namespace) -> int:
    """Rescue, or check. The exit status: 0; 1 if a backup failed; 2 if nothing could be done."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # whatever the names are, they can be written
            stream.reconfigure(errors="backslashreplace")
    target = Path(arguments.directory)
    try:
        if arguments.check:
            if arguments.source:
                raise RescueError("--check takes a DIRECTORY alone")
            return check(target)
        if not arguments.source:
            raise RescueError("give a SOURCE: a keeper's process id, a mount point, or /proc/PID/fd/N")
        source = find(arguments.source)
        try:
            return rescue(source, target)
        finally:
            os.close(source)
    except RescueError as error:
        sys.stderr.write(f"ttmfs rescue: {_plain(str(error))}\n")
        return 2


def _plain(text: str) -> str:
    """A message without anything that a terminal would obey, as repr() of its names is."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# --- where the backups are ---


def find(source: str) -> int:
    """A descriptor of the directory that a keeper's process id, a mount point or a path stands for."""
    if source.isdecimal():
        try:
            with process(int(source)) as place, stores(place) as found:
                if len(found) == 1:
                    return _open_directory(f"/proc/self/fd/{found[0]}")
                held = len(found) or "no"
                raise RescueError(f"process {source} holds {held} directories: give /proc/{source}/fd/N of the one")
        except FileNotFoundError:
            raise RescueError(f"there is no process {source}; pgrep {NAME} lists the keepers that there are") from None
        except PermissionError:
            raise RescueError(
                f"process {source} is another user's: be that user, or give /proc/{source}/fd/N"
            ) from None
    above, name = os.path.split(os.path.abspath(source))
    target = os.path.join(os.path.realpath(above), name)  # itself it is not touched: it may be dead, or hang
    pids = [str(keeper.pid) for keeper in keepers() if target in keeper.words]
    if len(pids) > 1:  # one gave up, and someone has mounted anew there
        which = ", ".join(pids)
        raise RescueError(f"{source} has several keepers, of which one may have given up: give one of {which}")
    if pids:
        return find(pids[0])
    if _is_mount(target):
        raise RescueError(f"{source} is a ttmfs, but its keeper is gone, or is another user's: be the user who mounted")
    return _open_directory(source)


def _is_mount(target: str) -> bool:
    """Whether a ttmfs is mounted there, without touching it."""
    for line in Path("/proc/self/mounts").read_bytes().splitlines():
        _, where, kind, *_ = line.split(b" ")
        where = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), where)
        if (os.fsdecode(where), kind) == (target, b"fuse.ttmfs"):
            return True
    return False


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        hint = "; its keeper is gone, or is another user's" if error.errno in (errno.ENOTCONN, errno.EACCES) else ""
        raise RescueError(f"{path}: {error.strerror}{hint}") from None


# --- files that may be a stranger's ---


def checked_name(name: object) -> str:
    """The name of a backup's copy, as JSON gives it. ValueError if it is none, or would lead elsewhere."""
    if not isinstance(name, str) or not 0 < len(os.fsencode(name)) < 256 or name[0] == "." or set(name) & {"/", "\0"}:
        raise ValueError("it has the name of no backup")
    return name


def open_file(name: str, directory: int, *, flags: int = os.O_RDONLY, follow: bool = False) -> int:
    """Open a regular file that there is. OSError for anything else, which is not even opened, so nothing waits for it.

    A symbolic link is followed only if the caller asks for it.
    """
    with _located(name, directory, follow=follow) as place:
        return os.open(place, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@contextlib.contextmanager
def _located(name: str, directory: int, *, follow: bool = False) -> Iterator[str]:
    """A path of a regular file which remains the same file, whatever is done to its name."""
    file = os.open(name, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), dir_fd=directory)
    try:
        if stat.S_ISLNK(mode := os.fstat(file).st_mode):
            raise OSError(errno.ELOOP, "it is a symbolic link")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no file")
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def _open_to_read(name: str, directory: int) -> int:
    """Open a backup's file to read, also if its mode shuts out its owner, who mounted."""
    with _located(name, directory) as place:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(place, flags)
        except PermissionError:
            found = os.stat(place)
            if found.st_uid != os.geteuid():
                raise
            mode = stat.S_IMODE(found.st_mode)
            os.chmod(place, mode | 0o400)
            try:
                return os.open(place, flags)
            finally:
                os.chmod(place, mode)


# --- copying ---


def rescue(source: int, path: Path) -> int:
    """Copy every backup of a directory."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RescueError(f"{path}: {error.strerror}; give a directory that can be made or written to") from None
    try:
        return _rescue(source, target, path)
    finally:
        os.close(target)


def _rescue(source: int, target: int, path: Path) -> int:
    try:
        with os.scandir(source) as entries:
            names = sorted(e.name for e in entries if e.name[0] != "." and e.is_file(follow_symlinks=False))
    except OSError as error:
        raise RescueError(f"the backups cannot be listed: {error.strerror}") from None
    if not names:
        raise RescueError("no backups are there: is it the right SOURCE?")
    taken = set(os.listdir(target)).intersection([*names, CHECKSUMS])
    if taken:
        raise RescueError(f"{path} has a {min(taken)!r} already, and nothing is overwritten: give an empty directory")
    failed = 0
    try:
        sums = os.open(CHECKSUMS, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=target)
    except OSError as error:
        raise RescueError(f"{path}: {error.strerror}; give a directory that can be written to") from None
    try:
        for name in names:
            try:
                line = _copied(source, name, target)
                os.write(sums, line.encode() + b"\n")
            except OSError as error:
                failed += 1
                sys.stderr.write(f"ttmfs rescue: {name!r}: {error.strerror or error}; the others go on\n")
                continue
            sys.stdout.write(_told(line))
            sys.stdout.flush()
        os.fsync(sums)
    finally:
        os.close(sums)
    sys.stdout.write(f"{len(names) - failed} of {len(names)} backups are in {_plain(str(path))}\n")
    return 1 if failed else 0


def _copied(source: int, name: str, target: int) -> str:
    """Copy one backup, whole or not at all. Gives its line of the checksums."""
    partial = partial_name(name)
    there = _open_to_read(name, source)
    try:
        found = os.fstat(there)
        here = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            os.ftruncate(here, found.st_size)
            before = _summed(there, copy_to=here)
            os.fsync(here)
            if _summed(here) != before:
                raise OSError(errno.EIO, "the copy is not what was read; is the disk sound, and does no one write?")
            with contextlib.suppress(OSError):  # not root, or a filesystem or user namespace without such an owner
                os.fchown(here, found.st_uid, found.st_gid)
            os.fchmod(
                here, stat.S_IMODE(found.st_mode) & 0o777 | (0o600 if os.geteuid() else 0)
            )  # who is not root could not use it
            os.utime(here, ns=(found.st_atime_ns, found.st_mtime_ns))
            os.rename(partial, name, src_dir_fd=target, dst_dir_fd=target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=target)
            raise
        finally:
            os.close(here)
    finally:
        os.close(there)
    return f"{before[0]} {before[1]} {found.st_size} {json.dumps(name)}"


def partial_name(name: str) -> str:
    """What a copy is called until it is whole: no backup's name begins with a dot."""
    return "." + os.fsdecode(os.fsencode(name)[:200]) + PARTIAL


def _summed(fd: int, copy_to: int | None = None) -> tuple[str, int]:
    """The checksum of a sparse file and how many pieces of it are data, which are copied to another file on the way."""
    return total_of(digests_of(fd, copy_to))


class Digest(NamedTuple):
    """The SHA-256 of a part, in hexadecimal digits, and how many pieces it has that are not all zeros."""

    sha256: str
    pieces: int

    @classmethod
    def of(cls, blocks: Iterable[tuple[int, bytes | memoryview]]) -> "Digest":
        """Of the blocks of data in a part, with their positions in the backup, ascending and in whole pieces."""
        sha256, pieces = hashlib.sha256(), 0
        for position, block in blocks:
            for start in range(0, len(block), _AT_ONCE):
                words: list[bytes] = []
                for at in range(start, min(start + _AT_ONCE, len(block)), PIECE):
                    piece = bytes(block[at : at + PIECE])
                    if piece != ZEROS:
                        words += ((position + at) // PIECE).to_bytes(8, "little"), piece.ljust(PIECE, b"\0")
                sha256.update(b"".join(words))
                pieces += len(words) // 2
        return cls(sha256.hexdigest(), pieces)


def digests_of(fd: int, copy_to: int | None = None) -> dict[int, Digest]:
    """The digests of the parts of a sparse file that have data, by number."""
    digests: dict[int, Digest] = {}
    runs: dict[int, list[tuple[int, int]]] = {}
    for start, end in data_runs(fd):
        while start < end:
            number = start // PART
            runs.setdefault(number, []).append((start, min(end, (number + 1) * PART)))
            start = runs[number][-1][1]
        # What is complete by now need not wait for the end: a file may have more runs than there is memory for.
        for number in [number for number in runs if (number + 1) * PART <= end]:
            digests[number] = Digest.of(_blocks(fd, runs.pop(number), copy_to))
    for number, those in runs.items():
        digests[number] = Digest.of(_blocks(fd, those, copy_to))
    return digests


def total_of(digests: dict[int, Digest]) -> tuple[str, int]:
    """The checksum of a backup from those of its parts, and its pieces."""
    sha256, pieces = hashlib.sha256(), 0
    for number, part in sorted(digests.items()):
        if part.pieces:
            sha256.update(number.to_bytes(8, "little") + bytes.fromhex(part.sha256))
            pieces += part.pieces
    return sha256.hexdigest(), pieces


def _blocks(fd: int, runs: Iterable[tuple[int, int]], copy_to: int | None) -> Iterator[tuple[int, bytes]]:
    """What a file holds in some ranges of bytes, with positions; copied to another file on the way."""
    for start, end in runs:
        position = start
        while position < end and (block := os.pread(fd, min(BLOCK, end - position), position)):
            if copy_to is not None:
                write_all(copy_to, block, position)
            yield position, block
            position += len(block)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it, in however many pieces the system takes it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def data_runs(fd: int, position: int = 0, past: int = 2**63 - 1) -> Iterator[tuple[int, int]]:
    """The runs of data of a file, or of a range of it in whole pieces, to whole pieces, as (start, end) in bytes."""
    while position < past:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if start >= past:
            return
        position = min(past, -(-os.lseek(fd, start, os.SEEK_HOLE) // PIECE) * PIECE)
        yield start // PIECE * PIECE, position


def _told(line: str) -> str:
    """A line of the checksums for a person."""
    checksum, pieces, _, name = line.split(" ", 3)
    return f"{json.loads(name)!r}: {int(pieces) * PIECE >> 10} KiB, {checksum[:16]}\n"


# --- looking at copies later ---


class Line(NamedTuple):
    """A line of the checksums."""

    name: str
    checksum: str
    pieces: int
    size: int

    @classmethod
    def parse(cls, text: str) -> "Line":
        """ValueError if it is none."""
        match = re.fullmatch(r'([0-9a-f]{64}) (\d{1,19}) (\d{1,19}) (".*")', text)
        if not match:
            raise ValueError("it is no line of checksums")
        return cls(checked_name(json.loads(match[4])), match[1], int(match[2]), int(match[3]))


@contextlib.contextmanager
def _checksums(directory: int) -> Iterator[tuple[int, Iterator[str]]]:
    """Whose the checksums of a directory are, and their lines. OSError if there are none to be read."""
    with open(open_file(CHECKSUMS, directory), "rb") as file:
        yield os.fstat(file.fileno()).st_uid, _lines(file)


def _lines(file: BinaryIO) -> Iterator[str]:
    read = 0
    while line := file.readline(LONGEST_LINE):
        read += len(line)
        if len(line) == LONGEST_LINE or read > MOST_CHECKSUMS:
            raise ValueError("it is too long")
        yield line.decode("ascii").removesuffix("\n")


def line_of(name: str, directory: int, owners: Iterable[int]) -> tuple[str, int, int] | None:
    """Checksum, pieces and size of a copy, if there is a line of it in checksums beside it that are of `owners`."""
    with contextlib.suppress(OSError, ValueError), _checksums(directory) as (owner, lines):
        for text in lines if owner in owners else ():
            with contextlib.suppress(ValueError):
                if (line := Line.parse(text)).name == name:
                    return line.checksum, line.pieces, line.size
    return None


def check(path: Path) -> int:
    """Compare copies with their checksums."""
    place, directory = path / CHECKSUMS, _open_directory(str(path))
    wrong = count = 0
    try:
        with _checksums(directory) as (owner, lines):
            if owner not in (0, os.geteuid(), os.fstat(directory).st_uid):
                raise RescueError(f"{place} is a stranger's, neither {path}'s owner's nor yours: see who put it there")
            for text in lines:
                name, why = text[:80], "it is no line of checksums"
                with contextlib.suppress(ValueError):
                    line = Line.parse(text)
                    name, why = line.name, _difference(line, directory)
                count, wrong = count + 1, wrong + bool(why)
                sys.stdout.write(f"{json.dumps(name)}: {why or 'OK'}\n")
    except OSError as error:
        raise RescueError(f"{place}: {error.strerror}; ttmfs rescue SOURCE {path} writes it") from None
    except ValueError:
        raise RescueError(f"{place} was not written by ttmfs rescue") from None
    finally:
        os.close(directory)
    sys.stdout.write(f"{count - wrong} of {count} backups are as they were\n")
    return 1 if wrong else 0


def _difference(line: Line, directory: int) -> str:
    """How a copy differs from its line of the checksums; nothing if it does not."""
    try:
        file = _open_to_read(line.name, directory)
        try:
            found = (*_summed(file), os.fstat(file).st_size)
        finally:
            os.close(file)
    except OSError as error:
        return error.strerror or str(error)
    return "" if found == (line.checksum, line.pieces, line.size) else "is not what was rescued"


def _main() -> int:
    """As a program by itself."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except KeyboardInterrupt:
        sys.stderr.write(f"ttmfs rescue: {INTERRUPTED}\n")
        return 130


if __name__ == "__main__":
    sys.exit(_main())
