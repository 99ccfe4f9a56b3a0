#!/bin/sh
# Copies the files of a checkout or an unpacked sdist to DIR, without what was built or installed there.
set -eu
cd "$(dirname "$0")/.."
[ $# = 1 ] || { echo "files.sh DIR" >&2; exit 2; }
mkdir -p "$1"
if [ -e .git ] && command -v git >/dev/null; then
    git -c safe.directory='*' ls-files -z -co --exclude-standard
else
    find . -path './.*' -prune -o -path ./build -prune -o -path ./dist -prune -o -type f -print0
fi | xargs -0 cp --parents -t "$1"
