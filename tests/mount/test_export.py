"""``ttmfs export``: the metrics of real mounts over HTTP, mounts that do not answer, and mounts of other users."""

import contextlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import REPOSITORY, Mount, run, stopped, wait_until
from stores import ALICE, Place, as_user
from ttmfs.cli.commands import mount_metrics

TTMFS = [sys.executable, "-m", "ttmfs", "export"]
SERVER = REPOSITORY / "tests/hostile_server.py"
ENOUGH = 30.0

Samples = dict[tuple[str, str], float]
"""By name and mount."""


class Exporter:
    """A running ``ttmfs export`` on a port that the kernel chose."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stderr
        assert select.select([process.stderr], [], [], ENOUGH)[0]
        line = process.stderr.readline()
        found = re.search(r"serving (http://.*:(\d+)/metrics)", line)
        assert found, line
        self.url, self.port = found[1], int(found[2])

    def text(self, **headers: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=ENOUGH) as answer:
            body: bytes = answer.read()
            return body.decode()

    def samples(self) -> Samples:
        time.sleep(mount_metrics.FRESH)  # what is older is read again
        return samples(self.text())


@contextlib.contextmanager
def exporter(*words: object, **more: Any) -> Iterator[Exporter]:
    more = {"cwd": REPOSITORY, **more}
    command = [*more.pop("command", TTMFS), "--listen", "127.0.0.1:0", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more)
    try:
        yield Exporter(process)
        process.terminate()
        assert process.wait(ENOUGH) == 0
    finally:
        process.kill()
        _, said = process.communicate(timeout=ENOUGH)
        assert "Traceback" not in said


def samples(text: str) -> Samples:
    return {
        (sample.name, sample.labels.get("mount", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def once(*words: object, code: int = 0, **more: Any) -> str:
    """What ``ttmfs export --once`` prints, with its standard error."""
    more = {"cwd": REPOSITORY, **more}
    command = [*more.pop("command", TTMFS), "--once", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENOUGH, check=False, **more)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    text: str = done.stdout + done.stderr
    return text


def test_every_sample_of_every_mount_has_the_label_mount(tmp_path: Path) -> None:
    odd = tmp_path / 'b "q\\\n\tä'
    for path in tmp_path / "a", odd:
        path.mkdir()
    with Mount(tmp_path / "a", "size=16m") as first, Mount(odd, "size=32m") as second:
        second.expect_log("^\tä$")
        (first.path / "x").mkdir()
        (first.path / "x/1").write_bytes(b"page")
        text = once()
        run("promtool check metrics", input=text, env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"})
        found = samples(text)
        assert found["ttmfs_size_bytes", str(first.path)] == 16 << 20
        assert found["ttmfs_size_bytes", str(odd)] == 32 << 20
        assert found["ttmfs_up", str(first.path)] == found["ttmfs_up", str(odd)] == 1
        plain = {name for name, _ in samples((first.path / ".stats").read_text())}
        ours = {name for name, mount in found if mount == str(first.path)}
        assert plain <= ours, "a name was lost"
        assert not [name for name, mount in found if not mount and not name.startswith("ttmfs_export_")]


def test_a_mount_point_that_is_not_utf8_is_shown_with_escapes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(path)
    with Mount(Path(path), "size=16m"):
        assert samples(once())["ttmfs_up", rf"{tmp_path}/\xff"] == 1


def test_a_mount_point_sends_no_escape_sequence_to_a_terminal(tmp_path: Path) -> None:
    """Any user can choose a mount point."""
    path = tmp_path / "\x1b[31m"
    path.mkdir()
    words = [*TTMFS, "--once"]
    with Mount(path, "size=16m"):
        script = ["script", "-qec", shlex.join(words), "/dev/null"]
        done = subprocess.run(script, capture_output=True, timeout=30, env={**os.environ, "TERM": "xterm"}, check=True)
    assert b"\x1b" not in done.stdout
    assert b"\\e[31m" in done.stdout


def test_mounts_that_come_and_go_are_followed(tmp_path: Path, mount: Mount) -> None:
    (tmp_path / "later").mkdir()
    later = str(tmp_path / "later")
    with exporter() as everything, exporter(mount.path, later) as named:
        assert ("ttmfs_up", later) not in everything.samples()
        assert named.samples()["ttmfs_up", later] == 0
        with Mount(tmp_path / "later", "size=16m"):
            for one in everything, named:
                found = one.samples()
                assert found["ttmfs_size_bytes", later] == 16 << 20
                assert found["ttmfs_up", later] == 1
        assert ("ttmfs_up", later) not in everything.samples()
        assert named.samples()["ttmfs_up", later] == 0
        assert 'reason="absent"' in named.text()


def test_a_mount_that_hangs_or_is_dead_is_down_and_the_others_are_shown(tmp_path: Path, mount: Mount) -> None:
    (tmp_path / "bad").mkdir()
    bad = str(tmp_path / "bad")
    with exporter() as serves, Mount(tmp_path / "bad", "size=16m") as other:
        with stopped(other.process.pid, other.pid):
            for _ in range(3):
                began = time.monotonic()
                found = serves.samples()
                assert found["ttmfs_up", bad] == 0
                assert found["ttmfs_up", str(mount.path)] == 1
                assert time.monotonic() - began < 15
                assert 'reason="silent"' in serves.text()
            waiting = Path(f"/proc/{serves.process.pid}/task/{serves.process.pid}/children").read_text().split()
            assert len(waiting) <= 2, "each scrape left a process that waits"
        wait_until(lambda: serves.samples()["ttmfs_up", bad] == 1, "the mount", ENOUGH)
        other.kill_both()
        found = serves.samples()
        assert found["ttmfs_up", bad] == 0
        assert 'reason="dead"' in serves.text()


def test_the_server_bounds_what_it_is_asked(mount: Mount) -> None:
    with exporter(mount.path) as serves:
        with contextlib.ExitStack() as stack:
            for _ in range(100):  # more than it serves at once: those that ask for nothing must go
                stack.enter_context(socket.create_connection(("127.0.0.1", serves.port)))
            assert "ttmfs_up" in serves.text()
        assert "ttmfs_up" in serves.text()
        with socket.create_connection(("127.0.0.1", serves.port), timeout=ENOUGH) as idle:
            assert "ttmfs_up" in serves.text()
            idle.sendall(b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 10_000)
            with contextlib.suppress(ConnectionError):
                assert idle.recv(1) == b""
        for path, method, status in ("/", "GET", 404), ("/metrics", "POST", 405):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(
                    urllib.request.Request(serves.url.replace("/metrics", path), method=method), timeout=ENOUGH
                )
            error.value.close()
            assert error.value.code == status
        assert serves.text(Accept="application/openmetrics-text; version=1.0.0").endswith("# EOF\n")


def test_errors_are_one_line_that_says_what_to_do(mount: Mount) -> None:
    with exporter(mount.path) as serves:
        command = [*TTMFS, "--listen", f"127.0.0.1:{serves.port}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=ENOUGH, check=False)
        assert done.returncode == 2
        said = f"ttmfs export: cannot listen at 127.0.0.1:{serves.port}: Address already in use; choose another with"
        assert done.stderr.startswith(said)
        assert done.stderr.count("\n") == 1
    assert "is not ADDRESS:PORT" in once("--listen", "here", code=2)
    without = once(command=[sys.executable, "-S", "-m", "ttmfs", "export"], code=2)
    assert without.startswith("ttmfs export: this needs prometheus_client: ")
    assert without.count("\n") == 1


# --- other users ---


def test_a_user_is_told_which_mounts_are_not_shown(place: Place) -> None:
    alice = as_user(ALICE, cwd=place.path / "repository", command=[place.python, "-m", "ttmfs", "export"])
    with contextlib.ExitStack() as stack:
        closed, shared = (stack.enter_context(place.directory(name)) for name in ("closed", "shared"))
        stack.enter_context(Mount(closed, "size=16m"))
        stack.enter_context(Mount(shared, "size=16m,allow_other"))
        text = once(**alice)
        found = samples(text.partition("ttmfs export:")[0])
        assert found["ttmfs_size_bytes", str(shared)] == 16 << 20
        assert ("ttmfs_up", str(closed)) not in found, "nobody knows"
        assert f'ttmfs_export_failure{{mount="{closed}",reason="denied"}} 1.0' in text
        assert f"{closed}: is not shown to this user; mount it with allow_other, or run ttmfs export as " in text


HARMFUL = {
    "another's name": "ttmfs_up 0\n",
    "no name of ours": "node_load1 7\n",
    "no metrics": "\x1b[31m{{{{",
    "twice": "# TYPE ttmfs_backups gauge\nttmfs_backups 1\nttmfs_backups 2\n",
    "another type": "# TYPE ttmfs_size_bytes counter\nttmfs_size_bytes 1\n",
}


@contextlib.contextmanager
def served(directory: Path, **plan: Any) -> Iterator[None]:
    """A mount that Alice serves."""
    directory.mkdir()
    command = [sys.executable, str(SERVER), str(directory), str(ALICE), json.dumps(plan)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "serving\n"
        yield
    finally:
        process.kill()
        process.communicate(timeout=ENOUGH)
        run(f"umount -l {directory}")


def test_a_mount_of_a_stranger_shows_only_whether_it_answers(tmp_path: Path, mount: Mount) -> None:
    stats = 'file:# TYPE ttmfs_backups gauge\nttmfs_backups{mount="/other",x="y"} 3\n'
    with served(tmp_path / "theirs", names={".stats": stats}):
        found = samples(once())
        assert {name for name, path in found if path == f"{tmp_path}/theirs"} == {"ttmfs_up"}
        found = samples(once(tmp_path / "theirs", mount.path))
        assert found["ttmfs_backups", f"{tmp_path}/theirs"] == 3, "it was named"
        assert found["ttmfs_backups", str(mount.path)] == 0
        assert ("ttmfs_backups", "/other") not in found


@pytest.mark.parametrize("stats", [*HARMFUL, "endless"])
def test_nonsense_of_a_stranger_is_refused_as_a_whole(tmp_path: Path, mount: Mount, stats: str) -> None:
    what = "endless:ttmfs_a 1\n" if stats == "endless" else f"file:{HARMFUL[stats]}"
    with served(tmp_path / "theirs", names={".stats": what}):
        text = once(mount.path, tmp_path / "theirs")
        found = samples(text.partition("ttmfs export:")[0])
        assert found["ttmfs_up", str(mount.path)] == 1
        assert {name for name, path in found if path == f"{tmp_path}/theirs"} == {"ttmfs_up", "ttmfs_export_failure"}
        assert found["ttmfs_up", f"{tmp_path}/theirs"] == 0
        assert 'reason="invalid"' in text


def test_ctrl_c_ends_it(mount: Mount) -> None:
    command = [*TTMFS, "--listen", "127.0.0.1:0", str(mount.path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        Exporter(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(ENOUGH) == 130
        assert process.stderr
        assert process.stderr.read() == "ttmfs export: interrupted\n"
