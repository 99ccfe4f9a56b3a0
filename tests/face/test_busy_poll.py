"""Waiting for requests by polling, on a pipe in place of the kernel: when it polls, sleeps and gives others a turn."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from ttmfs.fuse.busy_poll import FIRST_WINDOW, LONGEST_PAUSE, PAUSE, TURN, BusyPoll

pytestmark = pytest.mark.serial

LONGEST = 50_000_000  # ns; longer than any wait of the machine for its processors is likely to be


class Loop:
    """A pipe, and a reading loop that sleeps as pyfuse3's does: one task waits for the pipe, the others for it."""

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe()
        self.sleeps = 0
        self.wakes = False  # whether a request comes as soon as the loop sleeps
        self.ends = False
        self.counts = [0, 0, 0, 0]  # hits, ns of hits, misses, ns of misses

    async def asleep(self) -> bool:
        if not hasattr(self, "lock"):
            self.lock = trio.Lock()
        self.sleeps += 1
        if self.wakes:
            self.request()
        async with self.lock:
            await trio.lowlevel.wait_readable(self.reads)
        return not self.ends

    def request(self) -> None:
        os.write(self.writes, b".")

    def request_in(self, seconds: float) -> None:
        threading.Timer(seconds, self.request).start()

    def read(self) -> None:
        assert os.read(self.reads, 1) == b"."

    def run(self, main: Callable[[BusyPoll], object], longest: int = LONGEST, *, pauses: bool = False) -> None:
        """Run a test. Without `pauses`, other processes that need the CPU do not make polling pause."""

        async def run() -> None:
            with trio.fail_after(10):
                threads = trio.to_thread.current_default_thread_limiter()
                poll = BusyPoll(self.reads, self.asleep, longest, lambda: threads.borrowed_tokens, self.counts)
                signal.signal(signal.SIGALRM, poll.alarm)
                if not pauses:
                    poll._pause = lambda now: None  # type: ignore[method-assign]  # noqa: ARG005
                await main(poll)  # type: ignore[misc]

        trio.run(run)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    yield loop
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    os.close(loop.reads)
    os.close(loop.writes)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


async def grown(loop: Loop, poll: BusyPoll) -> None:
    """Send requests that come a little later than the window, until the window has its greatest length."""
    while poll._window < LONGEST:
        loop.request_in(poll._window / 1e9 + 0.0005)
        assert await poll.wait()
        loop.read()


async def thread_at_work() -> None:
    while not trio.to_thread.current_default_thread_limiter().borrowed_tokens:
        await trio.lowlevel.checkpoint()


