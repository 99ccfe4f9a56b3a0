"""``ttmfs load``: copy a backup from a sparse file or from a stream, at the same handles.

A stream is first received into a backup of its own, MNT/NAME.loading, so that one that is cut short changes nothing.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ...client.backup import Backup
from ...errors import NoRoom, TtmfsError
from ...linux import system_calls
from ...quoting import quoted
from ..rescue import data_runs, open_file
from . import manifest
from .command import Command, CommandError, complain, reason
from .manifest import STREAM, SUFFIX, BackupPages, Chunk, FilePages, Header, Reader, Writer, chunks_of, copy, report
from .mounts import NoSuchBackup, backup_at, new_backup
from .terminal import size

__all__ = ["COMMANDS"]

PRIVATE = 0o700  # the mode of a backup until it is complete
LOADING = ".loading"


class _Copy(NamedTuple):
    """A saved copy, and how to read the pages of its chunks."""

    header: Header
    items: Iterable[manifest.Item]
    read: Callable[[Chunk], tuple[Chunk, manifest.Pages]]


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="a file that ttmfs save made, or any other; - reads a stream"
    )
    parser.add_argument("backup", metavar="MNT/NAME", nargs="?", help="the backup; made if it does not exist")
    parser.add_argument("--continue", dest="resume", action="store_true", help="resume a load that did not complete")
    parser.add_argument("--into", action="store_true", help="load into a backup with other pages, or of another user")
    parser.add_argument("--check", action="store_true", help="verify FILE, and load nothing")
    parser.add_argument("--json", action="store_true", help="report in JSON")


def _load(arguments: argparse.Namespace) -> int:
    if bool(arguments.backup) == arguments.check:
        raise CommandError("--check takes a FILE alone" if arguments.check else "give the backup, MNT/NAME")
    with contextlib.ExitStack() as stack:
        return (_check if arguments.check else _load_into)(arguments, stack)


def _check(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    name, is_sound = quoted(arguments.file), False
    try:
        _, saved = _opened(arguments.file, stack)
        if saved is None:
            raise CommandError(f"{name} cannot be checked without its manifest, {name}{SUFFIX}")
        copy(f"check {name}", saved.items, saved.read, Writer(saved.header))
        is_sound = True
    finally:
        if arguments.json:
            sys.stdout.write(json.dumps({"file": str(arguments.file), "ok": is_sound}) + "\n")
    sys.stdout.write("" if arguments.json else f"{name}: OK\n")
    return 0


def _opened(path: Path, stack: contextlib.ExitStack) -> tuple[int, _Copy | None]:
    """Open a file and its manifest, if there is one, or the stream."""
    if path == STREAM:
        reader = Reader(sys.stdin.buffer, "standard input", is_stream=True)
        return -1, _Copy(reader.header, reader.items(), FilePages(-1, 1).read)
    lines = path.with_name(path.name + SUFFIX)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        file = open_file(path.name, directory, follow=True)
        stack.callback(os.close, file)
    except FileNotFoundError as error:
        raise CommandError(f"{reason(error, path)}; give a file that ttmfs save made") from None
    except OSError as error:
        if path.is_dir():
            raise CommandError(f"{quoted(path)} is a directory; give the file first, then the backup") from None
        raise CommandError(reason(error, path)) from None
    try:
        fd = open_file(lines.name, directory)
    except FileNotFoundError:
        return file, None
    except OSError as error:
        raise CommandError(f"{quoted(lines)} is damaged: {reason(error)}") from None
    with open(fd, "rb") as opened:
        found, owner = os.fstat(file), os.fstat(fd).st_uid
        if owner not in (0, os.geteuid(), found.st_uid):
            raise CommandError(f"{quoted(lines)} belongs to another user than {quoted(path)}: see who made it")
        reader = Reader(opened, quoted(lines), is_stream=False)
        header = reader.header._replace(mode=_trusted(reader.header.mode, owner))
        if header.size != found.st_size:
            raise CommandError(f"{quoted(path)} is damaged: it has {found.st_size} bytes, and had {header.size}")
        return file, _Copy(header, list(reader.items()), FilePages(file, header.page_size).read)


def _trusted(mode: int, owner: int) -> int:
    """The mode that a file gives, or PRIVATE if the file is another user's."""
    return mode if owner in (0, os.geteuid()) else PRIVATE


