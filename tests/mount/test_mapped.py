"""Writeback of pages that programs have mapped: ``ttmfs writeback`` has the kernel page them out in these programs."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import REPOSITORY, Mount, count, run
from stores import ALICE, Place, acting_as

PAGES, PAGE = 256, 4096
COMMAND = f"{sys.executable} -m ttmfs writeback"

PROGRAM = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), int(sys.argv[2]))
memory[:] = bytes(range(256)) * (len(memory) // 256)
print("mapped", flush=True)
sys.stdin.readline()
print(memory[:] == bytes(range(256)) * (len(memory) // 256), flush=True)
"""

pytestmark = [pytest.mark.serial, pytest.mark.usefixtures("swap")]


@contextlib.contextmanager
def mapping(file: Path) -> Iterator[None]:
    """A program that has stored PAGES pages by a mapping. At the end it finds its bytes."""
    command = [sys.executable, "-c", PROGRAM, str(file), str(PAGES * PAGE)]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdin
    assert program.stdout
    try:
        assert program.stdout.readline() == "mapped\n"
        yield
        assert program.communicate("\n", timeout=30)[0] == "True\n"
    finally:
        program.kill()
        program.communicate()


def test_root_writes_back_what_a_program_has_mapped(backup: Path) -> None:
    with mapping(backup / ".shmem"):
        assert count(backup, "resident") == PAGES
        assert run(f"{COMMAND} {backup}", cwd=REPOSITORY) == f"{backup}: 1M swapped out, 0 in memory\n"
    assert count(backup, "swapped") < PAGES, "the program has read its pages"


def test_what_two_programs_have_mapped_stays_in_memory(backup: Path) -> None:
    with mapping(backup / ".shmem"), mapping(backup / ".shmem"):
        said = run(f"{COMMAND} {backup}", cwd=REPOSITORY)
    assert f"{backup}: nothing swapped out, 1M stay in memory" in said
    assert re.search(r"pages stay in memory that several programs have mapped: python\S* \(pid \d+.*; python", said)


def test_another_user_is_told_that_root_can(place: Place) -> None:
    options = "size=16m,allow_other,mode=1777"
    with place.directory("mapped") as directory, Mount(directory, options) as mount, acting_as(ALICE):
        (mount.path / "a").mkdir()
        with mapping(mount.path / "a/.shmem"):
            said = run(f"{place.python} -m ttmfs writeback {mount.path}/a", cwd=place.path / "repository")
    assert "1 mapping; its pages stay in memory unless root runs ttmfs writeback\n" in said
    assert "nothing swapped out, 1M stay in memory" in said
