"""The state, which outlasts the daemon: a memfd with a layout that later daemons and later versions can read."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness import REPOSITORY, wait_until
from stores import ControlGroup
from ttmfs.errors import NotSupported
from ttmfs.linux.fuse_protocol import RESENT
from ttmfs.recovery.state import (
    ANSWER,
    BACKING,
    CACHED,
    FAULT,
    FORMAT,
    KILL,
    NOTES,
    POINT_BITS,
    POINTS,
    RECORD,
    STEPPED,
    Record,
    State,
)
from ttmfs.stores.store import MOST_UNSYNCED

pytestmark = pytest.mark.serial  # the kernel counts processes killed for want of memory on the whole machine

WHOLE = RECORD + NOTES * 8 + STEPPED * 16 + CACHED * 8 + BACKING * 8 + ANSWER
PLAIN = Record("1", 4096, 1 << 20)


@pytest.fixture
def state() -> Iterator[State]:
    made = State.new(PLAIN)
    yield made
    made.close()


def again(state: State) -> State:
    """The state as the next daemon opens it."""
    return State(os.dup(state.fd))


def python(script: str, **environment: str) -> "subprocess.Popen[str]":
    """Another process that can import ttmfs. It gets every inheritable descriptor."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{script}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, close_fds=False, env={**os.environ, **environment},
    )  # fmt: skip


def output(script: str, code: int = 0, **environment: str) -> str:
    with python(script, **environment) as process:
        out, error = process.communicate(timeout=20)
    assert process.returncode == code, error
    return out


# --- the layout ---


def test_a_new_state_has_the_size_of_its_layout_and_is_empty(state: State) -> None:
    assert os.fstat(state.fd).st_size == WHOLE
    assert os.pread(state.fd, WHOLE, RECORD) == bytes(WHOLE - RECORD)
    assert len(state.notes) == NOTES
    assert state.suspects() == {}
    assert state.take_last_words() == ""


def test_the_next_state_reads_what_the_previous_one_wrote(state: State) -> None:
    state.update(init="abcd", device="0:77", size=2**63 - 1, unsynced=(1, 2**32), restarts=3)
    state.notes[NOTES - 1] = 2**64 - 16
    found = again(state)
    assert found.record == state.record
    assert found.record == Record(
        "1", 4096, 1 << 20, init="abcd", device="0:77", size=2**63 - 1, unsynced=(1, 2**32), restarts=3
    )
    assert found.notes[NOTES - 1] == 2**64 - 16
    found.close()


def test_another_mapping_sees_notes_without_a_flush(state: State) -> None:
    """So a SIGKILL right after it loses nothing."""
    found = again(state)
    state.notes[0] = 16
    assert found.notes[0] == 16
    found.close()


def test_notes_survive_a_sigkill_of_the_process(state: State) -> None:
    os.set_inheritable(state.fd, True)
    output(
        f"""
import os, signal
from ttmfs.recovery.state import State
state = State({state.fd})
for number in range(100):
    state.update(restarts=number)
state.notes[7] = 1 << 40
os.kill(os.getpid(), signal.SIGKILL)
""",
        code=-signal.SIGKILL,
    )
    found = again(state)
    assert found.record.restarts == 99
    assert found.notes[7] == 1 << 40
    found.close()


# --- the record ---


