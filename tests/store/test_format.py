"""What daemons of different versions pass on is frozen: a change that keeps the number of its format fails here.

If a test here fails because you changed the layout of the state, or what is in it, give
``ttmfs.recovery.state.FORMAT`` the next number. Then run ``PYTHONPATH=. python tests/store/test_format.py``, and add
what it prints to FROZEN. A daemon of another version then refuses to take over, and does not read wrong numbers.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from ttmfs.options import ExitCode
from ttmfs.recovery import keeper, keeper_client
from ttmfs.recovery import keeper_protocol as protocol
from ttmfs.recovery.state import (
    ANSWER,
    BACKING,
    CACHED,
    FORMAT,
    LATEST,
    NOTES,
    POINT_BITS,
    POINTS,
    RECORD,
    STEPPED,
    Record,
    State,
)
from ttmfs.stores.directory import RECORD as DIRECTORY_RECORD
from ttmfs.stores.private_tmpfs import NAMESPACE
from ttmfs.stores.store import STORE

RECORD_FIELDS = Record(
    version="0.1.0",
    page_size=4096,
    backup_size=1 << 30,
    temporary="/run/ttmfs",
    init="00ff" * 50,
    device="0:77",
    size=1 << 40,
    unsynced=(5, 4294967297),
    restarts=3,
    oom_kills=17,
    log_level="debug",
)
REQUEST, DONE = 4712, 16 << 20
NOTED = {0: 0x123456789ABCDEF2, 7: 0xFEDCBA9876543210, NOTES - 2: 0x10}
WORDS = 'Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n'

FROZEN = {6: "35a265af7f9af4a767c9753e95e81478cf25a30e8e680c349cc1fe791253fb94"}
"""The SHA-256 of what is handed over, by format: of every byte of a state with known content, and of `interface`."""

FIXTURE = Path(__file__).with_name(f"state_format_{FORMAT}.hex")
"""All bytes that are not 0 of a state with known content: a line has where they lie, and what they are."""


def made() -> bytes:
    """A state as this version writes it, with a value in each kind of field."""
    state = State.new(RECORD_FIELDS)
    try:
        for slot, note in NOTED.items():
            state.notes[slot] = note
        state.cached[2] = 1 << 30 | 7
        state.backing[3] = 5 << 32 | 2
        state.note_answer(4714, b"answered")
        with state.progress(REQUEST) as progress:
            progress.reach(DONE)
            os.pwrite(state.fd, WORDS.encode(), os.fstat(state.fd).st_size)
            return os.pread(state.fd, 1 << 20, 0)
    finally:
        state.close()


def pieces(content: bytes) -> dict[int, str]:
    """The bytes that are not 0, as runs that end before 16 zeros."""
    found, at = {}, 0
    for run in content.split(bytes(16)):
        if text := run.strip(b"\0"):
            found[at + run.index(text)] = text.hex()
        at += len(run) + 16
    return found


def interface() -> str:
    """What else daemon, keeper and the next daemon agree on."""
    agreed = {
        "sections": [RECORD, NOTES, 8, STEPPED, 16, CACHED, 8, BACKING, 8, ANSWER, LATEST, POINTS],
        "descriptors": [protocol.CONNECTION, protocol.STATE, STORE, NAMESPACE, DIRECTORY_RECORD],
        "descriptors besides": [protocol.KEEPER, protocol.GAVE_UP],
        "keeper's arguments": keeper_client._words(5, "syslog", ["python", "mount.py"])[4:],
        "environment": [protocol.KEEPER_PID, protocol.HELD, protocol.PATIENCE, *sorted(protocol.listen_fds(["a"]))],
        "first descriptor": protocol.FIRST_DESCRIPTOR,
        "restart": [int(protocol.RESTART), protocol.LEFT],
    }
    return json.dumps(agreed, indent=1)


def fingerprint() -> str:
    return hashlib.sha256(made() + interface().encode()).hexdigest()


def test_a_changed_layout_has_a_new_format() -> None:
    assert FROZEN.get(FORMAT) == fingerprint(), f"see the first lines of {Path(__file__).name}:\n{interface()}"


def test_a_frozen_state_is_read_correctly_field_by_field() -> None:
    length = RECORD + NOTES * 8 + STEPPED * 16 + CACHED * 8 + BACKING * 8 + ANSWER
    fd = os.memfd_create("frozen")
    os.ftruncate(fd, length)
    for line in FIXTURE.read_text().splitlines():
        at, text = line.split()
        os.pwrite(fd, bytes.fromhex(text), int(at))
    state = State(fd)
    assert state.record == RECORD_FIELDS
    assert {slot: note for slot, note in enumerate(state.notes) if note} == NOTED
    assert state.cached[2] == 1 << 30 | 7
    assert state.backing[3] == 5 << 32 | 2
    assert state.noted_answer() == {4714: b"answered"}
    with state.progress(REQUEST) as progress:
        assert progress.done == DONE
    assert state.take_last_words() == 'Fatal Python error: Aborted < File "a.py", line 1 in f'
    assert state.suspects()[NOTED[0] >> POINT_BITS] > 2
    state.close()


def test_names_and_statuses_of_the_keeper_equal_those_of_the_package() -> None:
    """It is run by its path, and imports nothing of it."""
    assert protocol.STORE == STORE
    assert {status.name: int(status) for status in keeper.Exit} == {
        status.name: int(status) for status in ExitCode if status.name in keeper.Exit.__members__
    }
    assert protocol.LEFT == ExitCode.LEFT


if __name__ == "__main__":
    FIXTURE.write_text("".join(f"{at} {text}\n" for at, text in pieces(made()).items()))
    sys.stdout.write(f'{FORMAT}: "{fingerprint()}",\n')
