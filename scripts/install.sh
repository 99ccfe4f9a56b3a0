#!/bin/sh
# Installs ttmfs for the machine below PREFIX (/usr/local), as root: a virtual environment in lib/ttmfs, commands in
# bin/, units in lib/systemd/, manual pages and completions in share/. mount.ttmfs and mount.fuse.ttmfs go to /sbin, the
# only place where mount(8) looks for them. "uninstall" removes everything. The script asks no questions.
#
# For packages:
#   DESTDIR=DIR   writes below DIR only, with the paths that hold once DIR is /, and without pip. Root is not needed.
#   WHEELS=DIR    installs the wheels in DIR and nothing else, without a network.
#   SBIN=DIR      where the helpers go, if not to /sbin.
#   LIBDIR=DIR    where libttmfs goes, if not to PREFIX/lib.
#   UNITS=DIR     where the units go, if not to PREFIX/lib/systemd.
set -eu
umask 022 # every user may run it
cd "$(dirname "$0")/.."
prefix=${PREFIX:-/usr/local}
root=${DESTDIR:-}
sbin=${SBIN:-/sbin}
units=${UNITS:-$prefix/lib/systemd}
libdir=${LIBDIR:-$prefix/lib}
for path in "$prefix" "${root:-/}" "$sbin" "$units" "$libdir"; do
    case $path in
    /*) ;;
    *) echo "install: PREFIX, DESTDIR, SBIN, LIBDIR and UNITS must be absolute paths, not $path" >&2; exit 1 ;;
    esac
done
home=$prefix/lib/ttmfs

commands="ttmfs ttmfs-service"
helpers="mount.ttmfs mount.fuse.ttmfs"

data() { # DIRECTORY: the files below that directory of the virtual environment
    [ ! -d "$root$home/$1" ] || (cd "$root$home/$1" && find . -type f | sed 's|^\./||')
}

reload() { [ -n "$root" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload; }

c_library() { # install|uninstall: libttmfs, its header and its pkg-config file
    if ! command -v make >/dev/null || { [ "$1" = install ] && ! command -v "${CC:-cc}" >/dev/null; }; then
        echo "$1: no make or no C compiler, so libttmfs is left out" >&2
        return
    fi
    build=$(mktemp -d)
    make -s -C c "$1" PREFIX="$prefix" LIBDIR="$libdir" DESTDIR="$root" BUILD="$build"
    rm -rf "$build"
    [ -n "$root" ] || /sbin/ldconfig
}

if [ "${1:-install}" = uninstall ]; then
    [ -d "$root$home" ] || { echo "uninstall: there is no ttmfs in $root$home; set PREFIX= to where it is" >&2; exit; }
    if [ -z "$root" ]; then
        # Any user can choose a mount point: cat -v shows its control characters.
        served=$(awk '$3 == "fuse.ttmfs" { print $2 }' /proc/self/mounts | cat -v)
        [ -z "$served" ] || printf '%s\n' "uninstall: no new daemon can start for these mounts:" "$served" >&2
    fi
    for command in $commands; do
        path=$root$prefix/bin/$command
        [ "$(readlink "$path")" != "$home/bin/$command" ] || rm "$path" # only ours
    done
    data lib/systemd | while read -r unit; do rm -f "$root$units/$unit"; done
    data share | while read -r file; do rm -f "$root$prefix/share/$file"; done
    rm -f "$root$prefix/share/man/man8/mount.fuse.ttmfs.8"
    for directory in share/doc/ttmfs share/ttmfs; do
        [ ! -d "$root$prefix/$directory" ] || rmdir --ignore-fail-on-non-empty "$root$prefix/$directory"
    done
    for helper in $helpers; do
        # Only ours: the helper of another PREFIX or package stays.
        [ "$(readlink "$root$sbin/$helper")" != "$home/bin/$helper" ] || rm "$root$sbin/$helper"
    done
    c_library uninstall
    rm -rf "$root$home"
    reload
    echo "uninstalled: everything below $root$prefix, and the helpers in $root$sbin"
    exit
fi

for command in $commands; do
    path=$root$prefix/bin/$command
    if [ -e "$path" ] && [ "$(readlink "$path")" != "$home/bin/$command" ]; then
        echo "install: $path does not belong to ttmfs: remove it first, or choose another PREFIX" >&2
        exit 1
    fi
done
for helper in $helpers; do
    case $(readlink "$root$sbin/$helper" || :) in
    */lib/ttmfs/bin/"$helper") ;; # an earlier one of ours
    *)
        [ ! -e "$root$sbin/$helper" ] ||
            { echo "install: $root$sbin/$helper does not belong to ttmfs: remove it first" >&2; exit 1; }
        ;;
    esac
done

# With DESTDIR, the environment is made elsewhere, in a path that is short enough for the first line of a script.
made=$home
if [ -n "$root" ]; then
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
fi
"$made/bin/python" -m pip --version >/dev/null 2>&1 || "$(scripts/python.sh)" -m venv --clear "$made"
if [ -n "${WHEELS:-}" ]; then
    "$made/bin/python" -m pip install -q --disable-pip-version-check --no-index --no-deps "$WHEELS"/*.whl
else
    "$made/bin/python" -m pip install -q --disable-pip-version-check '.[export]'
fi
if [ -n "$root" ]; then
    "$made/bin/python" -m pip uninstall -q -y setuptools pip 2>/dev/null
    find "$made/bin" -type f ! -name '*ttmfs*' -delete
    rm -f "$made"/lib/python3*/site-packages/*.dist-info/direct_url.json "$made/lib64" "$made/.gitignore"
    # What no program uses: tests and sources of libraries, and first lines that would make scripts of modules.
    for packages in "$made"/lib/python3*/site-packages; do
        rm -rf "$packages/trio/_tests" "$packages/trio/_tools" "$packages"/pyfuse3/*.[ch] "$packages"/pyfuse3/*.p[xy][dix]
    done
    find "$made/lib" -name '*.py' -exec sed -i '1{/^#!/d}' {} +
    find "$made" -name __pycache__ -prune -exec rm -r {} +
    find "$made/bin" "$made/pyvenv.cfg" -type f -exec sed -i "s|$made|$home|g" {} +
    "$made/bin/python" -m compileall -q -s "$made" -p "$home" "$made/lib"
    rm -rf "${root:?}$home"
    mkdir -p "$root$prefix/lib"
    cp -a "$made" "$root$home"
    chmod 755 "$root$home"
fi

mkdir -p "$root$prefix/bin" "$root$sbin"
for command in $commands; do ln -sf "$home/bin/$command" "$root$prefix/bin/$command"; done
for helper in $helpers; do ln -sf "$home/bin/$helper" "$root$sbin/$helper"; done
data lib/systemd | while read -r unit; do
    install -D -m 644 "$root$home/lib/systemd/$unit" "$root$units/$unit"
    # With the program's path: without one, systemd looks only below /usr and /usr/local.
    sed -i "s|^ExecStart=ttmfs|ExecStart=$prefix/bin/ttmfs|" "$root$units/$unit"
done
data share | while read -r file; do install -D -m 644 "$root$home/share/$file" "$root$prefix/share/$file"; done
ln -sf mount.ttmfs.8 "$root$prefix/share/man/man8/mount.fuse.ttmfs.8"
c_library install
reload
echo "installed: $commands in $root$prefix/bin, libttmfs in $root$libdir, units in $root$units, $helpers in $root$sbin," \
    "manual pages in $root$prefix/share/man"