def test_the_ids_of_as_many_unsynced_backups_as_the_store_remembers_fit(state: State) -> None:
    most = tuple(2**32 - 1 - n for n in range(MOST_UNSYNCED))
    longest = "/run/user/4294967294/" + "x" * 100
    state.update(init="f" * 208, device="0:1048575", temporary=longest, size=2**63 - 1, unsynced=most)
    found = again(state)
    assert found.record.unsynced == most
    found.close()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            b'{"format": %d, "version": "9.9"}' % (FORMAT + 1),
            rf"ttmfs 9\.9 left .* in format {FORMAT + 1}, and .* {FORMAT} alone",
        ),
        (b'{"format": 0, "version": "0.1"}', r"ttmfs 0\.1 left .* in format 0"),
        (b'{"version": "1"}', "not made by ttmfs"),
        (b"[1]", "not made by ttmfs"),
        (b"", "not made by ttmfs"),
        (b"\x7fELF", "not made by ttmfs"),
        (b"\xff\xfe\xfd", "not made by ttmfs"),
        (b'{"format": %d' % FORMAT, "not made by ttmfs"),
        (b'{"format": %d, "version": "1"}' % FORMAT, "not made by ttmfs"),
    ],
)
def test_an_unknown_state_is_refused_and_left_unchanged(state: State, header: bytes, says: str) -> None:
    os.pwrite(state.fd, header.ljust(RECORD, b"\0"), 0)
    before = os.pread(state.fd, WHOLE, 0)
    with pytest.raises(NotSupported, match=says):
        State(state.fd)
    assert os.pread(state.fd, WHOLE, 0) == before


def test_a_state_shorter_than_its_format_is_refused_and_left_unchanged(state: State) -> None:
    os.ftruncate(state.fd, WHOLE - 1)
    with pytest.raises(NotSupported, match="cut short"):
        State(state.fd)
    assert os.fstat(state.fd).st_size == WHOLE - 1


def test_a_descriptor_of_something_else_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(NotSupported, match="not made by ttmfs"):
            State(fd)
    finally:
        os.close(fd)


def test_a_record_that_does_not_fit_is_refused_and_the_old_one_stays(state: State) -> None:
    with pytest.raises(NotSupported, match="does not fit"):
        state.update(init="x" * RECORD)
    found = again(state)
    assert found.record == PLAIN
    found.close()
    state.update(device="0:1")
    assert state.record.device == "0:1"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotSupported, match="does not fit"):
        State.new(replace(PLAIN, init="x" * RECORD))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_record_fills_its_page_to_the_last_byte(state: State) -> None:
    room = RECORD - len(os.pread(state.fd, RECORD, 0).rstrip(b"\0"))
    state.update(init="x" * room)
    found = again(state)
    assert found.record.init == "x" * room
    found.close()


def test_a_killed_writer_leaves_the_old_or_the_new_record(state: State) -> None:
    """Two that differ in every part of the page, and a SIGKILL somewhere among thousands of changes."""
    state.update(init="a" * 3000, device="a")
    os.set_inheritable(state.fd, True)
    script = f"""
from ttmfs.recovery.state import State
state = State({state.fd})
while True:
    for letter in "ba":
        state.update(init=letter * 3000, device=letter)
    state.notes[9] += 1
"""

    def rounds() -> int:
        found = again(state)
        try:
            return int(found.notes[9])
        finally:
            found.close()

    for _ in range(5):
        with python(script) as process:
            enough = rounds() + 20
            wait_until(lambda enough=enough: rounds() > enough, "changes", 20)  # type: ignore[misc]
            process.kill()
            process.communicate(timeout=10)
        found = again(state)
        found.close()
        assert found.record.device in ("a", "b")
        assert found.record.init == found.record.device * 3000


# --- suspects ---


def oom_kills() -> int:
    rows = Path("/proc/vmstat").read_text().split("\n")
    return int(next(row.split()[1] for row in rows if row.startswith("oom_kill ")))


@pytest.fixture
def quiet(state: State) -> int:
    """The state after it has read how many OOM kills the machine has counted."""
    state.suspects()
    return oom_kills()


REQUESTS = [2, 4711 << 1, 1 << 58]
"""The kernel's numbers of requests."""


def note(state: State, *points: int) -> None:
    for slot, (request, known) in enumerate(zip(REQUESTS, points, strict=False)):
        state.notes[slot * 700] = request << POINT_BITS | known


def test_a_kill_adds_one_point_to_the_request_that_was_running(state: State, quiet: int) -> None:
    """Waiting requests get no point. Earlier points stay."""
    note(state, 1, 0, 3)
    assert state.suspects() == {REQUESTS[0]: KILL + 1, REQUESTS[2]: 3}
    assert state.suspects() == {}, "they are forgotten"
    assert oom_kills() == quiet, "this machine killed something meanwhile"


