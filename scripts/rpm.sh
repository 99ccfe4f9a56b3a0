#!/bin/sh
# Builds the rpm packages for the distribution that it runs on, in dist/. It runs in a checkout or an unpacked sdist,
# without root, and asks no questions. Arguments go to rpmbuild (--nodeps where its packages are not rpm's).
set -eu
umask 022
cd "$(dirname "$0")/.."
command -v rpmbuild >/dev/null || { echo "rpm: install what builds packages: dnf install rpm-build" >&2; exit 1; }
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ttmfs/version.py)
built=build/rpm
rm -rf "$built"
mkdir -p "$built/SOURCES" dist
scripts/files.sh "$built/ttmfs-$version"
scripts/vendor.sh "$built/ttmfs-$version/vendor"
tar -czf "$built/SOURCES/ttmfs-$version.tar.gz" -C "$built" "ttmfs-$version"
rpmbuild -bb --define "_topdir $PWD/$built" "$@" packaging/ttmfs.spec
cp "$built"/RPMS/*/*.rpm dist/
