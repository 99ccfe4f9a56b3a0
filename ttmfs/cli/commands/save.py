"""``ttmfs save``: copy a backup to a sparse file or to a stream.

FILE has the name .FILE.partial until it is complete and on the disk. An interrupted save leaves it, and the next save
writes only the chunks that differ. The manifest gets its name first: until FILE follows, ``load`` reports damage.
"""

import argparse
import contextlib
import fcntl
import os
import stat
import sys
from pathlib import Path

from ...client.backup import Backup
from ...errors import TtmfsError
from ...linux import system_calls
from ...linux.mountinfo import ttmfs_on
from ...quoting import quoted
from ..rescue import partial_name, write_all
from .command import Command, CommandError, reason
from .manifest import STREAM, SUFFIX, BackupPages, FilePages, Header, Item, Writer, chunks_of, copy, report
from .mounts import backup_at

__all__ = ["COMMANDS"]


def _file_name(text: str) -> Path:
    if os.path.basename(text) in ("", "."):
        raise argparse.ArgumentTypeError(f"{text!r} is the name of a directory: add the name of the file to make")
    return Path(text)


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="MNT/NAME", help="the backup")
    parser.add_argument(
        "file", metavar="FILE", type=_file_name, help="the file to make; - writes a stream to standard output"
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE when the new one is complete")
    parser.add_argument("--json", action="store_true", help="report in JSON")


def _save(arguments: argparse.Namespace) -> int:
    is_stream, name = arguments.file == STREAM, quoted(arguments.backup)
    if is_stream and sys.stdout.isatty():
        raise CommandError("a stream goes to a pipe or a file, not to a terminal")
    with backup_at(arguments.backup) as backup:
        before = _status(backup)
        items = chunks_of(backup.runs(), backup.page_size)
        header = Header(backup.page_size, backup.size, before.st_mode & 0o777)
        writer = Writer(header, sys.stdout.buffer if is_stream else None)
        try:
            if is_stream:
                copy(f"save {name}", items, BackupPages(backup).read, writer)
            else:
                _save_to_file(arguments, backup, before, items, writer)
            has_changed = _status(backup).st_mtime_ns != before.st_mtime_ns
        except BrokenPipeError:
            raise
        except (TtmfsError, OSError) as error:
            why = reason(error, arguments.backup if isinstance(error, TtmfsError) else arguments.file)
            if not writer.items:
                raise CommandError(why) from None
            hint = "the stream is cut short" if is_stream else "the same command resumes"
            raise CommandError(f"{why}; {hint}", 1) from None
    report(arguments, "saved", writer, sys.stderr if is_stream else sys.stdout)
    if has_changed:
        raise CommandError(f"{name} was changed during the save: the copy has each page as it was when it was read", 1)
    return 0


def _status(backup: Backup) -> os.stat_result:
    os.close(backup.open_file(".", os.O_RDONLY | os.O_DIRECTORY))  # makes the kernel ask for new attributes
    return backup.status()


def _save_to_file(
    arguments: argparse.Namespace, backup: Backup, before: os.stat_result, items: list[Item], writer: Writer
) -> None:
    target, partial = arguments.file, partial_name(arguments.file.name)
    with contextlib.ExitStack() as stack:
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        if ttmfs_on(os.fstat(directory).st_dev):
            raise CommandError(f"{quoted(target)} is in a mount of ttmfs, which holds no other files")
        for path in target, target.with_name(target.name + SUFFIX):
            _check_replaceable(path, directory, is_forced=arguments.force)
        file = _opened(target.with_name(partial), directory, stack)
        manifest = _opened(target.with_name(partial + SUFFIX), directory, stack)
        pages = FilePages(file, backup.page_size, resume=_clear_gaps(file, writer.header, items))
        copy(f"save {quoted(arguments.backup)}", items, BackupPages(backup).read, writer, pages.write)
        os.ftruncate(manifest, 0)
        write_all(manifest, b"".join(writer.lines), 0)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        # Other users get the rights that they have on the backup.
        allowed = 0o066 if os.fstat(file).st_gid == before.st_gid else 0o006
        for fd in file, manifest:
            with contextlib.suppress(PermissionError):  # a filesystem without modes
                os.fchmod(fd, 0o600 | before.st_mode & allowed)
            os.fsync(fd)
        for suffix in SUFFIX, "":
            os.replace(partial + suffix, target.name + suffix, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)


def _check_replaceable(path: Path, directory: int, *, is_forced: bool) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise CommandError(f"{quoted(path)} is not a regular file, and save does not replace it")
        if not is_forced:
            raise CommandError(f"{quoted(path)} exists; --force replaces it when the new file is complete")


def _opened(path: Path, directory: int, stack: contextlib.ExitStack) -> int:
    """Open and lock a file of this user; make it if it does not exist. A stranger may have put another file there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path.name, flags, 0o600, dir_fd=directory)
        stack.callback(os.close, file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(file)
        if not os.path.samestat(found, os.stat(path.name, dir_fd=directory, follow_symlinks=False)):
            raise BlockingIOError  # the other save has completed, and has renamed this file
    except BlockingIOError:
        raise CommandError(f"{quoted(path)} is being written by another ttmfs save") from None
    except OSError as error:
        raise CommandError(reason(error, path)) from None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1 or found.st_mode & 0o022:
        raise CommandError(f"{quoted(path)} is not a file that ttmfs save made for you; remove it")
    return file


def _clear_gaps(file: int, header: Header, items: list[Item]) -> bool:
    """Give a file its size, and clear what an earlier save left between the pages. Returns whether it left anything."""
    has_data = os.fstat(file).st_size > 0
    os.ftruncate(file, header.size)
    edges = [edge * header.page_size for chunk, _ in items for run in chunk.runs for edge in run]
    try:
        for start, end in zip([0, *edges[1::2]], [*edges[::2], header.size], strict=True) if has_data else ():
            if start < end:
                system_calls.punch_hole(file, start, end - start)
    except OSError:  # the filesystem has no holes: begin again
        os.ftruncate(file, 0)
        os.ftruncate(file, header.size)
    return has_data


COMMANDS = (
    Command(
        "save",
        "Save a backup to FILE, a sparse file with page i at byte i * page_size, and FILE.ttmfs, its manifest: page\n"
        "size, mode, and the handles and SHA-256 of each chunk of pages. Both get their names when they are complete\n"
        "and on the disk. After an interruption the same command resumes: it writes only the chunks that differ.\n"
        "With - for FILE, write a stream to standard output; ttmfs load - refuses a stream that was cut short.\n\n"
        "FILE belongs to you, and other users have the rights that they have on the backup. If another program\n"
        "changes the backup during the save, the command says so, and the exit status is 1.",
        """\
examples:
  ttmfs save /mnt/ttm/bo7 /var/backups/bo7
  ttmfs save --force /mnt/ttm/bo7 /media/usb/bo7      replace an older copy
  ttmfs save /mnt/ttm/bo7 - | ssh host ttmfs load - /mnt/ttm/bo7""",
        _add_save,
        _save,
        "interrupted; the same command resumes",
        uses_client=True,
        waits_for=lambda arguments: [arguments.backup],
    ),
)