@pytest.mark.usefixtures("quiet")
def test_points_do_not_overflow_into_the_request(state: State) -> None:
    note(state, POINTS, POINTS - 1)
    assert state.suspects() == {REQUESTS[0]: POINTS, REQUESTS[1]: POINTS - 1}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("said_before", [False, True], ids=["suspects first", "last words first"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("import ctypes; ctypes.string_at(0)", "Segmentation fault"),
        ("import os; os.abort()", "Aborted"),
    ],
    ids=["SIGSEGV", "SIGABRT"],
)
def test_a_crash_adds_two_points_and_leaves_one_log_line(
    state: State, fault: str, says: str, said_before: bool
) -> None:
    """The next daemon may ask for either first."""
    os.set_inheritable(state.fd, True)
    script = f"""
from ttmfs.recovery.state import LATEST, State
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
def main():
    state = State({state.fd})
    state.keep_last_words()
    state.notes[4], state.notes[5] = {REQUESTS[1] << POINT_BITS}, {REQUESTS[0] << POINT_BITS | 1}
    state.notes[LATEST] = 5
    {fault}
main()
"""
    with python(script) as process:
        process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGSEGV, -signal.SIGABRT)
    with_words = again(state)
    if said_before:
        words, suspects = with_words.take_last_words(), with_words.suspects()
    else:
        suspects, words = with_words.suspects(), with_words.take_last_words()
    assert suspects == {REQUESTS[0]: FAULT + 1, REQUESTS[1]: KILL}, "one was begun last"
    assert words.startswith(f"Fatal Python error: {says} < ")
    assert "in main" in words
    assert "threading.py" not in words, "it was another thread"
    assert "\n" not in words
    assert with_words.take_last_words() == "", "said once"
    assert os.fstat(state.fd).st_size == WHOLE
    note(with_words, 0)
    with_words.close()
    later = again(state)
    assert later.take_last_words() == ""
    assert later.suspects() == {REQUESTS[0]: KILL}, "the fault was the one's before"
    later.close()


@pytest.mark.usefixtures("quiet")
def test_an_oom_kill_adds_two_points(state: State) -> None:
    note(state, 0)
    before = oom_kills()
    with ControlGroup(8 << 20, 0) as group:
        command = [sys.executable, "-c", "bytearray(64 << 20)"]
        died = subprocess.run(command, preexec_fn=group.join, timeout=30, check=False)
    assert died.returncode == -signal.SIGKILL
    assert oom_kills() == before + 1, "this machine killed something meanwhile"
    assert state.suspects() == {REQUESTS[0]: FAULT}
    note(state, 0)
    assert state.suspects() == {REQUESTS[0]: KILL}


@pytest.mark.usefixtures("quiet")
def test_a_daemon_killed_while_starting_adds_no_points(state: State) -> None:
    note(state, 0)
    first = again(state)
    assert first.suspects() == {REQUESTS[0]: KILL}
    first.close()
    second = again(state)
    assert second.suspects() == {}
    second.close()


# --- answers ---


def test_the_next_daemon_finds_the_answer_that_was_noted_last(state: State) -> None:
    assert state.noted_answer() == {}
    state.note_answer(4, b"a longer answer to the first")
    state.note_answer(6, b"the second")
    later = again(state)
    assert later.noted_answer() == {6: b"the second"}
    state.note_answer(8, bytes(range(256)) + bytes(240))
    assert later.noted_answer() == {8: bytes(range(256)) + bytes(240)}, "as long as there is room for"
    later.close()


def test_an_answer_that_was_being_noted_at_a_death_is_none(state: State) -> None:
    """Neither the one before, nor a mixture of both."""
    os.set_inheritable(state.fd, True)
    script = f"""
from ttmfs.recovery.state import State
state = State({state.fd})
number = 0
while True:
    number += 2
    state.note_answer(number, number.to_bytes(8, "little") * 60)
"""
    for _ in range(10):
        with python(script) as process:
            wait_until(lambda: again_once(state), "answers", 20)
            process.kill()
            process.communicate(timeout=10)
        for number, answer in again_once(state).items():
            assert answer == number.to_bytes(8, "little") * 60


