"""Work on mounts in child processes, because a process that waits for a FUSE server cannot always be killed.

Once a server has read a request, the kernel holds the process that made it until the answer comes, even after SIGKILL.
So a command touches no mount itself. A child process does, and is abandoned if the mount does not answer.
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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ...errors import TtmfsError
from ...quoting import quoted
from .command import CommandError, complain, reason
from .terminal import is_terminal

__all__ = ["PATIENCE", "Answer", "ask", "ask_all", "supervised"]

PATIENCE = 2.0
"""Seconds within which a mount must answer."""

PER_ITEM, LONGEST = 0.02, 60.0
"""Additional seconds for each item received, and the most in total. So a large mount can be listed completely."""

MOST_ITEMS = 1 << 20
MOST_CHILDREN = 64
SOON = 0.2
"""Seconds until a slow command's mounts are watched, and between two checks of a silent mount."""

Work = Callable[[], Iterable[Any]]
"""What a child does. It gives items that JSON can represent."""


class Answer(NamedTuple):
    """The items that a child sent, why it failed if it did, and whether it was abandoned."""

    items: list[Any]
    error: str = ""
    is_silent: bool = False


def _fork(run: Callable[[], int]) -> int:
    """Run a function in a child process, which exits with the status that it returns. Returns the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    # During the fork, one SIGINT could reach both processes.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if pid := os.fork():
            return pid
        status = 1
        try:
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            status = run()
        except KeyboardInterrupt:
            status = 130
        except Exception:
            traceback.print_exc()
        finally:
            for stream in sys.stdout, sys.stderr:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- asking mounts ---


class _Child:
    """A child process that works on the mount at a path, and sends its items through a pipe, one line each."""

    def __init__(self, path: str, work: Work) -> None:
        self.path, self.is_silent = path, False
        self._data, self._count, self._began = bytearray(), 0, time.monotonic()
        self.pipe, writing = os.pipe()
        self._pid = _fork(lambda: _send(work, path, writing))
        os.close(writing)

    @property
    def deadline(self) -> float:
        return self._began + min(LONGEST, PATIENCE + PER_ITEM * self._count)

    def receive(self) -> bool:
        """Read what it has sent. Returns whether it has sent everything."""
        data = os.read(self.pipe, 1 << 20)
        self._data += data
        self._count += data.count(b"\n")
        return not data

    def kill(self) -> None:
        """Kill it. It ends now, or when the mount answers, and has to be reaped then."""
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1
            os.kill(self._pid, signal.SIGKILL)
            _killed.append(self)

    def is_reaped(self) -> bool:
        return bool(os.waitpid(self._pid, os.WNOHANG)[0])

    def answer(self) -> Answer:
        found: dict[str, list[Any]] = {"item": [], "error": []}
        for kind, value in map(json.loads, self._data.split(b"\n")[:-1]):
            found[kind].append(value)
        error = "".join(found["error"])
        if self.is_silent:
            name = quoted(self.path)
            error = f"{name} has not answered for {PATIENCE:g} s; ttmfs doctor {name} says what to do"
        return Answer(found["item"], error, self.is_silent)


_killed: list[_Child] = []
"""Children that were killed, and not reaped yet."""


def _send(work: Work, path: str, pipe: int) -> int:
    """Do the work in a child, and send its items. The child closes its parent's files, because it may live long."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in 0, 1, 2:
        os.dup2(null, stream)
    pipe = os.dup2(pipe, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with open(pipe, "wb") as file:

        def send(kind: str, value: Any) -> None:
            try:
                line = json.dumps([kind, value], allow_nan=False)
            except ValueError:  # a server can answer NaN, which is no JSON
                raise CommandError(f"{quoted(path)} answers nonsense: a number that is not finite") from None
            file.write(line.encode() + b"\n")
            file.flush()

        try:
            for number, item in enumerate(work()):
                if number >= MOST_ITEMS:
                    raise CommandError(f"{quoted(path)} lists more than {MOST_ITEMS} backups: the others are left out")
                send("item", item)
        except (CommandError, OSError, TtmfsError) as error:
            send("error", reason(error, path))
        except Exception:
            send("error", traceback.format_exc())
    return 0


def ask_all(works: Sequence[tuple[str, Work]]) -> list[Answer]:
    """Do work on mounts, each (path, work) in a child of its own, and abandon the children that take too long.

    A path whose child was abandoned before, and still waits, counts as silent without another child.
    """
    answers: list[Answer] = []
    for start in range(0, len(works), MOST_CHILDREN):
        answers += _ask_some(works[start : start + MOST_CHILDREN])
    return answers


def _ask_some(works: Sequence[tuple[str, Work]]) -> list[Answer]:
    _killed[:] = [child for child in _killed if not child.is_reaped()]
    silent = {child.path: child for child in _killed if child.is_silent}
    children = [silent.get(path) or _Child(path, work) for path, work in works]
    waiting = {child.pipe: child for child in children if not child.is_silent}
    try:
        while waiting:
            poll = select.poll()
            for pipe in waiting:
                poll.register(pipe, select.POLLIN)
            deadline = min(child.deadline for child in waiting.values())
            for pipe, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1):
                if waiting[pipe].receive():
                    del waiting[pipe]
            for pipe, child in list(waiting.items()):
                if time.monotonic() > child.deadline:
                    child.is_silent = True
                    del waiting[pipe]
    finally:
        for child in children:
            child.kill()
    return [child.answer() for child in children]


