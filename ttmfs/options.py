"""The mount options, in one table for parsing, checks, ``--help`` and ``.config``; sizes; the exit codes.

``size``, ``nr_inodes``, ``mode``, ``uid`` and ``gid`` mean what they mean in tmpfs(5). fusermount3 gets the options of
mount(8) that concern the kernel. Options that concern only mount(8) and systemd are accepted and ignored.
"""

import argparse
import difflib
import enum
import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple, Self

from .version import __version__

FSYNC, WRITE = DURABLE = ("fsync", "write")
"""On a distributed store: what was fsynced outlives the machine, or each acknowledged write."""

BASE_PAGE_SIZE: int = os.sysconf("SC_PAGE_SIZE")
LARGEST_PAGE_SIZE = 2 << 20

_SUFFIXES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE_TEXT = re.compile(r"([0-9]{1,64})([kmgt]?)", re.IGNORECASE | re.ASCII)
_FRACTION_TEXT = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})([kmgt])", re.IGNORECASE | re.ASCII)
_PERCENT_TEXT = re.compile(r"([0-9]{1,3})%", re.ASCII)
_LARGEST_SIZE = 2**63 - LARGEST_PAGE_SIZE  # the largest file offset, rounded down to pages

LEAST_RAM_FOR_STANDBY = 2 << 30
"""Bytes of RAM above which a standby is the default. It takes about 30 MiB."""

AUTO_LOG = "auto"
LOGS = (AUTO_LOG, "journal", "syslog", "stderr")
LEVELS = ("debug", "info", "warning", "error")

AUTO_POLL, LONGEST_POLL = 200, 10_000  # us
_BUSY_POLLS = {"auto": AUTO_POLL, "off": 0}

_PAIRS = ("suid nosuid", "dev nodev", "exec noexec", "sync async", "atime noatime")
OPPOSITES = {one: other for pair in _PAIRS for one, other in permutations(pair.split())} | {"dirsync": ""}
"""Flags that fusermount3 3.14 passes to the kernel, each with the flag that it revokes."""

IGNORED = frozenset(
    "defaults auto noauto user nouser users owner group nofail _netdev relatime norelatime strictatime nostrictatime "
    "lazytime nolazytime diratime nodiratime silent loud".split()
)
"""Options of mount(8) and systemd that mean nothing to a filesystem, or nothing to one without access times."""

IGNORED_PREFIXES = ("x-", "X-", "comment=")


class ExitCode(enum.IntEnum):
    """The exit codes of ``ttmfs mount``. They are those of mount(8), which may be the caller."""

    meaning: str  # a sentence for --help and the manual

    OK = 0, "the mount answers; with -f: it was unmounted"
    USAGE = 1, "a wrong option or argument"
    SYSTEM = 2, "the system lacks something: /dev/fuse, fusermount3, memory, a right"
    BUG = 4, "a fault in ttmfs itself"
    INTERRUPTED = 8, "interrupted before the mount answered"
    FAILED = 32, "the mount failed"
    LEFT = 75, "left to another daemon; only a keeper sees it"

    def __new__(cls, value: int, meaning: str = "") -> Self:  # noqa: D102
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code


class OptionError(ValueError):
    """An unknown option or a wrong value. The message says what to write instead."""


def parse_size(text: str) -> int:
    """Return the bytes in ``4096``, ``64k``, ``1.5G`` (powers of 1024) or ``50%`` (of RAM, rounded up to a page).

    tmpfs rounds a percentage up too (shmem_parse_one() in mm/shmem.c). A fraction is rounded down to a byte.
    """
    if match := _PERCENT_TEXT.fullmatch(text):
        return -(-int(match[1]) * os.sysconf("SC_PHYS_PAGES") // 100) * BASE_PAGE_SIZE
    if match := _FRACTION_TEXT.fullmatch(text):
        size: int = (int(match[1] + match[2]) << _SUFFIXES[match[3].lower()]) // 10 ** len(match[2])
    elif match := _SIZE_TEXT.fullmatch(text):
        size = int(match[1]) << _SUFFIXES[match[2].lower()]
    else:
        nearest = re.fullmatch(r"([0-9.]+[kmgt])(?:i?b)", text, re.IGNORECASE | re.ASCII)
        raise OptionError(
            f"{text!r} is not a size: write bytes, or a number with k, m, g, t or % behind it"
            + (f", perhaps {nearest[1]!r}" if nearest else ", as in 1.5g")
        )
    if size > _LARGEST_SIZE:
        raise OptionError(f"{text} is larger than a file can be")
    return size


def format_size(size: int) -> str:
    """Return the shortest text that :func:`parse_size` reads as `size`, in bytes."""
    for suffix, shift in reversed(_SUFFIXES.items()):
        if size and not size % (1 << shift):
            return f"{size >> shift}{suffix}"
    return str(size)


def _parse_positive_size(text: str) -> int:
    if not (size := parse_size(text)):
        raise OptionError(
            "0 is not allowed: leave the option out for its default. For tmpfs 0 means no limit, and then a writer can "
            "use up the machine's memory"
        )
    return size


def _parse_count(text: str) -> int:
    if "%" in text or not _SIZE_TEXT.fullmatch(text):
        raise OptionError(f"{text!r} is not a number: write one such as 10000 or 64k")
    return parse_size(text)


def _parse_mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,4}", text, re.ASCII):
        raise OptionError(f"{text!r} is not a mode: write it in octal, such as 0755 or 1777")
    return int(text, 8)


