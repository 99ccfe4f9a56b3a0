#!/bin/sh
# Collects the libraries that a package of a distribution carries, by pip: DIR/run has those that ttmfs needs, without
# numpy, and DIR/build what compiles them. The package is then built from them without a network.
set -eu
cd "$(dirname "$0")/.."
[ $# = 1 ] || { echo "vendor.sh DIR" >&2; exit 2; }
python=${PYTHON:-/usr/bin/python3}
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
pip="$environment/bin/python -m pip -q --disable-pip-version-check"
needed=$("$python" - <<END
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(n for n in project["dependencies"] + project["optional-dependencies"]["export"] if not n.startswith("numpy")))
END
)
# shellcheck disable=SC2086 # one word a requirement
$pip download -d "$1/run" -c requirements-dev.lock --no-binary pyfuse3 $needed
$pip download -d "$1/build" 'setuptools>=78.1.1' 'setuptools_scm>=8' 'cython>=3.1,<4'
