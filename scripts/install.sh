#!/bin/sh
# Installs ttmfs for the machine below PREFIX (/usr/local), as root: a virtual environment in lib/ttmfs, commands in
# bin/, units in lib/systemd/ and manual pages in share/man/. mount.ttmfs and mount.fuse.ttmfs go to /sbin, the only place
# where mount(8) looks for them. "uninstall" removes everything. The script asks no questions.
set -eu
umask 022 # every user may run it
cd "$(dirname "$0")/.."
prefix=${PREFIX:-/usr/local}
case $prefix in /*) ;; *) echo "install: PREFIX must be an absolute path, not $prefix" >&2; exit 1 ;; esac
home=$prefix/lib/ttmfs

commands="ttmfs ttmfs-service mount.py"
units="system/ttmfs@.service system/ttmfs.slice user/ttmfs@.service"
pages="man1/ttmfs.1 man3/ttmfs.3 man5/ttmfs.5 man8/mount.ttmfs.8"
helpers="mount.ttmfs mount.fuse.ttmfs"

c_library() { # install|uninstall: libttmfs, its header and its pkg-config file
    if ! command -v make >/dev/null || { [ "$1" = install ] && ! command -v "${CC:-cc}" >/dev/null; }; then
        echo "$1: no make or no C compiler, so libttmfs is left out" >&2
        return
    fi
    build=$(mktemp -d)
    make -s -C c "$1" PREFIX="$prefix" DESTDIR="${DESTDIR:-}" BUILD="$build"
    rm -rf "$build"
    [ -n "${DESTDIR:-}" ] || /sbin/ldconfig
}

reload() { [ ! -d /run/systemd/system ] || systemctl daemon-reload; }

if [ "${1:-install}" = uninstall ]; then
    [ -d "$home" ] || { echo "uninstall: there is no ttmfs in $home; set PREFIX= to where it is" >&2; exit; }
    served=$(awk '$3 == "fuse.ttmfs" { print $2 }' /proc/self/mounts)
    [ -z "$served" ] || echo "uninstall: no new daemon can start for these mounts: $served" >&2
    for command in $commands; do
        [ "$(readlink "$prefix/bin/$command")" != "$home/bin/$command" ] || rm "$prefix/bin/$command" # only ours
    done
    for unit in $units; do rm -f "$prefix/lib/systemd/$unit"; done
    for page in $pages; do rm -f "$prefix/share/man/$page"; done
    rm -f "$prefix/share/man/man8/mount.fuse.ttmfs.8"
    for helper in $helpers; do
        # Only ours: the helper of another PREFIX or package stays.
        [ "$(readlink "/sbin/$helper")" != "$home/bin/$helper" ] || rm "/sbin/$helper"
    done
    c_library uninstall
    rm -rf "$home"
    reload
    echo "uninstalled: everything below $prefix, and the helpers in /sbin"
    exit
fi

for command in $commands; do
    path=$prefix/bin/$command
    if [ -e "$path" ] && [ "$(readlink "$path")" != "$home/bin/$command" ]; then
        echo "install: $path does not belong to ttmfs: remove it first, or choose another PREFIX" >&2
        exit 1
    fi
done
for helper in $helpers; do
    case $(readlink "/sbin/$helper" || :) in
    */lib/ttmfs/bin/"$helper") ;; # an earlier one of ours
    *)
        [ ! -e "/sbin/$helper" ] || { echo "install: /sbin/$helper does not belong to ttmfs: remove it first" >&2; exit 1; }
        ;;
    esac
done
"$home/bin/python" -m pip --version >/dev/null 2>&1 || "$(scripts/python.sh)" -m venv --clear "$home"
"$home/bin/python" -m pip install -q --disable-pip-version-check .
mkdir -p "$prefix/bin" "$prefix/lib/systemd/system" "$prefix/lib/systemd/user"
mkdir -p "$prefix/share/man/man1" "$prefix/share/man/man3" "$prefix/share/man/man5" "$prefix/share/man/man8"
for command in $commands; do ln -sf "$home/bin/$command" "$prefix/bin/$command"; done
for unit in $units; do # with the program's path: without one, systemd looks only below /usr and /usr/local
    rm -f "$prefix/lib/systemd/$unit"
    sed "s|^ExecStart=ttmfs-service|ExecStart=$prefix/bin/ttmfs-service|" "$home/lib/systemd/$unit" >"$prefix/lib/systemd/$unit"
done
for page in $pages; do ln -sf "$home/share/man/$page" "$prefix/share/man/$page"; done
ln -sf mount.ttmfs.8 "$prefix/share/man/man8/mount.fuse.ttmfs.8"
for helper in $helpers; do ln -sf "$home/bin/$helper" "/sbin/$helper"; done
c_library install
reload
echo "installed: $commands in $prefix/bin, libttmfs in $prefix/lib, units in $prefix/lib/systemd, $helpers in /sbin, manual pages"