def _unsaved(file: int, page_size: int) -> _Copy:
    """A sparse file without a manifest: its data become pages, its holes do not."""
    found, runs = os.fstat(file), list[tuple[int, int]]()
    for start, end in data_runs(file):
        first = start // page_size
        if runs and first <= runs[-1][1]:
            first = runs.pop()[0]
        runs.append((first, -(-end // page_size)))
    mode = found.st_mode & 0o666 | (found.st_mode & 0o444) >> 2  # a user who may read the file may enter the directory
    header = Header(page_size, -(-found.st_size // page_size) * page_size, _trusted(mode, found.st_uid))
    return _Copy(header, chunks_of(runs, page_size), FilePages(file, page_size).read)


def _load_into(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    file, saved = _opened(arguments.file, stack)
    length = saved.header.size if saved else os.fstat(file).st_size
    if not length:
        raise CommandError(f"{quoted(arguments.file)} is empty, and no backup has size 0")
    backup = None
    with contextlib.suppress(NoSuchBackup):
        backup = stack.enter_context(backup_at(arguments.backup))
        _check_usable(arguments, backup)
    if saved and arguments.file == STREAM:
        writer = _receive(arguments, saved, backup)
    else:
        is_new = backup is None
        backup = backup or stack.enter_context(_made(arguments.backup, length, is_spool=False))
        if saved is None:
            complain("load", f"{quoted(arguments.file)} has no manifest, so its pages cannot be verified")
        saved = saved or _unsaved(file, backup.page_size)
        writer = _store(arguments, saved, backup, sets_mode=is_new or arguments.resume)
    report(arguments, "loaded", writer, sys.stdout)
    return 0


def _receive(arguments: argparse.Namespace, saved: _Copy, backup: Backup | None) -> Writer:
    """Receive a stream into a new backup. When it is complete, give it the name, or copy it into `backup`."""
    path = os.path.normpath(arguments.backup)
    with _made(path + LOADING, saved.header.size, is_spool=True) as spool:
        writer = _store(arguments, saved, spool, sets_mode=backup is None)
        if backup:
            received = saved._replace(items=writer.items, read=BackupPages(spool).read)
            writer = _store(arguments, received, backup, sets_mode=arguments.resume)
            spool.fini()
        else:
            mount = spool.open_file("..", os.O_PATH | os.O_DIRECTORY)
            try:
                system_calls.rename(mount, os.path.basename(path) + LOADING, os.path.basename(path), replace=False)
            finally:
                os.close(mount)
    return writer


def _store(arguments: argparse.Namespace, saved: _Copy, backup: Backup, *, sets_mode: bool) -> Writer:
    """Store a copy. CommandError says what is there if this fails, and how to resume."""
    header, pages, name = saved.header, BackupPages(backup), quoted(arguments.file)
    if header.page_size != backup.page_size:
        found, there = size(header.page_size), size(backup.page_size)
        raise CommandError(
            f"{name} has pages of {found}, and the mount has pages of {there}: mount with page_size={found}"
        )
    try:
        if backup.size < header.size:
            backup.resize(header.size)
        complete = {chunk.runs for chunk, _ in chunks_of(backup.runs(), backup.page_size) if arguments.resume}
        writer = Writer(header)
        copy(
            f"load {quoted(arguments.backup)}", saved.items, saved.read, writer, pages.write,
            lambda chunk: chunk.runs in complete and bool(chunk.sha256) and pages.read(chunk)[0] == chunk,
        )  # fmt: skip
        if sets_mode and backup.status().st_mode & 0o777 != header.mode:
            backup.chmod(header.mode)  # last, since the mode may deny even the owner to write
    except (CommandError, TtmfsError, OSError) as error:
        where = arguments.backup if isinstance(error, TtmfsError) else arguments.file
        why, held = str(error) if isinstance(error, CommandError) else reason(error, where), "some"
        with contextlib.suppress(TtmfsError, OSError):  # the mount may be what failed
            held = str(backup.residency().pages)
        if held == "0" or not isinstance(saved.items, list):  # load ends a backup that did not receive all of a stream
            raise CommandError(f"{why}; nothing was loaded") from None
        hint = f"ttmfs load {'--into' if arguments.into else '--continue'} {name} {quoted(arguments.backup)}"
        if isinstance(error, NoRoom):
            hint = f"make room (ttmfs resize gives the mount more), then {hint}"
        raise CommandError(f"{why}; {held} pages are there. To resume, {hint}", 1) from None
    return writer


def _check_usable(arguments: argparse.Namespace, backup: Backup) -> None:
    """CommandError if the backup holds pages, or another user could read what is loaded."""
    path = quoted(arguments.backup)
    if not arguments.into and backup.status().st_uid != os.geteuid():
        raise CommandError(f"{path} belongs to another user, who could read what is loaded; --into loads it anyway")
    if not (arguments.into or arguments.resume) and backup.residency().pages:
        raise CommandError(f"{path} holds pages: --continue resumes a load, --into replaces pages of the same handles")


@contextlib.contextmanager
def _made(path: str, length: int, *, is_spool: bool) -> Iterator[Backup]:
    """Make a private backup. After a failure, end it if it is a spool or has no page."""
    with new_backup(path) as (mount, name):
        try:
            backup = Backup.create(f"/proc/self/fd/{mount.fd}/{name}", length, mode=PRIVATE)
        except (TtmfsError, OSError) as error:
            raise CommandError(reason(error, path)) from None
    with backup:
        try:
            yield backup
        except BaseException:
            with contextlib.suppress(TtmfsError, OSError):
                if is_spool or not backup.residency().pages:
                    backup.fini()
            raise


COMMANDS = (
    Command(
        "load",
        "Load a backup from what ttmfs save or ttmfs rescue made: the same pages, at the same handles. Each chunk is\n"
        "stored only if it has its SHA-256; the load stops at a damaged one. If a sparse file has no manifest, its\n"
        "data become pages, its holes do not. With - for FILE, read a stream from standard input; if it is cut short\n"
        "or damaged, nothing is loaded.\n\n"
        "A new backup has mode 0700 until it is complete, then the saved mode, unless FILE is another user's.\n"
        "--continue keeps the chunks that are there. --into keeps the mode, and the pages that FILE does not have.",
        """\
examples:
  ttmfs load /var/backups/bo7 /mnt/ttm/bo7
  ttmfs load --continue /var/backups/bo7 /mnt/ttm/bo7      after an interruption, or when there was no room
  ttmfs load --check /var/backups/bo7                      is the file sound?
  ssh host ttmfs save /mnt/ttm/bo7 - | ttmfs load - /mnt/ttm/bo7""",
        _add_load,
        _load,
        "interrupted; ttmfs load --continue resumes a load from a file",
        uses_client=True,
        waits_for=lambda arguments: [arguments.backup] if arguments.backup else [],
    ),
)
