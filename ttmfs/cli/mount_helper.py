"""The helpers that mount(8), fstab and systemd run: ``/sbin/mount.ttmfs`` and ``/sbin/mount.fuse.ttmfs``.

::

    mount.ttmfs SOURCE DIRECTORY [-sfnrwv] [-N NAMESPACE] [-o OPTION,...] [-t TYPE]

The command line is that of mount(8), section EXTERNAL HELPERS; ``-f`` there means *fake*. This program translates it
into a command line of ``ttmfs mount`` and executes its program. mount(8) is set-user-ID, but runs helpers with the
caller's privileges. So fusermount3 decides what an ordinary user may do, as without mount(8).
"""

import argparse
import errno
import os
import shutil
import stat
import sys
from typing import NoReturn

from ..linux import fuse_device
from ..options import ExitCode, OptionError, Options, escaped, is_known, split
from ..quoting import plain
from ..version import __version__
from . import mount_program

__all__ = ["main"]

NAME = "mount.ttmfs"
TYPES = ("ttmfs", "fuse.ttmfs")

REMOUNT = (
    "a ttmfs cannot be remounted. To change its budget: ttmfs resize {directory} SIZE. "
    "To change another option, unmount it, which releases its pages, and mount it again"
)

NAMESPACE = (
    "-N is refused: mounting would run Python and fusermount3 of the other mount namespace with your privileges, and "
    "its owner may have replaced them. If you trust that namespace, enter it yourself: "
    "nsenter --mount --target PID mount -t ttmfs SOURCE DIRECTORY"
)


class _Error(Exception):
    """Why nothing is mounted. The text is shown to the user."""

    def __init__(self, text: str, code: ExitCode) -> None:
        super().__init__(text)
        self.code = code


class _Parser(argparse.ArgumentParser):
    """It exits with the status that mount(8) documents."""

    def error(self, message: str) -> NoReturn:
        raise _Error(message, ExitCode.USAGE)


def main() -> int:
    """Execute the program that mounts, or return an exit status of mount(8)."""
    try:
        return _run(_parser().parse_intermixed_args())
    except (OptionError, _Error) as error:
        code = getattr(error, "code", ExitCode.USAGE)
        _say(f"{error}{'; see mount.ttmfs(8)' * (code == ExitCode.USAGE)}")
        return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(NAME, description="Mount a ttmfs. mount(8) runs this program.", allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help="a name for df and findmnt")
    parser.add_argument("directory", metavar="DIRECTORY", help="where to mount")
    parser.add_argument("-f", dest="fake", action="store_true", help="check, and mount nothing")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="tolerate unknown options")
    parser.add_argument("-n", dest="no_mtab", action="store_true", help="ignored: there is no mtab")
    parser.add_argument("-v", dest="verbose", action="store_true", help="print the command that mounts")
    parser.add_argument("-r", dest="words", action="append_const", const="ro", help="the same as -o ro")
    parser.add_argument("-w", dest="words", action="append_const", const="rw", help="the same as -o rw")
    parser.add_argument("-o", dest="words", action="append", metavar="option,...", help="see mount.ttmfs(8)")
    parser.add_argument("-N", dest="namespace", help="refused: enter the namespace with nsenter(1)")
    parser.add_argument("-t", dest="type", choices=TYPES, metavar="TYPE", help=" or ".join(TYPES))
    parser.add_argument("-V", "--version", action="version", version=f"ttmfs {__version__}")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.namespace:
        raise _Error(NAMESPACE, ExitCode.FAILED)
    words = _words(arguments.words or [], sloppy=arguments.sloppy)
    if "remount" in words:
        raise _Error(REMOUNT.format(directory=arguments.directory), ExitCode.FAILED)
    options = Options.parse(*map(escaped, words))
    given = ["-o", ",".join(map(escaped, words))] if words else []
    command = mount_program.command(*given, "--", arguments.source, arguments.directory)
    if arguments.verbose:
        _say(" ".join(command))
    if arguments.fake:
        _check(arguments.directory, options)
        return ExitCode.OK
    try:
        os.execv(command[0], command)
    except OSError as error:
        raise _Error(f"{command[0]}: {error.strerror}; install ttmfs again", ExitCode.BUG) from None


def _words(texts: list[str], *, sloppy: bool) -> list[str]:
    """The options without ``user=``, and with `sloppy` without unknown ones."""
    words = [word for text in texts for word in split(text)]
    # Some versions of mount(8) add user=, the user who may unmount, for their own use.
    words = [word for word in words if not word.startswith("user=")]
    return [word for word in words if not sloppy or word == "remount" or is_known(word)]


def _check(directory: str, options: Options) -> None:
    """Check what can be checked without mounting."""
    _check_directory(directory)
    if options.store:
        _check_directory(options.store)
    if not shutil.which("fusermount3"):
        raise _Error("fusermount3 is not installed; install the package fuse3", ExitCode.SYSTEM)
    if error := fuse_device.error():
        raise _Error(f"{fuse_device.PATH} cannot be opened: {error}; {fuse_device.ADVICE}", ExitCode.SYSTEM)


def _check_directory(path: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise _Error(f"{path} is not a directory", ExitCode.FAILED)
    except FileNotFoundError:
        raise _Error(f"{path} does not exist; make it first: mkdir {path}", ExitCode.FAILED) from None
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # a dead mount, which ttmfs mount removes if it is a ttmfs
            raise _Error(f"{path}: {error.strerror}", ExitCode.FAILED) from None


def _say(text: str) -> None:
    sys.stderr.write(f"{NAME}: {plain(text)}\n")
