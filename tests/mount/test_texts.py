""".stats and .config: each opening has one text, and its size."""

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Mount, opened, run, wait_until

TEXTS = ".stats", ".config"


@pytest.mark.parametrize("name", TEXTS)
def test_copies_of_a_text_are_complete(mnt: Path, tmp_path: Path, name: str) -> None:
    (mnt / "a").mkdir()
    copies: list[Callable[[Path], object]] = [
        lambda target: shutil.copyfile(mnt / name, target),
        lambda target: run(f"cp {mnt / name} {target}"),
        lambda target: run(f"dd if={mnt / name} of={target} bs=100 status=none"),
        lambda target: run(f"cat {mnt / name} > {target}"),
        lambda target: sent(mnt / name, target),
    ]
    for number, copy in enumerate(copies):
        copy(tmp_path / str(number))
        text = (tmp_path / str(number)).read_text()
        assert text.endswith("\n")
        if name == ".config":
            assert json.loads(text)["backup_size"]
        else:
            assert "ttmfs_serving_since_seconds" in text.splitlines()[-1]


def sent(source: Path, target: Path) -> None:
    with opened(source, os.O_RDONLY) as fd, target.open("wb") as to:
        while os.sendfile(to.fileno(), fd, None, 4096):
            pass


@pytest.mark.parametrize("name", TEXTS)
def test_the_file_size_is_the_length_of_the_text(mnt: Path, name: str) -> None:
    assert (mnt / name).stat().st_size > 100
    with opened(mnt / name, os.O_RDONLY) as fd:
        assert os.fstat(fd).st_size == (mnt / name).stat().st_size == len(os.pread(fd, 1 << 20, 0))


def test_each_reader_in_pieces_gets_one_version_of_a_text(mnt: Path) -> None:
    (mnt / "a").mkdir()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(opened(mnt / ".stats", os.O_RDONLY)) for _ in range(100)]
        firsts = [os.read(fd, 700) for fd in readers]
        for n in range(50):  # the counters go on
            (mnt / f"a/{n + 1}").write_bytes(b"x")
        for fd, first in zip(readers, firsts, strict=True):
            text = first
            while piece := os.read(fd, 700):
                text += piece
            assert whole(text)
            assert os.pread(fd, 1 << 20, 0) == text


def whole(text: bytes) -> bool:
    """Whether a text's histograms agree with themselves. Pieces of two texts would not."""
    found = {}
    for line in text.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    for name, total in found.items():
        if 'le="+Inf"' in name:
            operation = name.partition('operation="')[2].partition('"')[0]
            assert found[f'ttmfs_operation_duration_seconds_count{{operation="{operation}"}}'] == total
    return text.endswith(b"\n") and len(found) > 50


def test_a_text_read_across_restarts_is_one_version_or_estale(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        mount.expect_restarts()
        for n in range(3):
            with (
                opened(mountpoint / ".stats", os.O_RDONLY) as half,
                opened(mountpoint / ".stats", os.O_RDONLY) as all_of_it,
            ):
                os.read(half, 700)
                text = os.read(all_of_it, 1 << 20)
                assert whole(text)
                mount.kill()
                wait_until(lambda n=n: mount.restarts() == n + 1, "another daemon")  # type: ignore[misc]
                with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                    os.read(half, 700)
                with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                    os.read(all_of_it, 700)
                os.lseek(half, 0, os.SEEK_SET)
                again = b""
                while piece := os.read(half, 700):
                    again += piece
                assert whole(again)


def test_many_readers_at_once_each_get_a_whole_text(mnt: Path) -> None:
    def read(_: int) -> bool:
        with opened(mnt / ".stats", os.O_RDONLY) as fd:
            text = b""
            while piece := os.read(fd, 900):
                text += piece
        return whole(text)

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert all(pool.map(read, range(256)))
