#!/bin/sh
# Lint and all tests: the lower layers first, then the mounts', and beside these what no other load disturbs.
# As root or through sudo. Asks nothing.
set -u
cd "$(dirname "$0")/.."
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
# Interruptions are sent, which what a shell starts beside itself would have ignored.
pytest="$sudo env --default-signal=INT,QUIT .venv/bin/python -m pytest"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

$pytest tests/arithmetic tests/store tests/model tests/face || exit
{ make --no-print-directory lint && $pytest tests/house tests/mount/test_soak.py; } >"$log" 2>&1 &
beside=$!
$pytest tests/mount --ignore=tests/mount/test_soak.py
status=$?
echo "--- beside these: lint, the tests of the house, and a minute of mixed load"
wait "$beside" || status=1
cat "$log"
exit "$status"
