#!/bin/sh
# Installs ttmfs for the machine below PREFIX (/usr/local), as root: a virtual environment of its own in lib/ttmfs, its
# commands in bin/ and its units in lib/systemd/. "uninstall" takes all that away again. Asks nothing.
set -eu
umask 022 # every user is to run it
cd "$(dirname "$0")/.."
prefix=${PREFIX:-/usr/local}
home=$prefix/lib/ttmfs

commands="ttmfs ttmfs-service mount.py"
units="system/ttmfs@.service system/ttmfs.slice user/ttmfs@.service"

reload() { [ ! -d /run/systemd/system ] || systemctl daemon-reload; }

if [ "${1:-install}" = uninstall ]; then
    for command in $commands; do rm -f "$prefix/bin/$command"; done
    for unit in $units; do rm -f "$prefix/lib/systemd/$unit"; done
    rm -rf "$home"
    reload
    exit
fi

"$home/bin/python" -m pip --version >/dev/null 2>&1 || "$(scripts/python.sh)" -m venv --clear "$home"
"$home/bin/python" -m pip install -q --disable-pip-version-check .
mkdir -p "$prefix/bin" "$prefix/lib/systemd/system" "$prefix/lib/systemd/user"
for command in $commands; do ln -sf "$home/bin/$command" "$prefix/bin/$command"; done
for unit in $units; do ln -sf "$home/lib/systemd/$unit" "$prefix/lib/systemd/$unit"; done
reload
echo "installed: $commands in $prefix/bin, units in $prefix/lib/systemd"
