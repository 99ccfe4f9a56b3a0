"""Answers that are spliced: what reaches the connection, here a pipe, and what does not."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttmfs.linux.splice import FileRange, Splice

HEADER = b"sixteen bytes of"
SIZE = 512 << 10


@pytest.fixture
def connection() -> Iterator[tuple[int, int]]:
    """A pipe that holds an answer. Gives its ends to read and to write."""
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(ends[0], False)
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A sparse file of SIZE: a hole, then bytes that all differ from those beside them."""
    with (tmp_path / "file").open("w+b") as opened:
        opened.seek(SIZE // 2)
        opened.write(bytes(range(256)) * (SIZE // 512))
        opened.flush()
        yield opened.fileno()


@pytest.mark.parametrize("offset", [0, SIZE // 2, 4096 + 1])
def test_an_answer_arrives_whole(connection: tuple[int, int], file: int, offset: int) -> None:
    answers, to_kernel = connection
    splice, body = Splice(to_kernel), FileRange(file, offset, SIZE - offset)
    for _ in range(2):
        assert splice.send(HEADER, body)
        assert os.read(answers, 1 << 20) == HEADER + os.pread(file, SIZE, offset)
    splice.close()


def test_nothing_is_sent_of_a_file_that_is_shorter_than_it_was(connection: tuple[int, int], file: int) -> None:
    answers, to_kernel = connection
    splice = Splice(to_kernel)
    body = FileRange(file, SIZE // 2, SIZE)
    assert not splice.send(HEADER, body)
    with pytest.raises(BlockingIOError):
        os.read(answers, 1)
    assert splice.send(HEADER, body._replace(size=4096)), "nothing of the answer before is left"
    assert os.read(answers, 1 << 20) == HEADER + os.pread(file, 4096, SIZE // 2)
    splice.close()


def test_an_answer_too_long_for_the_pipe_is_left_to_the_caller(connection: tuple[int, int], file: int) -> None:
    os.ftruncate(file, 4 << 20)
    splice = Splice(connection[1])
    assert not splice.send(HEADER, FileRange(file, 0, 4 << 20))
    with pytest.raises(BlockingIOError):
        os.read(connection[0], 1)
    splice.close()
