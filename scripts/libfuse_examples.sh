#!/bin/sh
# Builds two C++ examples of libfuse, memfs_ll and passthrough_hp, for the benchmarks: build/libfuse-examples/bin/. The
# source is Debian's package of libfuse 3.17 or newer (3.14, in Debian 12, has no memfs_ll), from the mirror that this
# machine's apt uses; apt's own lists stay as they are. It installs g++ and dpkg-dev if they are missing, as root or
# through sudo, and asks no questions. A second run does nothing.
set -eu
cd "$(dirname "$0")/.."
suite=${SUITE:-trixie}
work=$PWD/build/libfuse-examples
examples="memfs_ll passthrough_hp"
[ "$(cat "$work/bin/suite" 2>/dev/null)" != "$suite" ] || exit 0 # built earlier

fail() {
    echo "libfuse_examples: $*" >&2
    exit 1
}
command -v apt-get >/dev/null || fail "there is no apt-get, and so no source package"
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
packages=
need() { # PROGRAM PACKAGE
    command -v "$1" >/dev/null || packages="$packages $2"
}
need g++ g++
need dpkg-source dpkg-dev
need pkg-config pkg-config
if [ -n "$packages" ]; then
    # shellcheck disable=SC2086 # one word a package
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null ||
        fail "apt cannot install$packages: apt-get update"
fi
# shellcheck disable=SC2016 # apt-get replaces the words in $()
mirror=$(apt-get indextargets --format '$(COMPONENT) $(SITE) $(REPO_URI) $(RELEASE)' 'Created-By: Packages' 'Origin: Debian' |
    awk '$1 == "main" && $4 !~ /security/ { print $3; exit }')
[ -n "$mirror" ] || fail "no mirror of Debian is among this machine's apt sources (after apt-get update)"

rm -rf "$work"
mkdir -p "$work/lists/partial" "$work/cache" "$work/bin"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
[ ! -e "$keys" ] || signed=" [signed-by=$keys]"
echo "deb-src${signed:-} $mirror $suite main" >"$work/sources.list"
apt() {
    apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)" "$@"
}
cd "$work"
echo "libfuse_examples: building $examples from Debian's source package in $work" >&2
apt update || fail "apt cannot read the source packages of $suite from $mirror"
apt source --download-only fuse3 || fail "apt cannot fetch the source package fuse3 of $suite"
dpkg-source --no-check -x fuse3_*.dsc source >log 2>&1 || fail "see $work/log"
for example in $examples; do
    [ -e "source/example/$example.cc" ] || fail "the source package fuse3 of $suite has no example/$example.cc"
done
../../.venv/bin/python -m venv tools
tools/bin/python -m pip install -q --disable-pip-version-check meson ninja
PATH=$work/tools/bin:$PATH
{
    meson setup objects source --prefix=/usr --buildtype=release --default-library=static -Dutils=false -Dtests=false
    # shellcheck disable=SC2086 # one word an example
    ninja -C objects $(printf 'example/%s ' $examples)
} >>log 2>&1 || fail "the build failed: see $work/log"
for example in $examples; do mv "objects/example/$example" bin/; done
rm -rf objects tools lists cache
echo "$suite" >bin/suite