def _parse_id(kind: str, look_up: Callable[[str], int], text: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII):
        if int(text) > 2**32 - 2:
            raise OptionError(f"{text} is not a {kind} id: the largest is {2**32 - 2}")
        return int(text)
    try:
        return look_up(text)
    except (KeyError, ValueError):
        raise OptionError(f"{text!r} is not a {kind} of this machine") from None


def _parse_busy_poll(text: str) -> int:
    if text in _BUSY_POLLS:
        return _BUSY_POLLS[text]
    if not re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) or not 0 < int(text) <= LONGEST_POLL:
        raise OptionError(f"{text!r} is not a time to poll: write auto, off, or microseconds from 1 to {LONGEST_POLL}")
    return int(text)


def _parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise OptionError(f"{text!r} is neither on nor off")
    return text == "on"


def _parse_durable(text: str) -> str:
    if text not in DURABLE:
        raise OptionError(
            f"{text!r} is neither fsync nor write: what was fsynced outlives the machine, or each acknowledged write"
        )
    return text


def _parse_seconds(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or int(text) < least:
        raise OptionError(f"{text!r} is not a number of seconds: write {least} or more")
    return int(text)


def _parse_log(text: str) -> str:
    if text in LOGS or (text.startswith("/") and not text.endswith("/") and "\0" not in text):
        return text
    raise OptionError(f"{text!r} is no place for a log: write {', '.join(LOGS)}, or the absolute path of a file")


def parse_level(text: str) -> str:
    """Return a level of the log as it is given. Raises OptionError for any other text."""
    if text not in LEVELS:
        raise OptionError(f"{text!r} is not a level of the log: write {', '.join(LEVELS[:-1])} or {LEVELS[-1]}")
    return text


def _format_busy_poll(longest: int) -> str:
    return next((text for text, known in _BUSY_POLLS.items() if known == longest), str(longest))


class Option(NamedTuple):
    """One row of the table: an option of ttmfs itself."""

    name: str
    value: str  # its placeholder in --help; "" for a flag, which has no value
    parse: Callable[[str], Any]
    show: Callable[[Any], str]
    help: str


def escaped(text: str) -> str:
    """Escape the commas and backslashes of a text for an ``-o`` string."""
    return re.sub(r"([\\,])", r"\\\1", text)


class _Kind(NamedTuple):
    """The kind of an option's value. The fields are those of Option."""

    value: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


_SIZE = _Kind("SIZE", parse_size, format_size)
_POSITIVE_SIZE = _Kind("SIZE", _parse_positive_size, format_size)
_COUNT = _Kind("N", _parse_count)
_MODE = _Kind("MODE", _parse_mode, "{:04o}".format)
_UID = _Kind("UID", partial(_parse_id, "user", lambda name: pwd.getpwnam(name).pw_uid))
_GID = _Kind("GID", partial(_parse_id, "group", lambda name: grp.getgrnam(name).gr_gid))
_DIRECTORY = _Kind("DIR", str, escaped)
_BUSY_POLL = _Kind("auto|off|US", _parse_busy_poll, _format_busy_poll)
_SWITCH = _Kind("on|off", _parse_switch, lambda on: "on" if on else "off")
_FLAG = _Kind("", lambda _: True)
_DURABLE = _Kind("fsync|write", _parse_durable)
_SECONDS = _Kind("SECONDS", partial(_parse_seconds, least=1))
_LOG = _Kind("auto|journal|syslog|stderr|FILE", _parse_log, escaped)
_LEVEL = _Kind("|".join(LEVELS), parse_level)
_WAIT = _Kind("SECONDS", partial(_parse_seconds, least=0))


_HAS_RAM_FOR_STANDBY = os.sysconf("SC_PHYS_PAGES") * BASE_PAGE_SIZE > LEAST_RAM_FOR_STANDBY


def _row(default: object, kind: _Kind, help_: str) -> Any:
    """Return a field of Options with its row of the table."""
    return field(default=default, metadata={"row": (*kind, help_)})


@dataclass(frozen=True)
class Options:
    """The options of one mount, complete and consistent. Sizes are bytes."""

    # __post_init__ replaces a default of 0 or None. The brackets at the end of each help text hold the default.
    size: int = _row(0, _POSITIVE_SIZE, "the most that all backups together may hold (50% of RAM)")
    nr_inodes: int | None = _row(None, _COUNT, "number of backups, plus 1; 0: no limit (pages of size)")
    store: str | None = _row(None, _DIRECTORY, "keep the backups in DIR, for good (a private tmpfs)")
    durable: str = _row("fsync", _DURABLE, "on a distributed store: what outlives the machine (fsync)")
    store_timeout: int = _row(30, _SECONDS, "on a distributed store: when a request fails that gets no answer (30)")
    store_wait: int = _row(0, _WAIT, "wait for another mount to leave the store, SECONDS at most (0)")
    mode: int | None = _row(None, _MODE, "mode of the root directory, in octal (0755)")
    uid: int | None = _row(None, _UID, "owner of the root directory (the mounting user)")
    gid: int | None = _row(None, _GID, "group of the root directory (the mounting user)")
    backup_size: int = _row(0, _POSITIVE_SIZE, "size of a backup that mkdir makes (size)")
    page_size: int = _row(BASE_PAGE_SIZE, _SIZE, "bytes a page: a power of two up to 2m (the system's)")
    uid_size: int = _row(0, _POSITIVE_SIZE, "the most that one user may store, except root (no limit)")
    reserve: int = _row(64 << 20, _SIZE, "memory and swap that storing leaves free (64m)")
    busy_poll: int = _row(AUTO_POLL, _BUSY_POLL, "how long to poll for requests (auto)")  # us at most; 0: off
    keeper: bool = _row(True, _SWITCH, "survive the daemon's death, by a second process (on)")
    standby: bool = _row(_HAS_RAM_FOR_STANDBY, _SWITCH, "keep the next daemon ready (on with more than 2g of RAM)")
    shmem: bool = _row(True, _SWITCH, "offer each backup's memory as a file, .shmem (on)")
    allow_other: bool = _row(False, _FLAG, "let other users in, as far as the mode bits allow")
    ro: bool = _row(False, _FLAG, "mount read-only")
    log: str = _row(AUTO_LOG, _LOG, "where the log goes; auto: syslog, or with -f standard error (auto)")
    log_level: str = _row("info", _LEVEL, "the least level of lines that are logged (info)")
    debug: bool = _row(False, _FLAG, "log every operation, as log_level=debug does")
    kernel: tuple[str, ...] = ()  # flags for fusermount3

    def __post_init__(self) -> None:
        """Check the values, and fill in the defaults that depend on other options."""
        self._check_numbers()
        if self.debug:
            object.__setattr__(self, "log_level", "debug")
        _parse_log(self.log)
        parse_level(self.log_level)
        if self.store is not None:
            object.__setattr__(self, "store", _directory(self.store))
        for name, own in ("mode", 0o755), ("uid", os.geteuid()), ("gid", os.getegid()):
            if self.store is None:
                if getattr(self, name) is None:
                    object.__setattr__(self, name, own)
            elif getattr(self, name) is not None:
                raise OptionError(f"{name}: store= keeps that of the directory: change it with chmod or chown")
        budget = self.size or (parse_size("50%") if self.store is None else 0)
        for name, size in ("size", budget), ("backup_size", self.backup_size or budget), ("uid_size", self.uid_size):
            # Whole pages, rounded up as tmpfs rounds its own size.
            object.__setattr__(self, name, -(-size // self.page_size) * self.page_size)

    def _check_numbers(self) -> None:
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if entry.type not in (int, int | None):
                continue
            if value is None and entry.default is None:
                continue
            if not isinstance(value, int):
                raise OptionError(f"{name}: a number is needed here, not {value!r}")
            if not 0 <= value <= _LARGEST_SIZE:
                raise OptionError(f"{name}: {value} does not lie between 0 and {_LARGEST_SIZE}")
        if self.busy_poll > LONGEST_POLL:
            raise OptionError(f"busy_poll: {self.busy_poll} is more than {LONGEST_POLL} microseconds")
        if self.nr_inodes == 1:
            raise OptionError("nr_inodes: 1 allows no backup, since the root directory counts: write 2 or more, or 0")
        if not BASE_PAGE_SIZE <= self.page_size <= LARGEST_PAGE_SIZE or self.page_size.bit_count() != 1:
            raise OptionError(
                f"page_size={format_size(self.page_size)}: must be a power of two from "
                f"{format_size(BASE_PAGE_SIZE)} to {format_size(LARGEST_PAGE_SIZE)}"
            )

    @classmethod
    def parse(cls, *texts: str) -> Self:
        r"""Read ``-o`` strings: ``name=value`` and flags, separated by commas; ``\,`` is a comma within a value.

        The last value of an option counts, as for mount(8).
        """
        values: dict[str, Any] = {}
        kernel: dict[str, None] = {}
        for word in (word for text in texts for word in split(text)):
            name, equals, value = word.partition("=")
            if option := TABLE.get(name):
                if option.value and not equals:
                    raise OptionError(f"{name} needs a value: {name}={option.value}")
                if equals and not option.value:
                    raise OptionError(f"{name} is a flag and takes no value")
                try:
                    values[name] = option.parse(value)
                except OptionError as error:
                    raise OptionError(f"{name}: {error}") from None
            elif word == "rw":
                values.pop("ro", None)
            elif word in OPPOSITES:
                kernel.pop(OPPOSITES[word], None)
                kernel[word] = None
            elif word == "remount":
                raise OptionError("a ttmfs cannot be remounted; ttmfs resize MNT SIZE changes its budget")
            elif not is_known(word):
                raise unknown(word, (*TABLE, *_OF_MOUNT))
        return cls(**values, kernel=tuple(kernel))

    def show(self) -> str:
        """Return the options that differ from their defaults, as an ``-o`` string for :meth:`parse`."""
        # Some defaults depend on other options: compare with the defaults under those.
        default = Options(page_size=self.page_size, size=self.size, store=self.store, debug=self.debug)
        plain = Options(store=self.store)
        unset = {"store": None, "size": plain.size, "page_size": plain.page_size, "debug": False}
        words = []
        for name, option in TABLE.items():
            value = getattr(self, name)
            if value != unset.get(name, getattr(default, name)):
                words.append(f"{name}={option.show(value)}" if option.value else name)
        return ",".join((*words, *self.kernel))

    def as_dict(self) -> dict[str, Any]:
        """Return every option with its value in force, for ``.config``. Some values are texts, as in ``-o``."""
        mode = None if self.mode is None else TABLE["mode"].show(self.mode)
        shown = {name: TABLE[name].show(getattr(self, name)) for name in ("busy_poll", "keeper", "standby", "shmem")}
        return {**asdict(self), "mode": mode, **shown, "kernel": list(self.kernel)}


TABLE = {entry.name: Option(entry.name, *entry.metadata["row"]) for entry in fields(Options) if entry.metadata}
"""The options of ttmfs itself, by name."""

_OF_MOUNT = frozenset({"rw", *OPPOSITES, *IGNORED})


def _directory(path: str | os.PathLike[str]) -> str:
    try:
        if os.fspath(path) and b"\0" not in os.fsencode(path):
            return os.path.abspath(path)  # the daemon changes its working directory
    except (TypeError, UnicodeEncodeError):
        pass
    raise OptionError(f"store: the path of an existing directory is needed, not {path!r}")


def split(text: str) -> list[str]:
    """Split an ``-o`` string at its commas, without empty words."""
    return [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^,\\]|\\$)+", text, re.DOTALL)]


def is_known(word: str) -> bool:
    """Whether a word of an ``-o`` string is an option of ttmfs or of mount(8)."""
    return word.partition("=")[0] in TABLE or word in _OF_MOUNT or word.startswith(IGNORED_PREFIXES)


def unknown(word: str, known: Iterable[str]) -> OptionError:
    """Return the error for an unknown option, with or without a value. It names the nearest known one."""
    match = difflib.get_close_matches(word.partition("=")[0], known, 1)
    return OptionError(f"unknown option {word!r}" + (f", perhaps {match[0]!r}" if match else ""))


def add_mount_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command that mounts."""
    parser.add_argument("source", metavar="SOURCE", nargs="?", default="ttm", help="a name for df and findmnt")
    parser.add_argument("mountpoint", metavar="MNT", help="an existing directory")
    parser.add_argument("-o", dest="options", metavar="option,...", action="append", default=[], help="see below")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground, log to stderr")
    parser.add_argument("-V", "--version", action="version", version=f"ttmfs {__version__}")


def help_text() -> str:
    """Return the description of options and exit codes for ``--help``."""
    rows = [(o.name + ("=" + o.value if o.value else ""), o.help) for o in TABLE.values()]
    width = max(len(name) for name, _ in rows)
    options = "\n".join(f"  {name:<{width}} {help_}" for name, help_ in rows)
    codes = "\n".join(f"  {code.value:<3} {code.meaning}" for code in ExitCode)
    return f"""\
options (in brackets the default):
{options}

  SIZE is a number of bytes, or a number followed by k, m, g or t (1.5g), or by % for a part of the machine's RAM.
  Options of mount(8) itself (rw, nosuid, nodev, noexec, noatime, _netdev, nofail, x-..., ...) are accepted.

exit status:
{codes}

SIGTERM, SIGINT, umount(8) and "fusermount3 -u" end the mount and release every page, except those in store=DIR.
If the daemon is killed, nothing is lost: its keeper starts another. SIGUSR1 to the keeper restarts it, to upgrade."""
