"""``ttmfs top``: the requests of the last seconds, by backup and by process."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from harness import Mount, attribute, raises_errno, run, stopped, wait_until
from stores import ALICE, Place, acting_as
from ttmfs.errors import BackupEnded
from ttmfs.fuse import recent_requests
from ttmfs.fuse.recent_requests import ENTRIES, LATEST, SHORT, RecentRequests
from ttmfs.linux.fuse_protocol import READ, WRITE, Request
from ttmfs.stores.time_slices import TimeSlices

TOP = f"{sys.executable} -m ttmfs top"
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("loop", ["compiled", "python"])
def test_top_shows_who_does_what_to_which_backup(mountpoint: Path, loop: str) -> None:
    environment = {**os.environ, "TTMFS_LOOP": loop}
    with Mount(mountpoint, "size=16m", env=environment) as mount:
        (mountpoint / "a").mkdir()
        page = mountpoint / "a/1"
        page.write_bytes(b"a" * PAGE)
        script = (
            f"import os, sys; fd = os.open({str(page)!r}, 0); [os.pread(fd, {PAGE}, 0) for _ in range(300)]; input()"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as reader:
            found: list[dict[str, Any]] = []

            def reads() -> bool:
                rows = json.loads(run(f"{TOP} --json {mountpoint}"))
                found[:] = [row for row in rows if row["pid"] == reader.pid and row["operation"] == "read"]
                return bool(found)

            wait_until(reads, "a read")
            (mine,) = found
            assert mine["backup"] == "a"
            assert mine["uid"] == os.geteuid()
            assert mine["command"].startswith("python")
            assert mine["per_second"] > 1
            assert mine["busy"] > 0
            text = run(f"{TOP} --once {mountpoint}")
            reader.communicate(b"\n", timeout=20)
        assert f"{reader.pid} python" in text
        lines = text.splitlines()
        assert "requests a second" in lines[0]
        assert lines[1].split() == "BACKUP PROCESS USER OPERATION PER S TIME MEAN".split()
        with stopped(mount.pid):
            assert "has not answered for 2 s" in run(f"timeout 20 {TOP} {mountpoint}", code=2)


def test_the_daemon_makes_the_sums_without_numpy(mount: Mount) -> None:
    """Imports are most of the time of a takeover."""
    attribute(mount.path, "recent")
    assert "numpy" not in Path(f"/proc/{mount.pid}/maps").read_text()


def test_a_thread_counts_for_its_process(mount: Mount, backup: Path) -> None:
    def read() -> None:
        for _ in range(20):
            (backup / "7").exists()

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    rows = json.loads(attribute(mount.path, "recent"))["requests"]
    assert any(row[1] not in (0, os.getpid()) and row[3] == "lookup" for row in rows)


def test_a_process_cannot_pass_itself_off_as_another_by_its_name(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m"):
        script = (
            "import os; fd = os.open('/proc/self/comm', 1); os.write(fd, b'\\rTgid:\\t1'); "
            f"[os.path.exists({str(mountpoint)!r} + '/x%d' % n) for n in range(50)]; print(flush=True); input()"
        )
        words = [sys.executable, "-c", script]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hostile:
            assert hostile.stdout
            hostile.stdout.readline()
            rows = json.loads(run(f"{TOP} --json {mountpoint}"))
            hostile.communicate(b"\n", timeout=20)
    assert {row["pid"] for row in rows if row["command"] == "\rTgid:\t1"} == {hostile.pid}


def test_strangers_see_no_requests(place: Place) -> None:
    with place.directory("top") as path, Mount(path, "size=1m,mode=1777,allow_other", cwd=place.path):
        with acting_as(ALICE), raises_errno(errno.EPERM):
            attribute(path, "recent")
        assert json.loads(attribute(path, "recent"))["seconds"] > 0


def test_json_is_json_also_if_no_mount_answers(mount: Mount) -> None:
    with stopped(mount.pid):
        found = json.loads(run(f"{TOP} --json {mount.path} 2>/dev/null", code=2))
    assert [row["mount"] for row in found] == [str(mount.path)]
    assert "has not answered" in found[0]["error"]


def test_a_path_that_is_no_mount_is_an_error(backup: Path) -> None:
    assert "is not a mount point of ttmfs" in run(f"{TOP} --once {backup}", code=2)


def _request(opcode: int, node: int, pid: int) -> Request:
    return Request(length=0, opcode=opcode, unique=1, node=node, uid=5, gid=5, pid=pid)


def _text(recent: RecentRequests, name_of: Callable[[int], str]) -> str:
    return trio.run(recent.text, TimeSlices(), name_of)


def test_the_sums_are_those_of_the_last_requests() -> None:
    recent, now = RecentRequests(), time.perf_counter_ns()
    recent.names = {READ: "read", WRITE: "write"}
    recent.latest.append((_request(WRITE, 9 << 30 | 1, 1), 10**9, now - recent_requests.WINDOW - 10**9))  # too old
    for n in range(10):
        recent.latest.append((_request(READ, (7 + n % 2) << 30 | n, 40 + n % 2), 10**6, now))
    recent.latest.append((_request(READ, 7 << 30, 40), SHORT, now))  # it stands for eight
    recent.latest.append((_request(WRITE, 1, 3), 10**5, now))
    recent.ring[:4] = array("Q", [7 << 30, 5 << 32 | 40, READ << 56 | 1000, now])  # as compiled code writes it
    recent.written[0] = 1

    def name_of(id: int) -> str:
        if id == 8:
            raise BackupEnded("it is gone")
        return f"backup {id}"

    assert json.loads(_text(recent, name_of))["requests"] == [
        ["backup 7", 40, 5, "read", 5 + 8 + 1, 5 * 10**6 + 8 * SHORT + 1000],
        [None, 41, 5, "read", 5, 5 * 10**6],
        [None, 3, 5, "write", 1, 10**5],
    ]
    for _ in range(LATEST):
        recent.latest.append((_request(WRITE, 1, 3), 10**6, time.perf_counter_ns()))
    full = json.loads(_text(recent, name_of))
    assert sum(row[4] for row in full["requests"]) == LATEST
    assert full["seconds"] < 5


def test_the_answer_of_many_processes_fits_into_an_attribute() -> None:
    recent, now = RecentRequests(), time.perf_counter_ns()
    for n in range(ENTRIES):
        recent.ring[4 * n : 4 * n + 4] = array("Q", [7 << 30, 5 << 32 | n + 1, READ << 56 | n, now])
    recent.written[0] = ENTRIES
    text = _text(recent, lambda _: "n" * 255)
    assert len(text) <= 65536
    found = json.loads(text)
    assert found["left_out"] + len(found["requests"]) == ENTRIES
    assert found["requests"][0][5] == ENTRIES - 1
