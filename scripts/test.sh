#!/bin/sh
# Runs lint and all tests, several parts at once. A part is a test module, a linter, or all tests marked "serial" (see
# pyproject.toml), which run one after the other. Every part runs, whatever failed before it; the last lines name the
# parts that failed. Arguments go to pytest and select tests: scripts/test.sh tests/mount/test_swap.py -k dropped.
# It runs as root or through sudo.
set -u
cd "$(dirname "$0")/.."
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
# Tests send interrupts. A caller may have started this process with interrupts ignored.
pytest="env --default-signal=INT,QUIT .venv/bin/python -m pytest"
[ $# = 0 ] || exec $sudo $pytest "$@"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Some commands look at all mounts and processes, so each part sees only its own.
apart="$sudo unshare --mount --pid --fork --mount-proc --propagation private $pytest -q -p no:cacheprovider"

list_parts() { # one a line, the longest first: the size of a module hints at its duration
    echo "$apart -m serial tests"
    ls -S tests/house/test_*.py tests/mount/test_*.py | sed "s|^|$apart -m 'not serial' |"
    echo "$apart -m 'not serial' tests/arithmetic tests/store tests/model tests/face"
    # The tests above use the compiled requests if they are installed. These show that Python alone does the same.
    for module in tests/mount/test_contract.py tests/mount/test_state_machine.py; do
        [ ! -e $module ] || echo "$sudo env TTMFS_LOOP=python ${apart#sudo} -m 'not serial' $module"
    done
    echo ".venv/bin/mypy"
    echo ".venv/bin/ruff check"
    echo ".venv/bin/ruff format --check"
}

# Shows a part's output when the part ends. pytest's status 5 means that -m left no test of a module to run.
run_part='
    log=$(mktemp "$0/XXXXXX")
    "$@" >"$log" 2>&1
    status=$?
    part=${*##* -m }
    part=${part#not serial }
    case "$*" in *TTMFS_LOOP=python*) part="$part with Python alone" ;; esac
    [ $status = 0 ] || [ $status = 5 ] || echo "    $part (exit status $status)" >>"$0/failed"
    { echo "--- $part"; cat "$log"; } | flock "$0" cat
'
# A test spends much of its time waiting, so there is one worker more than there are processors.
list_parts | xargs -P "$(($(nproc) + 1))" -L 1 sh -c "$run_part" "$work"

if [ -e "$work/failed" ]; then
    echo "--- these parts failed:"
    sort "$work/failed"
    exit 1
fi
echo "--- all parts passed: $(cat "$work"/* | awk '/^[0-9]+ passed/ { n += $1 } END { print n }') tests"
