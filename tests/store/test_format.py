"""What daemons of different versions hand over is frozen: a change that keeps the number of its format fails here.

If a test here fails because you changed the layout of the state, or what is in it, give
``ttmfs.recovery.state.FORMAT`` the next number. Then run
``PYTHONPATH=. python tests/store/test_format.py``, and add what it prints to FROZEN. A daemon of
another version refuses to take over then, in place of reading wrong numbers.
"""

import hashlib
import json
import os
import struct
import sys
from pathlib import Path

from ttmfs.daemon import service
from ttmfs.fuse import metrics
from ttmfs.recovery import keeper
from ttmfs.recovery.state import FORMAT, HEADER, KEY, LATEST, LONG, NOTES, POINTS, ROWS, State
from ttmfs.stores.directory import RECORD
from ttmfs.stores.private_tmpfs import NAMESPACE
from ttmfs.stores.store import STORE

HEADER_ENTRIES = {
    "version": "0.1.0",
    "page_size": 4096,
    "backup_size": 1 << 30,
    "grain": 4096,
    "temporary": None,
    "init": "00ff" * 50,
    "device": "0:77",
}
COUNTS = {
    "restarts": 3,
    "size": 1 << 40,
    "memory kills": 17,
    "unsynced 4294967297": 1,
    "operation read": 100,
    "duration 0 read": 2**64 - 1,
    "error read ENOENT": 5,
    "page in": 7,
    "handover": 8,
    "busy poll hits": 9,
    "busy poll misses": 10,
}
REQUEST, DONE = ("drop", 1 << 31 | 5, b"1-1000", 4711), 16 << 20
NOTED = {0: 0x123456789ABCDEF2, 7: 0xFEDCBA9876543210, NOTES - 2: 0x10}
WORDS = 'Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n'

FROZEN = {3: "63e441aa0f4f5ec09bdba85bd38ea066fa18de3ebf90015f2295af15f4519963"}
"""The SHA-256 of what is handed over, by format: of every byte of a state with known content, and of `interface`."""

FIXTURE = Path(__file__).with_name(f"state_format_{FORMAT}.hex")
"""All bytes that are not 0 of a state with known content: a line has where they lie, and what they are."""


def made() -> bytes:
    """A state as this version writes it, with a value in each kind of field."""
    state = State.new(**HEADER_ENTRIES)
    try:
        for key, count in COUNTS.items():
            state.set(key, count)
            state.values[state.at(key) + 1] = count // 2
        for slot, note in NOTED.items():
            state.notes[slot] = note
        with state.progress(*REQUEST) as progress:
            progress.reach(DONE)
            os.pwrite(state.fd, WORDS.encode(), os.fstat(state.fd).st_size)
            return os.pread(state.fd, 1 << 20, 0)
    finally:
        state.close()


def pieces(content: bytes) -> dict[int, str]:
    """The bytes that are not 0, in runs that end where 16 zeros follow."""
    found, at = {}, 0
    for run in content.split(bytes(16)):
        if text := run.strip(b"\0"):
            found[at + run.index(text)] = text.hex()
        at += len(run) + 16
    return found


def interface() -> str:
    """What else daemon, keeper and the next daemon agree on."""
    agreed = {
        "sections": [HEADER, ROWS, KEY, 16, NOTES, 8, LONG, 16, LATEST, POINTS],
        "header": list(HEADER_ENTRIES),
        "buckets of durations": metrics.BOUNDS,
        "descriptors": [keeper.CONNECTION, STORE, keeper.STATE, NAMESPACE, RECORD, keeper.STARTS],
        "note of the starts": service._NOTE.format,
        "keeper's arguments": keeper._command_line(3, 4, 5, 6, 7, 8.0, "syslog", "/mnt", ["python", "mount.py"])[4:],
        "environment": [keeper.KEEPER_PID, keeper.KEEPER_CHANNEL, *sorted(keeper._listen_fds(["a"]))],
        "first descriptor": keeper.FIRST_DESCRIPTOR,
        "restart": [int(keeper.RESTART), keeper.LEFT],
    }
    return json.dumps(agreed, indent=1)


def fingerprint() -> str:
    return hashlib.sha256(made() + interface().encode()).hexdigest()


def test_a_changed_layout_has_a_new_format() -> None:
    assert FROZEN.get(FORMAT) == fingerprint(), f"see the first lines of {Path(__file__).name}:\n{interface()}"


def test_a_frozen_state_is_read_correctly_field_by_field() -> None:
    length = HEADER + ROWS * (KEY + 16) + NOTES * 8 + LONG * 16
    fd = os.memfd_create("frozen")
    os.ftruncate(fd, length)
    for line in FIXTURE.read_text().splitlines():
        at, text = line.split()
        os.pwrite(fd, bytes.fromhex(text), int(at))
    state = State(fd)
    assert state.header == {"format": FORMAT, **HEADER_ENTRIES}
    assert {key: state.get(key) for key in COUNTS} == COUNTS
    assert {key: state.values[state.at(key) + 1] for key in COUNTS} == {key: n // 2 for key, n in COUNTS.items()}
    assert state.keys("unsynced") == ["4294967297"]
    assert {slot: note for slot, note in enumerate(state.notes) if note} == NOTED
    with state.progress(*REQUEST) as progress:
        assert progress.done == DONE
    assert state.take_last_words() == 'Fatal Python error: Aborted < File "a.py", line 1 in f'
    assert state.suspects()[NOTED[0] & ~POINTS] > 2
    state.close()


def test_keeper_arguments_are_read_as_they_are_written() -> None:
    """A daemon that was started before an upgrade starts the keeper of the version after it."""
    words = keeper._command_line(3, 4, 5, -1, 7, 8.5, "stderr", "/mnt", ["python", "mount.py"])
    assert words[4:] == ["3", "4", "5", "-1", "7", "8.5", "stderr", "/mnt", "python", "mount.py"]


def test_a_starts_note_of_another_length_is_ignored() -> None:
    fd = os.memfd_create("starts")
    try:
        for length in (0, 5, service._NOTE.size + 1):
            os.ftruncate(fd, length)
            assert service._read_note(fd) == (0, 1, 0.0, 0.0)
        os.ftruncate(fd, 0)
        os.pwrite(fd, struct.pack("<IIdd", 2, 5, 10.0, 99.5), 0)
        assert service._read_note(fd) == (2, 5, 10.0, 99.5)
    finally:
        os.close(fd)


if __name__ == "__main__":
    FIXTURE.write_text("".join(f"{at} {text}\n" for at, text in pieces(made()).items()))
    sys.stdout.write(f'{FORMAT}: "{fingerprint()}",\n')
