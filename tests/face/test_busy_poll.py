"""Polling for the next request, on a pipe in place of the kernel: how long it polls, and when it does not."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ttmfs.fuse.busy_poll import FIRST_WINDOW, LONGEST_PAUSE, PAUSE, BusyPoll

pytestmark = pytest.mark.serial

LONGEST = 50_000_000  # ns; longer than any wait of the machine for its processors is likely to be


class Loop:
    """A pipe, and a loop that reads it as the daemon's does: it polls, and then sleeps."""

    def __init__(self, longest: int = LONGEST, *, pauses: bool = False) -> None:
        self.reads, self.writes = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.reads, False)
        self.counts = [0, 0, 0, 0]  # hits, ns of hits, misses, ns of misses
        self.poll = BusyPoll(longest, self.counts)
        self.sleeps = 0
        if not pauses:  # other processes that need the CPU do not make polling pause
            self.poll._pause = lambda now: None  # type: ignore[method-assign]  # noqa: ARG005

    def close(self) -> None:
        os.close(self.reads)
        os.close(self.writes)

    def read(self) -> int | None:
        try:
            return len(os.read(self.reads, 1))
        except BlockingIOError:
            return None

    def next(self) -> None:
        """Wait for a request, and read it."""
        if self.poll.poll(self.read) is None:
            self.sleeps += 1
            while self.read() is None:
                time.sleep(0.0001)
            self.poll.woken()

    def request_in(self, seconds: float) -> None:
        threading.Timer(seconds, os.write, (self.writes, b".")).start()

    def grow(self) -> None:
        """Send requests that come a little later than the window, until the window has its greatest length."""
        while self.poll._window < LONGEST:
            self.request_in(self.poll._window / 1e9 + 0.0005)
            self.next()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def one_cpu() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def test_the_loop_sleeps_before_the_first_request(loop: Loop) -> None:
    loop.request_in(0.001)
    loop.next()
    assert loop.sleeps == 1
    assert loop.counts == [0, 0, 0, 0], "nothing was polled for"


def test_requests_that_come_soon_are_found_by_polling(loop: Loop) -> None:
    loop.grow()
    before = loop.sleeps
    for _ in range(20):
        loop.request_in(0.0005)
        loop.next()
    assert loop.sleeps - before < 10, "most are found awake"
    assert loop.counts[0] > 10


def test_the_polling_window_shrinks_to_zero_without_requests(loop: Loop) -> None:
    loop.grow()
    before = time.thread_time()
    assert loop.poll.poll(loop.read) is None
    assert time.thread_time() - before < 2 * LONGEST / 1e9, "it was polled for no longer than the longest window"
    time.sleep(LONGEST / 1e9)
    loop.poll.woken()
    assert loop.poll._window == 0
    counts = list(loop.counts)
    loop.request_in(0.001)
    loop.next()
    assert loop.counts == counts, "and not at all after that"


def test_the_polling_window_never_exceeds_the_option() -> None:
    loop = Loop(FIRST_WINDOW // 2)
    for _ in range(20):
        loop.request_in(0.00001)
        loop.next()
        assert loop.poll._window <= FIRST_WINDOW // 2
    loop.close()


@pytest.mark.usefixtures("one_cpu")
def test_one_cpu_never_polls(loop: Loop) -> None:
    for _ in range(20):
        loop.request_in(0.0005)
        loop.next()
        assert loop.poll._window == 0


def test_polling_pauses_while_other_processes_need_the_cpus() -> None:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    loop = Loop(pauses=True)
    try:
        end = time.perf_counter() + 20
        while not loop.poll._paused_until:
            assert time.perf_counter() < end
            loop.poll._window = 5_000_000  # shorter than the wait for the request, so that its end is what comes late
            loop.request_in(0.01)
            loop.next()
        assert loop.poll._paused_for >= PAUSE
    finally:
        loop.close()
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_a_pause_that_recurs_soon_lasts_longer() -> None:
    poll = BusyPoll(LONGEST, [0, 0, 0, 0])
    lengths, now = [], 10**9
    for _ in range(7):
        poll._pause(now)
        lengths.append(poll._paused_for)
        now = poll._paused_until + PAUSE // 2
    assert lengths == [PAUSE << doublings for doublings in (0, 1, 2, 3, 4, 5, 5)]
    poll._pause(poll._paused_until + LONGEST_PAUSE)
    assert poll._paused_for == PAUSE
