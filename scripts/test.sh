#!/bin/sh
# Runs lint and all tests: the lower layers first, then the mount tests in two parts at once, because most of their time
# is waiting. Every part runs, whatever failed before it. The last lines name the parts that failed. Arguments go to
# pytest and select tests: scripts/test.sh tests/mount/test_swap.py -k dropped. It runs as root or through sudo.
set -u
cd "$(dirname "$0")/.."
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
# Some tests send SIGINT. Without this, a background process of a shell ignores it.
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

# Tests that measure no time and make no swap. The others take as long, and run beside only these.
beside="tests/house tests/mount/test_soak.py"
for name in abort commands errors fini hostile_mounts inherited kernel_cache kill_points matrix mount_py names rights \
    tearing texts why; do
    beside="$beside tests/mount/test_$name.py"
done
ignored=
for file in $beside; do
    ignored="$ignored --ignore=$file"
done

# Commands that look at all mounts keep them busy, so each half sees only its own mounts.
apart="$sudo unshare --mount --pid --fork --mount-proc --propagation private"

part "lower layers" $pytest tests/arithmetic tests/store tests/model tests/face
{
    part "ruff check" .venv/bin/ruff check
    part "ruff format" .venv/bin/ruff format --check
    part "mypy" .venv/bin/mypy
    part "the house, mixed load, mounts" $apart $pytest $beside
} >"$log" 2>&1 &
beside_pid=$!
part "mounts" $pytest tests/mount $ignored
wait "$beside_pid"
echo "--- beside these: lint, the tests of the house, a minute of mixed load, and the other half of the mounts' tests"
cat "$log"
if [ -s "$failed" ]; then
    echo "--- these parts failed:"
    cat "$failed"
    exit 1
fi
echo "--- all parts passed"
