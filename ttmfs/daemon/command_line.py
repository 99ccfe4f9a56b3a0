"""From the command line of a mount to its end: argv, options, process, session."""

import argparse
import logging
import os
import re
from typing import NoReturn

from ..options import TABLE, ExitCode, OptionError, Options, add_mount_arguments, help_text
from . import background, session, standby
from .mounting import MountError

__all__ = ["run"]

EXAMPLES = """\
examples:
  {name} /mnt/ttm                              at most half of the RAM
  {name} /mnt/ttm -o size=4g,backup_size=1g
  {name} pages /mnt/ttm -o store=/var/lib/ttm  with a name for df; the backups outlive the mount"""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that exits as mount(8) does."""

    def error(self, message: str) -> NoReturn:
        """Log what is wrong in one line, and exit."""
        logging.error("%s; --help lists the arguments and options", message)
        self.exit(ExitCode.USAGE)

    def parse(self) -> argparse.Namespace:
        """The arguments of the command line. Habits from other programs get a hint."""
        arguments, rest = self.parse_known_intermixed_args()
        words = [*rest, arguments.mountpoint]
        misplaced = next((match for word in words if (match := re.fullmatch(r"-{0,2}([a-z_]+)(=.*)?", word))), None)
        if misplaced and misplaced[1] in TABLE and not os.path.lexists(misplaced[0]):
            self.error(f"{misplaced[0]}: mount options follow -o, as in -o {misplaced[1]}{misplaced[2] or '=...'}")
        if "-t" in rest:
            self.error("-t is an option of mount(8): leave it and the type out")
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        found: argparse.Namespace = arguments
        return found


def run(name: str) -> int:
    """Mount, and serve the mount until it ends. `name` is the command's, for messages. Returns the exit status."""
    background.prepare(name)
    parser = _Parser(name, description="Mount a ttmfs, page backups as files, at a directory.", allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{help_text()}\n\n{EXAMPLES.format(name=name)}"
    add_mount_arguments(parser)
    try:
        arguments = parser.parse()
        options = Options.parse(*arguments.options)
        logging.getLogger().setLevel(options.log_level.upper())
        standby.wait_for_turn()
        what = arguments.source, arguments.mountpoint, options
        return session.serve(*what, background.begin(*what, foreground=arguments.foreground))
    except OptionError as error:
        parser.error(str(error))
    except MountError as error:
        logging.error("%s", error)
        return error.code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception:
        logging.exception("a fault in ttmfs; please report it with what follows")
        return ExitCode.BUG
