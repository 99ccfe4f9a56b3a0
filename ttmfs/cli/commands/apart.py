"""Work on a mount in a process apart, since nobody can end a process that waits for an answer which never comes.

Once the server has read a request, the kernel lets the process that waits go only when the answer is there, even if it
was killed. So a process that must stay in the caller's hands touches no mount: another does so for it, and is left to
itself if need be.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from ...errors import TtmfsError
from ...quoting import quoted
from .command import CommandError, complain, reason
from .terminal import is_terminal

__all__ = ["PATIENCE", "Answer", "Asked", "ask", "ask_all", "interrupt_once", "supervised"]

PATIENCE = 2.0
"""Seconds within which a mount answers, or is said not to."""

PER_ITEM, LONGEST = 0.02, 60.0
"""Seconds more for each item that came, and at most: a mount of many backups is listed whole, a slow trickle is not."""

MOST_ITEMS = 1 << 20
AT_ONCE = 64
SOON = 0.2
"""Seconds that a command may take before its mounts are asked whether they answer."""


class Answer(NamedTuple):
    """What came of some work: its items, why it failed if it did, and whether it was given up for want of an answer."""

    items: list[Any]
    error: str = ""
    is_silent: bool = False


class Asked:
    """A process that does some work and sends the items, which JSON can tell. `path` is what it is about."""

    def __init__(self, work: Callable[[], Iterable[Any]], path: str) -> None:
        self.path = path
        self.items: list[Any] = []
        self._error, self._rest, self._began = "", b"", time.monotonic()
        self.channel, writing = os.pipe()
        with _undisturbed():
            self.pid = os.fork()
            if not self.pid:
                os.close(self.channel)
                _answer(work, path, writing)
        os.close(writing)

    @property
    def end(self) -> float:
        """When it has had its time."""
        return self._began + min(LONGEST, PATIENCE + PER_ITEM * len(self.items))

    def hear(self) -> bool:
        """Take what it has sent; whether that is all."""
        data = os.read(self.channel, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            kind, value = json.loads(line)
            if kind == "item":
                self.items.append(value)
            else:
                self._error = value
        if len(self.items) >= MOST_ITEMS:
            self._error = f"{quoted(self.path)} lists more than {MOST_ITEMS} backups: the others are left out"
        return not data or bool(self._error)

    def answer(self) -> Answer:
        """What came of it. Ends it."""
        self.leave()
        return Answer(self.items, self._error)

    def silence(self) -> Answer:
        """What there is of it by now. It is left to itself, and ends once it can."""
        self.leave()
        return Answer(self.items, f"{quoted(self.path)} has not answered for {PATIENCE:g} s", is_silent=True)

    def leave(self) -> None:
        """Let go of it."""
        if self.channel >= 0:
            os.close(self.channel)
            self.channel = -1
            os.kill(self.pid, signal.SIGKILL)
            if not self.is_over():
                _ending.append(self)

    def is_over(self) -> bool:
        """Whether its process has ended."""
        if self.pid and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
        return not self.pid


_ending: list[Asked] = []
"""Those that were let go of, and whose processes had not ended by then: else each would stay a zombie."""


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without interruption: one that came while Python forks would be lost, or be met by both processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(work: Callable[[], Iterable[Any]], path: str, channel: int) -> NoReturn:
    """In the process apart. It keeps nothing of the caller's open: it may stay for long."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        null = os.open(os.devnull, os.O_RDWR)
        for stream in 0, 1, 2:
            os.dup2(null, stream)
        os.closerange(3, channel)
        os.closerange(channel + 1, max(channel + 1, os.sysconf("SC_OPEN_MAX")) if channel < 1024 else channel + 1024)

        def send(kind: str, value: Any) -> None:
            text = memoryview(json.dumps([kind, value]).encode() + b"\n")
            while text:
                text = text[os.write(channel, text) :]

        try:
            for item in work():
                send("item", item)
        except (CommandError, OSError, TtmfsError) as error:
            send("error", str(error) if isinstance(error, CommandError) else reason(error, path))
        except Exception:
            send("error", traceback.format_exc())
    finally:
        os._exit(0)


