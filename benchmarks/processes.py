"""Clients as child processes that begin at the same moment."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["percentile", "together", "uninterrupted"]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay SIGINT and SIGTERM: between a fork and the assignment of its pid, they would leave the child behind."""
    came: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that `percent` percent of all values do not exceed."""
    return sorted(values)[max(0, -int(-len(values) * percent // 100) - 1)]


def together(acts: Sequence[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run each in a child process, all from the same moment on. Return the results in order. No child remains."""
    with contextlib.ExitStack() as stack:
        go, begin = os.pipe()
        stack.callback(os.close, go)
        ready, tell = os.pipe()
        stack.callback(os.close, ready)
        answers = []
        with _closing(begin), _closing(tell):
            for act in acts:
                answer, give = os.pipe()
                answers.append(stack.enter_context(os.fdopen(answer)))
                with _closing(give), uninterrupted():
                    if not (pid := os.fork()):
                        _child(act, go, begin, tell, give)
                    stack.callback(_reap, pid)
            for _ in acts:
                os.read(ready, 1)
        return [_parsed(answer.read()) for answer in answers]


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _parsed(text: str) -> dict[str, Any]:
    if not text:
        raise RuntimeError("a client ended before it had finished")
    found: dict[str, Any] = json.loads(text)
    return found


def _child(act: Callable[[], dict[str, Any]], go: int, begin: int, tell: int, give: int) -> None:
    """Never returns, because the child must not run the parent's cleanup."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(begin)
        os.write(tell, b"r")
        os.read(go, 1)  # ends when the parent closes its side
        with os.fdopen(give, "w") as file:
            json.dump(act(), file)
        code = 0
    except BaseException as error:
        os.write(2, f"bench: a client failed: {error!r}\n".encode())
    finally:
        os._exit(code)


def _reap(pid: int) -> None:
    """After an error a client may still run. Otherwise it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
