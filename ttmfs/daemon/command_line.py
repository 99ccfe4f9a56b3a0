"""From the command line of a mount to its end: argv, options, process, session."""

import argparse
import logging
from typing import NoReturn

from ..options import ExitCode, OptionError, Options, add_mount_arguments, help_text
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


def run(name: str) -> int:
    """Mount, and serve the mount until it ends. `name` is the command's, for messages. Returns the exit status."""
    background.prepare(name)
    parser = _Parser(name, description="Mount a ttmfs, page backups as files, at a directory.", allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{help_text()}\n\n{EXAMPLES.format(name=name)}"
    add_mount_arguments(parser)
    try:
        arguments = parser.parse_intermixed_args()
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
