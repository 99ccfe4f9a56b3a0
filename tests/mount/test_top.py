"""``ttmfs top``: the requests of the last seconds, by backup and by process."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness import Mount, attribute, raises_errno, run, stopped, wait_until
from stores import ALICE, Place, acting_as
from ttmfs.errors import BackupEnded
from ttmfs.fuse import recent_requests
from ttmfs.fuse.recent_requests import ENTRIES, RecentRequests
from ttmfs.linux.fuse_protocol import READ, WRITE, Request

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
        assert lines[1].split() == "PER SECOND TIME MEAN OPERATION USER PROCESS BACKUP".split()
        with stopped(mount.pid):
            assert "has not answered for 2 s" in run(f"timeout 20 {TOP} {mountpoint}", code=2)


def test_a_thread_counts_for_its_process(mount: Mount, backup: Path) -> None:
    def read() -> None:
        for _ in range(20):
            (backup / "7").exists()

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    rows = json.loads(attribute(mount.path, "recent"))["requests"]
    assert any(row[1] not in (0, os.getpid()) and row[3] == "lookup" for row in rows)


def test_strangers_see_no_requests(place: Place) -> None:
    with place.directory("top") as path, Mount(path, "size=1m,mode=1777,allow_other", cwd=place.path):
        with acting_as(ALICE), raises_errno(errno.EPERM):
            attribute(path, "recent")
        assert json.loads(attribute(path, "recent"))["seconds"] > 0


def test_a_path_that_is_no_mount_is_an_error(backup: Path) -> None:
    assert "is not a mount point of ttmfs" in run(f"{TOP} --once {backup}", code=2)


def _request(opcode: int, node: int, pid: int) -> Request:
    return Request(length=0, opcode=opcode, unique=1, node=node, uid=5, gid=5, pid=pid)


def test_the_ring_has_the_sums_of_its_last_entries() -> None:
    ring, now = RecentRequests(), time.perf_counter_ns()
    ring.names = {READ: "read", WRITE: "write"}
    ring.note(_request(WRITE, 9 << 30 | 1, 1), 10**9, now - recent_requests.WINDOW - 10**9)  # too old
    for n in range(ENTRIES - 2):
        ring.note(_request(READ, (7 + n % 2) << 30 | n, 40 + n % 2), 100, now)
    ring.note(_request(WRITE, 1, 3), 7, now)

    def name_of(id: int) -> str:
        if id == 8:
            raise BackupEnded("it is gone")
        return f"backup {id}"

    found = json.loads(ring.text(name_of))
    assert found["requests"] == [
        ["backup 7", 40, 5, "read", ENTRIES // 2 - 1, 100 * (ENTRIES // 2 - 1)],
        [None, 41, 5, "read", ENTRIES // 2 - 1, 100 * (ENTRIES // 2 - 1)],
        [None, 3, 5, "write", 1, 7],
    ]
    for _ in range(2):
        ring.note(_request(WRITE, 1, 3), 7, time.perf_counter_ns())
    full = json.loads(ring.text(name_of))
    assert sum(row[4] for row in full["requests"]) == ENTRIES
    assert full["seconds"] < 5


def test_the_answer_of_many_processes_fits_into_an_attribute() -> None:
    ring = RecentRequests()
    for n in range(ENTRIES):
        ring.note(_request(READ, 7 << 30, n + 1), n, time.perf_counter_ns())
    text = ring.text(lambda _: "n" * 255)
    assert len(text) <= 65536
    found = json.loads(text)
    assert found["left_out"] + len(found["requests"]) == ENTRIES
    assert found["requests"][0][5] == ENTRIES - 1
