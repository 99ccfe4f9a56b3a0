#!/bin/sh
# Builds the Debian package for the release that it runs on: dist/ttmfs_VERSION+RELEASE_ARCHITECTURE.deb. It runs in a
# checkout or an unpacked sdist, without root, and asks no questions. Only the first step, which collects the libraries,
# needs a network.
set -eu
umask 022
cd "$(dirname "$0")/.."
command -v dpkg-buildpackage >/dev/null || { echo "deb: install what builds packages: apt install dpkg-dev" >&2; exit 1; }
(cd packaging && dpkg-checkbuilddeps) || { echo "deb: install these: apt build-dep ./packaging" >&2; exit 1; }

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ttmfs/version.py)
built=build/deb/ttmfs-$version
rm -rf build/deb
mkdir -p "$built"
if [ -e .git ] && command -v git >/dev/null; then
    git -c safe.directory='*' ls-files -z -co --exclude-standard
else # an unpacked sdist
    find . -path './.*' -prune -o -path ./build -prune -o -path ./dist -prune -o -type f -print0
fi | xargs -0 cp --parents -t "$built"
cp -r packaging/debian "$built/debian"
# shellcheck source=/dev/null
. /etc/os-release
release=+$(echo "$ID" | cut -c1-3)$VERSION_ID
sed -i "1s/(.*)/($version$release)/" "$built/debian/changelog"

/usr/bin/python3 -m venv build/deb/environment
pip="build/deb/environment/bin/python -m pip -q --disable-pip-version-check"
# numpy is Debian's. pyfuse3 has to be compiled, with what is in vendor/build.
needed=$(/usr/bin/python3 - <<END
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(n for n in project["dependencies"] + project["optional-dependencies"]["export"] if not n.startswith("numpy")))
END
)
# shellcheck disable=SC2086 # one word a requirement
$pip download -d "$built/debian/vendor/run" -c requirements-dev.lock --no-binary pyfuse3 $needed
$pip download -d "$built/debian/vendor/build" 'setuptools>=78.1.1' 'setuptools_scm>=8' 'cython>=3.1,<4'

(cd "$built" && DEB_BUILD_OPTIONS=noautodbgsym dpkg-buildpackage -b -us -uc)
mkdir -p dist
cp build/deb/*.deb build/deb/*.changes build/deb/*.buildinfo dist/
echo "built: $(ls dist/ttmfs_"$version$release"_*.deb)"
