"""What a path answers: of pages that come and go meanwhile, of names that are too long, and of names with a dot."""

import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import opened, raises_errno

TRIES = 150


STORE_AND_DROP = """
import contextlib, os, sys
while True:
    with contextlib.suppress(FileNotFoundError):
        os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda page: os.open(page, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), set()),
        (lambda page: os.open(page, os.O_RDWR | os.O_CREAT), set()),
        (lambda page: os.open(page, os.O_WRONLY | os.O_TRUNC), {errno.ENOENT}),
        (lambda page: os.open(page, os.O_RDONLY), {errno.ENOENT}),
        (lambda page: os.truncate(page, 0), {errno.ENOENT}),
        (lambda page: page.chmod(0o644), {errno.ENOENT}),
        (lambda page: os.utime(page), {errno.ENOENT}),
        (lambda page: page.stat() and None, {errno.ENOENT}),
    ],
    ids="> <> truncating reading truncate chmod touch stat".split(),
)
def test_a_path_is_never_stale(backup: Path, ask: Callable[[Path], int | None], expected: set[int]) -> None:
    """Others store and drop the page all the time: it is there or not, at some moment of the call."""
    page, answers = backup / "1", Counter[int]()
    others = [subprocess.Popen([sys.executable, "-I", "-c", STORE_AND_DROP, str(page)]) for _ in range(2)]
    try:
        for _ in range(TRIES):
            try:
                if (fd := ask(page)) is not None:
                    os.close(fd)
                answers[0] += 1
            except OSError as error:
                answers[error.errno or 0] += 1
    finally:
        for other in others:
            other.kill()
            other.wait(30)
    page.unlink(missing_ok=True)
    assert set(answers) <= {0, *expected}, answers


def test_a_descriptor_is_stale_when_its_page_is_gone(backup: Path) -> None:
    with opened(backup / "1", os.O_RDWR | os.O_CREAT) as page:
        (backup / "1").unlink()
        for ask in (lambda: os.pread(page, 1, 0), lambda: os.pwrite(page, b"x", 0), lambda: os.ftruncate(page, 0)):
            for _ in range(3):
                with raises_errno(errno.ESTALE):
                    ask()