def ask(path: str, work: Callable[[], Any]) -> Answer:
    """Do one piece of work on the mount at a path, in a child."""
    return ask_all([(path, lambda: [work()])])[0]


# --- whole commands ---


def supervised(command: str, paths: Sequence[str], run: Callable[[], int]) -> int:
    """Run a command in a child process, and report a mount that does not answer. Returns the exit status.

    Ctrl-C always ends it: the child gets a SIGINT, and is killed or abandoned if it does not end.
    """
    mounts = sorted({os.path.dirname(os.path.normpath(path)) or "." for path in paths})
    parent, watcher = os.getpid(), 0
    child = _fork(lambda: _bound_to(parent, run))
    ended = os.pidfd_open(child)
    try:
        if mounts and not _wait(ended, SOON):
            watcher = _fork(lambda: _bound_to(parent, lambda: _watch(command, mounts)))
        _wait(ended)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):  # a second one
            _wait(ended, PATIENCE)
        if not _wait(ended, 0):
            return _abandoned(command, child, ended, mounts)
    finally:
        os.close(ended)
        if watcher:
            os.kill(watcher, signal.SIGKILL)
            os.waitpid(watcher, 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return code
    complain(command, "interrupted" if code == -signal.SIGINT else f"was ended by signal {-code}")
    return 128 - code


def _abandoned(command: str, child: int, ended: int, mounts: list[str]) -> int:
    os.kill(child, signal.SIGKILL)
    names = ", ".join(map(quoted, mounts))
    waits = f"; process {child} still waits for {names}, and ends when that answers"
    complain(command, "interrupted" + waits * (not _wait(ended, 0.1)))
    return 130


def _bound_to(parent: int, run: Callable[[], int]) -> int:
    """Run a function in a child that does not outlive its parent."""
    from ...linux import system_calls  # imported here, so that the parent does not wait for it

    system_calls.die_with(parent)
    return run()


def _wait(ended: int, seconds: float | None = None) -> bool:
    """Wait for the end of a process, given its pidfd. Returns whether it has ended."""
    return bool(select.select([ended], [], [], seconds)[0])


def _watch(command: str, mounts: list[str]) -> int:
    """Report when mounts stop answering, and when they answer again, until this process is killed."""
    names, was_silent = ", ".join(map(quoted, mounts)), False
    while True:
        is_silent = ask(names, lambda: [os.statvfs(mount) for mount in mounts]).is_silent  # an error is an answer
        if is_silent != was_silent:
            if is_terminal(sys.stderr):
                sys.stderr.write("\r\x1b[K")  # over a bar
            advice = (
                "does not answer; waiting until it does, or Ctrl-C "
                f"(in another terminal, ttmfs doctor {names.replace(',', '')} says what to do)"
            )
            complain(command, f"{names} {advice if is_silent else 'answers again'}")
        was_silent = is_silent
        time.sleep(SOON if is_silent else PATIENCE)
