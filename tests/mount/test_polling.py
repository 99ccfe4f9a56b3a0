"""The reading loop on real mounts: polling, idle mounts, and requests beside what else the daemon does."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import MOUNT_PY, Mount, count, opened, wait_until

pytestmark = pytest.mark.serial

PAGE = os.sysconf("SC_PAGE_SIZE")
BURST = 2000
MARGIN = (
    0.02  # s of processor time that a second of doing nothing may take, on a slow machine too; polling takes all of it
)


def processor_time(pid: int) -> float:
    """Seconds of processor time of a process, all its threads together."""
    times = [(task / "schedstat").read_text().split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(map(int, times)) / 1e9


def work(backup: Path, pages: int = BURST) -> None:
    with opened(backup / "1", os.O_RDWR | os.O_CREAT) as fd:
        for number in range(pages):
            data = number.to_bytes(4, "little") * (PAGE // 4)
            assert os.pwrite(fd, data, 0) == PAGE
            assert os.pread(fd, PAGE, 0) == data


def command_after(script: str) -> tuple[str, ...]:
    """mount.py, run after a script has changed its environment."""
    prelude = f"import runpy, sys\nsys.argv[0] = {str(MOUNT_PY)!r}\nsys.path.insert(0, {str(MOUNT_PY.parent)!r})\n"
    prelude += "import os\nos.environ['TTMFS_LOOP'] = 'python'\n"  # compiled code calls nothing that is replaced
    end = f"\nrunpy.run_path({str(MOUNT_PY)!r}, run_name='__main__')\n"
    return sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(script) + end


@pytest.mark.parametrize("option", ["auto", "10000"])
def test_an_idle_mount_takes_no_processor_time(mountpoint: Path, option: str) -> None:
    with Mount(mountpoint, f"size=1m,busy_poll={option}") as mount:
        (mountpoint / "a").mkdir()
        work(mountpoint / "a")
        time.sleep(0.1)
        before = processor_time(mount.pid)
        time.sleep(1)
        assert processor_time(mount.pid) - before < MARGIN


def test_the_loop_is_idle_after_requests_that_waited_together(tmp_path: Path, mountpoint: Path) -> None:
    """The last request that waits for a disk may not come back to the loop."""
    store = tmp_path / "store"
    store.mkdir()
    with Mount(mountpoint, f"store={store},size=1m") as mount, contextlib.ExitStack() as stack:
        (mountpoint / "a").mkdir()
        files = [stack.enter_context(opened(mountpoint / "a" / str(n), os.O_RDWR | os.O_CREAT)) for n in range(1, 5)]
        for _ in range(5):
            threads = [threading.Thread(target=os.fsync, args=(fd,)) for fd in files]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        time.sleep(0.1)
        before = processor_time(mount.pid)
        time.sleep(1)
        assert processor_time(mount.pid) - before < MARGIN


def test_polling_stops_within_10_ms_after_a_burst(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=1m") as mount:
        (mountpoint / "a").mkdir()
        late = []
        for _ in range(10):
            work(mountpoint / "a", 200)
            time.sleep(0.01)
            before = processor_time(mount.pid)
            time.sleep(0.1)
            late.append(processor_time(mount.pid) - before)
        assert sorted(late)[5] < MARGIN / 10, late  # of 0.1 s


def test_polling_finds_requests_and_can_be_switched_off(mountpoint: Path) -> None:
    """The gain in speed depends on the machine: make bench measures it."""
    other = mountpoint.parent / "other"
    other.mkdir()
    with Mount(mountpoint, "size=1m") as polling, Mount(other, "size=1m,busy_poll=off") as asleep:
        for mnt in polling.path, asleep.path:
            (mnt / "a").mkdir()
            work(mnt / "a")
        assert (polled(polling.path)["hits"] > 0) == (len(os.sched_getaffinity(0)) > 1)
        assert polled(asleep.path) == {"hits": 0, "misses": 0}


def polled(mnt: Path) -> dict[str, int]:
    """How often polling found a request, and how often it found none."""
    text = (mnt / ".stats").read_text()
    found = re.findall(r"^ttmfs_busy_poll_(hits|misses)_total (\d+)$", text, re.MULTILINE)
    return {name: int(times) for name, times in found}


@pytest.mark.parametrize("wait", ["trio.to_thread.run_sync(time.sleep, 1.0)", "trio.sleep(1.0)"])
def test_a_client_killed_before_its_request_is_read_blocks_no_other(mountpoint: Path, wait: str) -> None:
    """Its request is withdrawn, and the read finds nothing. Waiting requests continue."""
    flag = mountpoint.parent / "flag"
    script = f"""
        import os, time, trio
        from ttmfs.fuse import files, reading_loop
        look = reading_loop.ReadingLoop._look
        def slowly(self, seconds):
            found = self._epoll.poll(seconds)
            if any(fd == self._connection for fd, _ in found) and os.path.exists({str(flag)!r}):
                os.rename({str(flag)!r}, {str(flag) + ".found"!r})
                time.sleep(0.5)
            return look(self, 0 if found else seconds)
        reading_loop.ReadingLoop._look = slowly
        async def sync(self, fh):
            await {wait}
        files.Pages.sync = sync
    """
    with Mount(mountpoint, "size=1m", command=command_after(script)):
        backup = mountpoint / "a"
        backup.mkdir()
        (backup / "1").write_bytes(b"x")
        with _client(f"import os; fd = os.open({str(backup / '1')!r}, os.O_RDWR); os.fsync(fd); print()") as slow:
            time.sleep(0.3)  # it waits
            flag.touch()
            with _client(f"import os; os.stat({str(backup / '2')!r})") as killed:
                wait_until(lambda: Path(f"{flag}.found").exists(), "the request to be seen")
                killed.send_signal(signal.SIGKILL)
                killed.wait(5)
            assert slow.wait(5) == 0
        assert count(backup, "pages") == 1


def test_trio_is_woken_at_its_deadlines_while_requests_go_on(mountpoint: Path) -> None:
    """A sleep of 0.1 s lasts no longer beside requests that never end, and none longer after the last one."""
    told = mountpoint.parent / "told"
    script = f"""
        import os, time, trio
        from ttmfs.daemon import keeping
        async def report(self):
            while True:
                before = time.monotonic()
                await trio.sleep(0.1)
                with open({str(told)!r}, "a") as file:
                    file.write(f"{{time.monotonic() - before}}\\n")
        keeping.Keeping.report = report
    """.replace("\\\\", "\\")
    with Mount(mountpoint, "size=1m", command=command_after(script)):
        (mountpoint / "a").mkdir()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            work(mountpoint / "a", 50)
        time.sleep(1)
        lasted = [float(line) for line in told.read_text().splitlines()]
        assert len(lasted) > 10, lasted
        assert sorted(lasted)[len(lasted) // 2] < 0.15, lasted
        assert max(lasted) < 1, lasted


@contextlib.contextmanager
def _client(script: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()
