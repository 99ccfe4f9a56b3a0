"""Getting backups out of a keeper that gave up, or out of any directory of backups: sparse files with checksums.

Standard library alone, and nothing of the package: it must work when the rest of it does not. So it can be run by its
path too. It changes nothing of what it reads, but for the moment in which it opens a file whose mode shuts out its own
user.

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
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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
    "data_runs",
    "digests_of",
    "keepers",
    "line_of",
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
KEEPER = "ttmfs-keeper"
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
        sys.stderr.write(f"ttmfs rescue: {error}\n")
        return 2


# --- where the backups are ---


def find(source: str) -> int:
    """A descriptor of the directory that a keeper's process id, a mount point or a path stands for."""
    if source.isdecimal():
        return _open_directory(_store_of(int(source)))
    above, name = os.path.split(os.path.abspath(source))
    place = os.path.join(os.path.realpath(above), name)  # itself it is not touched: it may be dead, or hang
    found = [pid for pid, words in keepers() if place in words]
    if len(found) > 1:  # one gave up, and someone has mounted anew there
        which = ", ".join(map(str, sorted(found)))
        raise RescueError(f"{source} has several keepers, of which one may have given up: give one of {which}")
    if found:
        return _open_directory(_store_of(found[0]))
    if _is_mount(place):
        raise RescueError(f"{source} is a ttmfs, but its keeper is gone, or is another user's: be root, or who mounted")
    return _open_directory(source)


def _is_mount(place: str) -> bool:
    """Whether a ttmfs is mounted there, without touching it."""
    for line in Path("/proc/self/mounts").read_bytes().splitlines():
        _, where, kind, *_ = line.split(b" ")
        where = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), where)
        if (os.fsdecode(where), kind) == (place, b"fuse.ttmfs"):
            return True
    return False


def keepers() -> Iterator[tuple[int, list[str]]]:
    """The process id and the command line, in which the mount point is, of every keeper that may be looked at."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if (process / "comm").read_text().strip() == KEEPER:
                    yield int(process.name), os.fsdecode((process / "cmdline").read_bytes()).split("\0")


def _store_of(pid: int) -> str:
    """The path of the store that a keeper or daemon has open: its only directory, but for its working directory."""
    try:
        here = os.stat(f"/proc/{pid}/cwd")
        found = [
            path
            for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int)
            if stat.S_ISDIR((what := os.stat(path := f"/proc/{pid}/fd/{fd}")).st_mode)
            and not os.path.samestat(what, here)
        ]
    except FileNotFoundError:
        raise RescueError(f"there is no process {pid}; pgrep {KEEPER} lists the keepers that there are") from None
    except PermissionError:
        raise RescueError(f"process {pid} cannot be looked into: be root, or who mounted") from None
    if len(found) != 1:
        raise RescueError(f"process {pid} holds {len(found) or 'no'} directories: give /proc/{pid}/fd/N of the one")
    return found[0]


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        hint = "; its keeper is gone, or is another user's" if error.errno in (errno.ENOTCONN, errno.EACCES) else ""
        raise RescueError(f"{path}: {error.strerror}{hint}") from None


# --- copying ---


def rescue(source: int, target: Path) -> int:
    """Copy every backup of a directory."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RescueError(f"{target}: {error.strerror}; give a directory that can be made or written to") from None
    try:
        names = sorted(e.name for e in os.scandir(source) if e.name[0] != "." and e.is_file(follow_symlinks=False))
    except OSError as error:
        raise RescueError(f"the backups cannot be listed: {error.strerror}") from None
    if not names:
        raise RescueError("no backups are there: is it the right SOURCE?")
    taken = [name for name in (*names, CHECKSUMS) if os.path.lexists(target / name)]
    if taken:
        raise RescueError(f"{target} has a {taken[0]!r} already, and nothing is overwritten: give an empty directory")
    failed = 0
    try:
        sums = open(target / CHECKSUMS, "x", encoding="ascii")  # noqa: SIM115 # it is closed below
    except OSError as error:
        raise RescueError(f"{target}: {error.strerror}; give a directory that can be written to") from None
    with sums:
        for name in names:
            try:
                line = _copied(source, name, target)
                os.write(sums.fileno(), line.encode() + b"\n")
            except OSError as error:
                failed += 1
                sys.stderr.write(f"ttmfs rescue: {name!r}: {error.strerror or error}; the others go on\n")
                continue
            sys.stdout.write(_told(line))
            sys.stdout.flush()
        os.fsync(sums.fileno())
    sys.stdout.write(f"{len(names) - failed} of {len(names)} backups are in {target}\n")
    return 1 if failed else 0


def _copied(source: int, name: str, target: Path) -> str:
    """Copy one backup, whole or not at all. Gives its line of the checksums."""
    partial = target / partial_name(name)
    there = _opened(name, source)
    try:
        found = os.fstat(there)
        here = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
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
            os.rename(partial, target / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(here)
    finally:
        os.close(there)
    return f"{before[0]} {before[1]} {found.st_size} {json.dumps(name)}"


def partial_name(name: str) -> str:
    """What a copy is called until it is whole: no backup's name begins with a dot."""
    return "." + os.fsdecode(os.fsencode(name)[:200]) + PARTIAL


def _opened(name: str, directory: int) -> int:
    """Open a backup's file to read, also if its mode shuts out its owner, who mounted."""
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except PermissionError:
        mode = stat.S_IMODE(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        os.chmod(name, mode | 0o400, dir_fd=directory)
        try:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.chmod(name, mode, dir_fd=directory)


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


def line_of(name: str, directory: Path) -> tuple[str, int, int] | None:
    """Checksum, pieces and size of a copy in a directory, if there is a line of it."""
    with contextlib.suppress(OSError, ValueError):
        for line in (directory / CHECKSUMS).read_text(encoding="ascii").splitlines():
            checksum, pieces, size, quoted = line.split(" ", 3)
            if json.loads(quoted) == name:
                return checksum, int(pieces), int(size)
    return None


def check(target: Path) -> int:
    """Compare copies with their checksums."""
    try:
        lines = (target / CHECKSUMS).read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise RescueError(f"{target / CHECKSUMS}: {error.strerror}; ttmfs rescue SOURCE {target} writes it") from None
    except ValueError:
        raise RescueError(f"{target / CHECKSUMS} was not written by ttmfs rescue") from None
    wrong, directory = 0, _open_directory(str(target))
    for line in lines:
        name = line
        try:
            checksum, pieces, size, name = line.split(" ", 3)
            file = _opened(json.loads(name), directory)
            try:
                found = (*_summed(file), os.fstat(file).st_size)
            finally:
                os.close(file)
            why = "" if found == (checksum, int(pieces), int(size)) else "is not what was rescued"
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or f"not a line of checksums: {line!r}"
        wrong += bool(why)
        sys.stdout.write(f"{name}: {why or 'OK'}\n")
    os.close(directory)
    sys.stdout.write(f"{len(lines) - wrong} of {len(lines)} backups are as they were\n")
    return 1 if wrong else 0


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
