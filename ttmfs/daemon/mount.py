"""Runs the program that serves a mount. ``ttmfs mount``, mount.ttmfs, units and keepers run this file by its path.

A path leads a keeper to its program from any working directory, in a checkout as in an installed package.
"""

if __name__ == "__main__":
    import os
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    above = os.path.dirname(os.path.dirname(here))
    sys.path[:] = [path for path in sys.path if path != here]  # its modules have common names
    if above not in sys.path:  # a checkout
        sys.path.insert(0, above)
    try:
        from ttmfs.daemon.program import main
    except KeyboardInterrupt:
        sys.exit(8)
    sys.exit(main("ttmfs mount"))
