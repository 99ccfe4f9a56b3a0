#!/bin/sh
# Lint and all tests: the lower layers first, then the mounts', and beside these what no other load disturbs. Every part
# runs, whatever failed before it; the last lines name the parts that failed. Arguments are pytest's, for some tests
# alone: scripts/test.sh tests/mount/test_swap.py -k dropped. As root or through sudo. Asks nothing.
set -u
cd "$(dirname "$0")/.."
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
# Interruptions are sent, which what a shell starts beside itself would have ignored.
pytest="$sudo env --default-signal=INT,QUIT .venv/bin/python -m pytest"
[ $# = 0 ] || exec $pytest "$@"
failed=$(mktemp)
log=$(mktemp)
trap 'rm -f "$failed" "$log"' EXIT

part() { # NAME COMMAND...
    name=$1
    shift
    "$@" || echo "    $name (exit status $?)" >>"$failed"
}

part "lower layers" $pytest tests/arithmetic tests/store tests/model tests/face
{
    part "ruff check" .venv/bin/ruff check
    part "ruff format" .venv/bin/ruff format --check
    part "mypy" .venv/bin/mypy
    part "the house, mixed load" $pytest tests/house tests/mount/test_soak.py
} >"$log" 2>&1 &
beside=$!
part "mounts" $pytest tests/mount --ignore=tests/mount/test_soak.py
wait "$beside"
echo "--- beside these: lint, the tests of the house, and a minute of mixed load"
cat "$log"
if [ -s "$failed" ]; then
    echo "--- these parts failed:"
    cat "$failed"
    exit 1
fi
echo "--- all parts passed"
