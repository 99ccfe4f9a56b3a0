#!/usr/bin/env python3
"""Mount a ttmfs, page backups as files, at a directory."""

import argparse
import logging
import os
import re
import sys
from typing import NoReturn

try:
    from ttmfs.daemon.inherited import raise_limits

    raise_limits()  # under the caller's limits the imports below may fail
    from ttmfs.daemon import background, session, standby
    from ttmfs.daemon.mounting import MountError
    from ttmfs.options import ExitCode, OptionError, Options, help_text
    from ttmfs.version import __version__
except (ImportError, MemoryError, SystemError) as error:
    # The dynamic linker reports a lack of memory as an ImportError, in several wordings, and Python as a SystemError.
    if isinstance(error, ImportError) and not {"map", "memory"} & set(re.split(r"\W+", str(error))):
        sys.stderr.write(f"mount.py: {error}. Run make once, then .venv/bin/python mount.py\n")
    else:  # there may be no memory to format a text
        os.write(2, b"mount.py: there is too little memory to start; ulimit -v and ulimit -d may limit it\n")
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(8)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that exits as mount(8) does."""

    def error(self, message: str) -> NoReturn:
        """Log what is wrong in one line, and exit."""
        logging.error("%s; --help lists the arguments and options", message)
        self.exit(ExitCode.USAGE)


def main() -> int:
    """Mount, and serve the mount until it ends. Returns the exit status."""
    background.prepare()
    parser = Parser("mount.py", description=__doc__, epilog=help_text(), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", nargs="?", default="ttm", help="a name for df and findmnt")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    parser.add_argument("-o", dest="options", metavar="option,...", action="append", default=[], help="see below")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground, log to stderr")
    parser.add_argument("-V", "--version", action="version", version=f"ttmfs {__version__}")
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


if __name__ == "__main__":
    sys.exit(main())
