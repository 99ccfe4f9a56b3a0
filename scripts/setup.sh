#!/bin/sh
# Installs what ttmfs, its demo, tests and benchmarks need: Debian packages for missing programs, then .venv. It runs as
# root or through sudo and asks no questions. A second run skips finished steps.
set -eu
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/sbin:/sbin # an ordinary user's PATH may lack them
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
packages=
need() { # PROGRAM PACKAGE
    command -v "$1" >/dev/null || packages="$packages $2"
}
apt_install() { # PACKAGE...
    echo "setup: installing $*"
    $sudo apt-get update -qq &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
need fusermount3 fuse3
need pkg-config pkg-config
need cc gcc
need c++ g++
need xxd xxd
need getfattr attr
need fio fio
need rsync rsync
need bindfs bindfs
need ps procps
need systemd-run systemd
need mandoc mandoc
need mkfs.ext4 e2fsprogs
need mkfs.xfs xfsprogs
need mkfs.btrfs btrfs-progs
need ip iproute2
need bwrap bubblewrap
need zsh zsh
need fish fish
[ -e /usr/include/fuse3/fuse.h ] || packages="$packages libfuse3-dev"

python=$(scripts/python.sh)
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    packages="$packages python3-dev"

if [ -n "$packages" ]; then
    command -v apt-get >/dev/null || { echo "setup: install these and try again:$packages" >&2; exit 1; }
    # shellcheck disable=SC2086 # one word a package
    apt_install $packages
fi

packages= # only for the tests of stores on CephFS
need ceph ceph-common
for program in ceph-mon ceph-mgr ceph-osd ceph-mds ceph-fuse; do need $program $program; done
if [ -n "$packages" ]; then
    # shellcheck disable=SC2086 # one word a package
    if command -v apt-get >/dev/null && apt_install $packages; then
        # Without a configuration they start no server, but a collector of crash reports, which tests do not need.
        [ ! -d /run/systemd/system ] || $sudo systemctl disable -q --now ceph-crash.service || :
    else
        echo "setup: Ceph cannot be installed: its tests are skipped, and fail where CI=1 is set" >&2
    fi
fi

# Makes .venv again if it is incomplete, or if its Python is gone or has another version.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install -q --disable-pip-version-check --config-settings editable_mode=compat \
    --constraint requirements-dev.lock --editable '.[dev,bench]'

# Only promtool, for the tests: the package would start a server.
if command -v promtool >/dev/null || [ -x .venv/bin/promtool ]; then
    :
elif ! command -v apt-get >/dev/null; then
    echo "setup: there is no promtool (of Prometheus), and no apt-get to install it: a test will fail" >&2
else
    deb=$(mktemp -d)
    chmod 755 "$deb"
    (
        cd "$deb"
        download() { apt-get download -qq -o APT::Sandbox::User=root "$1"; }
        fetch() { download promtool 2>/dev/null || download prometheus; } # a package of its own since Debian 13
        fetch 2>/dev/null || { $sudo apt-get update -qq && fetch; }
        dpkg-deb --fsys-tarfile ./*.deb | tar -xO ./usr/bin/promtool >promtool
    )
    install -m 755 "$deb/promtool" .venv/bin/promtool
    rm -rf "$deb"
fi
touch .venv/ready
