"""What a path answers: pages that are stored and dropped meanwhile, names that are too long, hidden names."""

import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import Mount, opened, raises_errno, run

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
def test_a_call_by_path_never_gives_estale(backup: Path, ask: Callable[[Path], int | None], expected: set[int]) -> None:
    """Others store and drop the page all the time. The call finds it or not, as at some moment of the call."""
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


def test_a_descriptor_of_a_dropped_page_gives_estale(backup: Path) -> None:
    with opened(backup / "1", os.O_RDWR | os.O_CREAT) as page:
        (backup / "1").unlink()
        for ask in (lambda: os.pread(page, 1, 0), lambda: os.pwrite(page, b"x", 0), lambda: os.ftruncate(page, 0)):
            for _ in range(3):
                with raises_errno(errno.ESTALE):
                    ask()


LONG = "1" * 256


@pytest.mark.parametrize("name", [LONG, "." + LONG, "x" * 256, "\N{SNOWMAN}" * 86, "9" * 1000])
@pytest.mark.parametrize(
    "ask",
    [
        os.stat,
        os.mkdir,
        os.mknod,
        os.unlink,
        os.rmdir,
        lambda path: os.open(path, os.O_RDONLY),
        lambda path: os.open(path, os.O_WRONLY | os.O_CREAT),
        lambda path: os.symlink("x", path),
        lambda path: os.link(path.parent / "1", path),
        lambda path: os.rename(path.parent / "1", path),
        lambda path: os.rename(path, path.parent / "1"),
        lambda path: os.truncate(path, 0),
        lambda path: os.getxattr(path, "user.ttmfs.size"),
    ],
)
@pytest.mark.parametrize("where", ["", "a"])
def test_a_name_of_more_than_255_bytes_is_too_long_everywhere(
    shared_names: Path, where: str, ask: Callable[[Path], object], name: str
) -> None:
    with raises_errno(errno.ENAMETOOLONG):
        ask(shared_names / where / name)


@pytest.fixture(scope="module")
def shared_names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount with a page, and a backup 1."""
    with Mount(tmp_path_factory.mktemp("names"), "size=1m") as mount:
        (mount.path / "a").mkdir()
        (mount.path / "1").mkdir()
        (mount.path / "a/1").write_bytes(b"x")
        yield mount.path


def test_names_of_the_longest_length_work(shared_names: Path) -> None:
    (shared_names / ("b" * 255)).mkdir()
    (shared_names / ("b" * 255)).rename(shared_names / ("c" * 255))
    (shared_names / ("c" * 255)).rmdir()
    with raises_errno(errno.ENOENT):
        (shared_names / "a" / LONG[1:]).stat()
    with raises_errno(errno.EFBIG):
        (shared_names / "a" / LONG[1:]).touch()


def test_names_that_begin_with_a_dot_are_reserved(shared_names: Path) -> None:
    for ask in (
        lambda path: path.mkdir(),
        lambda path: path.touch(),
        lambda path: os.mknod(path),
        lambda path: (shared_names / "1").rename(path),
    ):
        with raises_errno(errno.EPERM):
            ask(shared_names / ".b")
    assert "Operation not permitted" in run(f"mv -T {shared_names}/1 {shared_names}/.b", code=1)
