#!/usr/bin/env python3
"""Mount a ttmfs from a checkout of its source: the same as ``ttmfs mount``."""

import sys

try:
    from ttmfs.daemon.program import main
except KeyboardInterrupt:
    sys.exit(8)

if __name__ == "__main__":
    sys.exit(main("mount.py"))