def test_a_request_that_is_there_is_found_without_sleeping(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        for _ in range(100):
            loop.request()
            assert await poll.wait()
            loop.read()
        assert loop.sleeps == 0

    loop.run(main)


def test_the_loop_sleeps_before_the_first_request(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        loop.wakes = True
        assert await poll.wait()
        assert loop.sleeps == 1
        assert list(loop.counts) == [0, 0, 0, 0], "nothing was polled for"

    loop.run(main)


def test_requests_that_come_soon_are_found_by_polling(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        await grown(loop, poll)
        before = loop.sleeps
        for _ in range(20):
            loop.request_in(0.0005)
            assert await poll.wait()
            loop.read()
        assert loop.sleeps - before < 10, "most are found awake"

    loop.run(main)


def test_the_polling_window_shrinks_to_zero_without_requests(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        await grown(loop, poll)
        loop.request_in(4 * LONGEST / 1e9)
        before = time.thread_time()
        assert await poll.wait()
        loop.read()
        assert time.thread_time() - before < 2 * LONGEST / 1e9, "it was polled for no longer than the longest window"
        assert poll._window == 0
        loop.wakes = True
        counts = list(loop.counts)
        assert await poll.wait()
        assert list(loop.counts) == counts, "and not at all after that"

    loop.run(main)


def test_the_polling_window_never_exceeds_the_option(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        for _ in range(20):
            loop.request_in(0.00001)
            await poll.wait()
            loop.read()
            assert poll._window <= FIRST_WINDOW // 2

    loop.run(main, longest=FIRST_WINDOW // 2)


@pytest.mark.usefixtures("one_cpu")
def test_one_cpu_never_polls(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        for _ in range(20):
            loop.request_in(0.0005)
            assert await poll.wait()
            loop.read()
            assert poll._window == 0

    loop.run(main)


def test_a_request_that_another_has_read_is_not_announced(loop: Loop) -> None:
    """Two tasks wait. A task that is woken reads at once, and would block forever if the request were gone."""
    found: list[int] = []

    async def serve(poll: BusyPoll, number: int) -> None:
        while await poll.wait():
            os.set_blocking(loop.reads, False)
            loop.read()
            found.append(number)
            if number == 1:
                await trio.sleep(0.001)  # a slow request: the other reads meanwhile

    async def main(poll: BusyPoll) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, poll, 1)
            nursery.start_soon(serve, poll, 2)
            for _ in range(300):
                loop.request()
                await trio.lowlevel.checkpoint()
            while len(found) < 300:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert set(found) == {1, 2}

    loop.run(main)


def test_other_trio_tasks_run_during_endless_requests(loop: Loop) -> None:
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(time.perf_counter_ns())
            await trio.lowlevel.checkpoint()

    async def main(poll: BusyPoll) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.lowlevel.checkpoint()
            end = time.thread_time_ns() + 20 * TURN  # in which it has the CPU
            while time.thread_time_ns() < end:
                loop.request()
                assert await poll.wait()
                loop.read()
            nursery.cancel_scope.cancel()
        assert loop.sleeps == 0
        assert len(turns) > 10

    loop.run(main)


def test_polling_does_not_delay_threads(loop: Loop) -> None:
    """While a thread works, the loop sleeps and does not poll.

    It sees the end of the thread even if requests never end.
    """

    async def main(poll: BusyPoll) -> None:
        await grown(loop, poll)
        ended = False

        async def work() -> None:
            nonlocal ended
            await trio.to_thread.run_sync(time.sleep, 0.5)
            ended = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await thread_at_work()
            counts, sleeps = list(loop.counts), loop.sleeps
            loop.wakes = True
            assert await poll.wait()
            loop.read()
            assert loop.sleeps == sleeps + 1
            assert list(loop.counts) == counts
            loop.wakes = False
            start = time.perf_counter()
            while not ended:
                loop.request()
                assert await poll.wait()
                loop.read()
                assert time.perf_counter() < start + 5

    loop.run(main)


def test_a_read_of_a_withdrawn_request_ends_while_a_thread_works(loop: Loop) -> None:
    """The request was announced and then taken back: the blocked read is interrupted."""
    interrupted: list[int] = []

    async def main(poll: BusyPoll) -> None:
        def alarm(number: int, _: object) -> None:
            interrupted.append(number)
            poll.alarm()

        signal.signal(signal.SIGALRM, alarm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, time.sleep, 0.5)
            await thread_at_work()
            loop.request()
            assert await poll.wait()
            loop.read()
            loop.request_in(0.4)
            loop.read()  # as pyfuse3 does: blocked in a system call, until a signal or a request comes
            assert interrupted
        await trio.sleep(0.6)  # and nothing comes: no one waits anew
        interrupted.clear()
        await trio.sleep(0.6)
        assert not interrupted, "and no signal comes when no thread works"

    loop.run(main)


def test_the_end_of_the_connection_ends_the_wait(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        loop.ends = loop.wakes = True
        assert not await poll.wait()

    loop.run(main)


def test_polling_pauses_while_other_processes_need_the_cpus(loop: Loop) -> None:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]

    async def main(poll: BusyPoll) -> None:
        end = time.perf_counter() + 8
        while not poll._paused_until:
            assert time.perf_counter() < end
            poll._window = 5_000_000  # shorter than the wait for the request, so that its end is what comes late
            loop.request_in(0.01)
            assert await poll.wait()
            loop.read()
        assert poll._paused_for >= PAUSE

    try:
        loop.run(main, pauses=True)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_a_pause_that_recurs_soon_lasts_longer(loop: Loop) -> None:
    async def main(poll: BusyPoll) -> None:
        lengths, now = [], 10**9
        for _ in range(7):
            poll._pause(now)
            lengths.append(poll._paused_for)
            now = poll._paused_until + PAUSE // 2
        assert lengths == [PAUSE << doublings for doublings in (0, 1, 2, 3, 4, 5, 5)]
        poll._pause(poll._paused_until + LONGEST_PAUSE)
        assert poll._paused_for == PAUSE

    loop.run(main, pauses=True)
