#!/bin/sh
# Builds the Debian packages for the release that it runs on: dist/*ttmfs*_VERSION+RELEASE_ARCHITECTURE.deb. It runs in a
# checkout or an unpacked sdist, without root, and asks no questions. Only the collection of the libraries needs a
# network.
set -eu
umask 022
cd "$(dirname "$0")/.."
command -v dpkg-buildpackage >/dev/null || { echo "deb: install what builds packages: apt install dpkg-dev" >&2; exit 1; }
(cd packaging && dpkg-checkbuilddeps) || { echo "deb: install these: apt build-dep ./packaging" >&2; exit 1; }

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ttmfs/version.py)
built=build/deb/ttmfs-$version
rm -rf build/deb
scripts/files.sh "$built"
cp -r packaging/debian "$built/debian"
# shellcheck source=/dev/null
. /etc/os-release
release=+$(echo "$ID" | cut -c1-3)$VERSION_ID
sed -i "1s/(.*)/($version$release)/" "$built/debian/changelog"
scripts/vendor.sh "$built/debian/vendor"

(cd "$built" && DEB_BUILD_OPTIONS=noautodbgsym dpkg-buildpackage -b -us -uc)
mkdir -p dist
cp build/deb/*.deb build/deb/*.changes build/deb/*.buildinfo dist/
echo "built: $(ls dist/ttmfs_"$version$release"_*.deb)"
