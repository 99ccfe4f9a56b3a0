#!/bin/sh
# Prints the Python to use: $PYTHON, else Debian's own if it is new enough (every user can run it), else the one in PATH.
set -eu
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=/usr/bin/python3
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
echo "$python"
