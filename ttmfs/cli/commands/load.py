"""``ttmfs load``: a backup from a sparse file, at the same handles.

It keeps no journal: a part of the backup that has the digest it should have is left as it is, so a load that was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import NoRoom, TtmfsError
from ...model.arguments import flat
from ...quoting import quoted
from ..rescue import BLOCK, CHECKSUMS, Digest, data_runs, digests_of, line_of, open_file, total_of
from .command import Command, CommandError, complain, reason
from .manifest import (
    MANIFEST,
    Manifest,
    Part,
    Runs,
    Source,
    by_part,
    fill,
    in_threads,
    longest_manifest,
    manifest_of,
    matches,
    report,
)
from .mounts import NoSuchBackup, backup_at, new_backup
from .terminal import ProgressBar, size

if TYPE_CHECKING:
    from ...client.backup import Backup

__all__ = ["COMMANDS"]

PRIVATE = 0o700
"""The mode of a backup until all of it is loaded."""


class _Damaged(CommandError):
    """A file that is not what was saved."""


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
            directory = os.open(arguments.file.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, directory)
            file = open_file(arguments.file.name, directory, follow=True)
        except OSError as error:
            raise CommandError(reason(error, arguments.file)) from None
        stack.callback(os.close, file)
        try:
            known = _known(arguments.file, directory, file)
            return _check(arguments, file, known) if arguments.check else _loaded(arguments, file, known)
        except _Damaged:
            if arguments.check and arguments.json:
                sys.stdout.write(_checked(arguments.file, ok=False) + "\n")
            raise


def _known(path: Path, directory: int, file: int) -> Manifest | dict[int, Digest] | None:
    """What is known of a file: its manifest; or the digests of a rescue, which are compared here; or nothing.

    Both lie in its directory, which others may write to: neither may be a stranger's.
    """
    length, name, owner = os.fstat(file).st_size, quoted(path), os.fstat(file).st_uid
    try:
        manifest = _read_manifest(manifest_of(path), directory, length, owner)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{quoted(manifest_of(path))} is damaged ({reason(error)}): without it, {name} can be loaded unchecked"
        ) from None
    else:
        if manifest.size != length:
            raise _Damaged(f"{name} is damaged: it has {length} bytes, and had {manifest.size} when saved")
        return manifest
    if not (line := line_of(path.name, directory, (0, os.geteuid(), owner))):
        return None
    digests = digests_of(file)
    if (*total_of(digests), length) != line:
        raise _Damaged(f"{name} is damaged: its checksum is not the one in {quoted(path.parent / CHECKSUMS)}")
    return digests


def _read_manifest(path: Path, directory: int, length: int, owner: int) -> Manifest:
    """The manifest of a file of `length` bytes of `owner`. OSError and ValueError if there is none to be believed."""
    with open(open_file(path.name, directory), "rb") as file:
        whose, most = os.fstat(file.fileno()).st_uid, longest_manifest(length)
        if not _is_trusted(whose) and whose != owner:
            raise CommandError(f"{quoted(path)} is another user's than the file that it is about: see who put it there")
        data = file.read(most + 1)
        if len(data) > most:
            raise ValueError("it is longer than that of such a file")
        manifest = Manifest.parse(data)
    return manifest if _is_trusted(whose) else replace(manifest, mode=PRIVATE)


def _is_trusted(uid: int) -> bool:
    """Whether a file of theirs may say whom to let in."""
    return uid in (0, os.geteuid())


def _check(arguments: argparse.Namespace, file: int, known: Manifest | dict[int, Digest] | None) -> int:
    """``--check``."""
    name = quoted(arguments.file)
    if known is None:
        raise CommandError(f"{name} has no checksum beside it: neither {name}{MANIFEST} nor a line of {CHECKSUMS}")
    if isinstance(known, Manifest):  # a rescue's was compared as a whole
        parts, page_size = known.parts.values(), known.page_size
        sound = [is_sound for _, is_sound in in_threads(lambda part: matches(file, part, page_size), parts)]
        if damaged := sound.count(False):
            raise _Damaged(f"{name} is damaged: {damaged} of {len(sound)} parts of 16 MiB", 1)
    sys.stdout.write((_checked(arguments.file, ok=True) if arguments.json else f"{name}: OK") + "\n")
    return 0


def _checked(file: Path, *, ok: bool) -> str:
    """What --check --json says."""
    return json.dumps({"file": str(file), "ok": ok})


def _loaded(arguments: argparse.Namespace, file: int, known: Manifest | dict[int, Digest] | None) -> int:
    name, path = quoted(arguments.file), arguments.backup
    if not (length := os.fstat(file).st_size):
        raise CommandError(f"{name} is empty: no backup spans nothing")
    with contextlib.ExitStack() as stack:
        is_new = False
        try:
            backup = stack.enter_context(backup_at(path))
        except NoSuchBackup:
            is_new = True
            backup = stack.enter_context(_made(path, length))
        try:
            manifest = _manifest_to_load(name, file, known, backup.page_size)
            if known is None:
                complain("load", f"{name} has no checksum beside it: nothing tells whether it is sound")
            return _Loading(arguments, file, backup, manifest, is_new=is_new).run()
        except BaseException:
            if is_new:
                _end_if_empty(backup)
            raise


@contextlib.contextmanager
def _made(path: str, length: int) -> Iterator[Backup]:
    """A new backup, open."""
    with new_backup(path) as (mount, name):
        from ...client.backup import Backup

        try:
            backup = Backup.create(f"/proc/self/fd/{mount.fd}/{name}", length, mode=PRIVATE)
        except (TtmfsError, OSError) as error:
            raise CommandError(reason(error, path)) from None
    with backup:
        yield backup


def _end_if_empty(backup: Backup) -> None:
    with contextlib.suppress(TtmfsError, OSError):  # what is in the way of that was in the way before
        if not backup.residency().pages:
            backup.fini()


def _manifest_to_load(name: str, file: int, known: Manifest | dict[int, Digest] | None, page_size: int) -> Manifest:
    """The manifest of a file: its own; or of what has none, wherever it has data."""
    if isinstance(known, Manifest):
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
    parts = {number: Part(number, runs, digests.get(number)) for number, runs in by_part(runs, page_size).items()}
    mode = found.st_mode & 0o666
    mode |= (mode & 0o444) >> 2  # who may read a file may enter a directory
    return Manifest(page_size, found.st_size, mode if _is_trusted(found.st_uid) else PRIVATE, parts)


class _Loading:
    """A load under way."""

    def __init__(
        self, arguments: argparse.Namespace, file: int, backup: Backup, manifest: Manifest, *, is_new: bool
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
        if (self._is_new or not self._arguments.into) and self._backup.status().st_uid != os.geteuid():
            raise CommandError(
                f"{self._path} is another user's, who could read what is loaded: --into does it all the same"
            )
        before = self._backup.residency().pages
        if before and not self._goes_on:
            raise CommandError(
                f"{self._path} holds pages: --continue goes on with a load that was interrupted, "
                "--into stores over what is there"
            )
        stored: dict[int, Part] = {}
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
        report(self._arguments, done, "loaded", damaged=sum(part.pages for part in damaged))
        return 1 if damaged else 0

    def _store(self, stored: dict[int, Part]) -> None:
        """Store the parts, each of which is added to `stored` once it is."""
        manifest, page_size = self._manifest, self._backup.page_size
        with ProgressBar(f"load {self._path}", manifest.pages * page_size) as progress:
            for part, (done, was_there) in in_threads(self._stored, manifest.parts.values()):
                if done:
                    stored[done.number] = done
                progress.advance(part.pages * page_size, skipped=was_there or not done)
            if self._arguments.verify:
                progress.note("reading it back")
                self._verify(stored.values())

    def _let_in(self) -> None:
        """Give the backup its mode, which may shut out even its owner from storing: so last of all."""
        if self._backup.status().st_mode & 0o777 != self._manifest.mode:
            self._backup.chmod(self._manifest.mode)

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

    def _tell(self, damaged: list[Part]) -> None:
        name = quoted(self._arguments.file)
        for part in damaged:
            ranges = part.ranges if len(part.ranges) <= 60 else f"{part.runs[0][0] + 1} to {part.runs[-1][1]}"
            complain("load", f"{name} is damaged: pages of the handles {ranges} were not stored")

    def _stored(self, part: Part) -> tuple[Part | None, bool]:
        """Store a part, None if it is damaged and nothing was stored; and whether it was there already."""
        import numpy as np

        backup, page_size = self._backup, self._backup.page_size
        if self._goes_on and part.digest and self._is_there(part):
            return part, True
        pages = [np.zeros((past - first, page_size), np.uint8) for first, past in part.runs]
        starts = [first * page_size for first, _ in part.runs]
        try:
            for start, those in zip(starts, pages, strict=True):
                fill(self._file, flat(those)[: max(0, self._end - start)], start)  # the last page may not be whole
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

    def _is_there(self, part: Part) -> bool:
        with Source(self._backup, self._backup.size) as source:
            return source.digest(part) == part.digest

    def _verify(self, parts: Iterable[Part]) -> None:
        for part, is_there in in_threads(self._is_there, parts):
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
        waits_for=lambda arguments: [arguments.backup] if arguments.backup else [],
    ),
)
