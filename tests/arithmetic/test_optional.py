"""Modules that need a package which ttmfs does not depend on say which."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "lacks", "message"),
    [
        ("ttmfs.aio", "anyio", "ttmfs.aio needs anyio: pip install 'ttmfs[async]'"),
        ("ttmfs.torch", "torch", "ttmfs.torch needs PyTorch, which is not installed here: see pytorch.org"),
    ],
)
def test_an_import_without_the_package_says_what_to_install(module: str, lacks: str, message: str) -> None:
    code = f"import sys; sys.modules[{lacks!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.endswith(f"ImportError: {message}\n")