def ask_all(
    works: Sequence[tuple[str, Callable[[], Iterable[Any]]]], left: dict[str, Asked] | None = None
) -> list[Answer]:
    """Do work about some paths, each in a process apart, and give up on those that take too long.

    `left` holds those that were given up on before, and still wait: they are not asked again, and it is added to.
    """
    left = {} if left is None else left
    _ending[:] = [asked for asked in _ending if not asked.is_over()]
    for path in [path for path, asked in left.items() if asked.is_over()]:
        del left[path]
    answers: list[Answer | None] = [left[path].silence() if path in left else None for path, _ in works]
    todo = [number for number, answer in enumerate(answers) if answer is None]
    under_way: dict[int, tuple[int, Asked]] = {}
    try:
        while todo or under_way:
            while todo and len(under_way) < AT_ONCE:
                number = todo.pop(0)
                path, work = works[number]
                asked = Asked(work, path)
                under_way[asked.channel] = number, asked
            poll = select.poll()
            for channel in under_way:
                poll.register(channel, select.POLLIN)
            first = min(asked.end for _, asked in under_way.values())
            for channel, _ in poll.poll(max(0.0, first - time.monotonic()) * 1000 + 1):
                number, asked = under_way[channel]
                if asked.hear():
                    del under_way[channel]
                    answers[number] = asked.answer()
            for channel, (number, asked) in list(under_way.items()):
                if time.monotonic() > asked.end:
                    del under_way[channel]
                    answers[number] = asked.silence()
                    left[asked.path] = asked
    finally:
        for _, asked in under_way.values():
            asked.leave()
    return [answer for answer in answers if answer is not None]


def ask(path: str, work: Callable[[], Any]) -> Answer:
    """Do one piece of work about a path, in a process apart."""
    return ask_all([(path, lambda: [work()])])[0]


# --- whole commands ---


def supervised(command: str, paths: Sequence[str], run: Callable[[], int]) -> int:
    """Run a command in a process apart, and say so if a mount that it works on does not answer. Its exit status.

    An interruption ends it at any time: it is passed on, and who does not end at that is left to itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with contextlib.ExitStack() as stack:
        with _undisturbed():
            child = os.fork()
            if not child:
                _run(run, parent)
            ended = os.pidfd_open(child)
        stack.callback(os.close, ended)
        mounts = sorted({os.path.dirname(os.path.normpath(path)) or "." for path in paths})
        watch = _Watch(command, mounts)
        stack.callback(watch.close)
        interrupted = 0.0
        while True:
            try:
                if _wait(ended, max(0.0, interrupted - time.monotonic()) if interrupted else watch.step()):
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    return _status(command, code)
                if interrupted and time.monotonic() >= interrupted:
                    break
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = time.monotonic() + (SOON if watch.told else PATIENCE)
                os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGKILL)
        if not _wait(ended, 0.1):
            complain(
                command, f"interrupted; process {child} is left waiting for {watch.names}, and ends when that answers"
            )
        else:
            complain(command, "interrupted")
        return 130


def _run(run: Callable[[], int], parent: int) -> NoReturn:
    """In the process apart: as if it were the only one, but that it does not outlive the other."""
    status = 1
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in one that has not begun: `run` sees to the rest
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        from ...linux import system_calls  # which takes a moment that the other need not wait for

        system_calls.die_with(parent)
        status = run()
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def interrupt_once(*_: object) -> None:
    """A terminal sends the signal to both processes, and one passes it on to the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _wait(ended: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    return bool(poll.poll(seconds * 1000 + 1))


def _status(command: str, code: int) -> int:
    if code >= 0:
        return code
    if code == -signal.SIGINT:
        complain(command, "interrupted")
        return 130
    complain(command, f"was ended by signal {-code}")
    return 128 - code


class _Watch:
    """Whether mounts answer, asked again and again."""

    def __init__(self, command: str, mounts: list[str]) -> None:
        self._command, self._mounts = command, mounts
        self._asked: Asked | None = None
        self._next = time.monotonic() + SOON
        self.told = False
        self.names = ", ".join(map(quoted, mounts))

    def step(self) -> float:
        """Ask, or see whether there is an answer. Gives for how long there is nothing to do."""
        if not self._mounts:
            return 3600.0
        now = time.monotonic()
        if self._asked is None and now >= self._next:
            self._asked = Asked(self._look, self.names)
            self._next = now + PATIENCE - (0.0 if self.told else SOON)
        if self._asked and select.select([self._asked.channel], [], [], 0)[0]:
            self._asked.leave()
            self._asked = None
            self._next = now + PATIENCE
            if self.told:
                self._say(f"{self.names} answers again")
            self.told = False
        elif self._asked and now >= self._next and not self.told:
            self.told = True
            self._say(
                f"{self.names} does not answer; waiting, until it does or Ctrl-C "
                f"(from elsewhere, ttmfs doctor {self.names.replace(',', '')} says what to do)"
            )
        return SOON if self._asked else max(0.0, self._next - now)

    def _look(self) -> Iterable[None]:
        for mount in self._mounts:
            with contextlib.suppress(OSError):  # an error is an answer
                os.statvfs(mount)
        return []

    def _say(self, text: str) -> None:
        if is_terminal(sys.stderr):
            sys.stderr.write("\r\x1b[K")  # over a bar
        complain(self._command, text)

    def close(self) -> None:
        if self._asked:
            self._asked.leave()