def again_once(state: State) -> dict[int, bytes]:
    """The noted answer as the next daemon finds it."""
    found = again(state)
    try:
        return found.noted_answer()
    finally:
        found.close()


def test_a_new_connection_begins_without_requests_of_the_one_before(state: State) -> None:
    """The kernel's numbers begin anew, and mean other requests."""
    note(state, 0, 0, 0)
    state.note_answer(2, b"made")
    state.cached[3] = 5
    with contextlib.ExitStack() as killed:
        killed.enter_context(state.progress(6)).reach(100)
        later = again(state)
        killed.pop_all()
    later.begin_connection()
    assert later.suspects() == {}
    assert later.noted_answer() == {}
    assert not any(later.cached)
    with later.progress(6) as progress:
        assert progress.done == 0
    later.close()


# --- its end ---


def test_a_state_can_be_closed_twice_and_frees_its_memory() -> None:
    before = os.listdir("/proc/self/fd")
    made = State.new(PLAIN)
    made.keep_last_words()
    made.close()
    made.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert "ttmfs-state" not in Path("/proc/self/maps").read_text()


# --- what is carried out bit by bit ---


def test_c22_a_request_continues_where_the_previous_daemon_stopped(state: State) -> None:
    with contextlib.ExitStack() as killed:
        killed.enter_context(state.progress(4710)).reach(100)
        killed.enter_context(state.progress(4712))
        second = again(state)
        third = again(state)  # the second was killed at once
        killed.pop_all()
    second.close()
    with third.progress(RESENT | 4710) as progress, third.progress(4714) as other:
        assert (progress.done, other.done) == (100, 0)
        progress.reach(200)
    with third.progress(RESENT | 4712) as progress:
        assert progress.done == 0
    with third.progress(4710) as progress:
        assert progress.done == 0, "it was finished: this is another"
    third.close()


def test_requests_past_the_progress_table_start_from_the_beginning(state: State) -> None:
    with contextlib.ExitStack() as under_way:
        many = [under_way.enter_context(state.progress(number + 1)) for number in range(STEPPED + 10)]
        for number, progress in enumerate(many, 1):
            progress.reach(number)
        assert [progress.done for progress in many] == list(range(1, STEPPED + 11))
    with state.progress(1 << 40) as progress:
        assert progress.done == 0


def test_progress_of_a_request_that_is_not_repeated_is_forgotten(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttmfs.recovery.state.UNFINISHED_SECONDS", 0.0)
    with contextlib.ExitStack() as killed:
        for number in range(STEPPED):
            killed.enter_context(state.progress(number + 1)).reach(1)
        later = again(state)
        killed.pop_all()
    with contextlib.ExitStack() as under_way:
        for number in range(STEPPED):
            assert under_way.enter_context(later.progress(number + 1)).done == 0
    later.close()


class Ended(BaseException):
    """An exception that is not an Exception, like trio.Cancelled."""


def test_a_cancelled_request_continues_but_an_answered_one_restarts(state: State) -> None:
    """A daemon that leaves its mount to another cancels waiting requests. The kernel sends them to the next one."""
    with contextlib.suppress(Ended), state.progress(1) as progress:
        progress.reach(4096)
        raise Ended
    with contextlib.suppress(ValueError), state.progress(2) as progress:
        progress.reach(4096)
        raise ValueError
    with state.progress(3) as progress:
        progress.reach(4096)
    following = again(state)
    done = []
    for number in 1, 2, 3:
        with following.progress(number) as progress:
            done.append(progress.done)
    assert done == [4096, 0, 0]
    following.close()


def test_a_request_answered_with_an_error_restarts(state: State) -> None:
    """After a new mount, callers got an error, and may repeat the request."""
    with contextlib.suppress(Ended), state.progress(1) as progress:
        progress.reach(7)
        raise Ended
    following = again(state)
    following.forget_unfinished()
    for later in following, again(state):
        with later.progress(1) as progress:
            assert progress.done == 0
        later.close()
