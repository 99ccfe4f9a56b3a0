"""A virtual machine whose memory is a backup: it is stopped, written back to swap, and goes on. See docs/qemu.md.

It needs qemu-system-x86 and swap, so it is no part of ``make test``: ``make test-qemu``. There is no KVM: QEMU
translates the guest. The guest is guest.c, which counts and sums up its memory without end.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from harness import REPOSITORY, Mount, count, run, wait_until

MEMORY = 256 << 20
USED = 192 << 20
"""Bytes of memory that the guest has, and that it fills (MIB in guest.c)."""

SECONDS = 60.0
TTMFS = (sys.executable, "-m", "ttmfs")

pytestmark = pytest.mark.usefixtures("swap")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("guest") / "guest"
    flags = "-m32 -O2 -ffreestanding -mgeneral-regs-only -fno-pic -fno-pie -fno-stack-protector -nostdlib -static "
    flags += "-fno-asynchronous-unwind-tables -Wl,-n,-Ttext=0x100000,-estart,--build-id=none,--no-warn-rwx-segments"
    run(f"cc {flags} -o {program} {REPOSITORY}/tests/qemu/guest.c")
    return program


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Path]:
    """The backup that is the guest's memory."""
    (tmp_path / "mnt").mkdir()
    with Mount(tmp_path / "mnt", f"size=1g,backup_size={MEMORY}") as mount:
        (mount.path / "vm").mkdir()
        yield mount.path / "vm"


class Qemu:
    """A virtual machine for the time of a ``with``, controlled by QMP. `before` runs QEMU, with {} for its memory."""

    def __init__(self, guest: Path, memory: str, directory: Path, *more: str, before: tuple[str, ...] = ()) -> None:
        self._serial, self._control = directory / "serial", directory / "qmp"
        backend = f"memory-backend-file,id=ram,size={MEMORY},mem-path={memory},share=on"
        self._command = [
            *before, "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-kernel", str(guest),
            "-object", backend, "-machine", "q35,memory-backend=ram", "-m", str(MEMORY >> 20),
            "-serial", f"file:{self._serial}", "-qmp", f"unix:{self._control},server=on,wait=off", *more,
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self._serial.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, cwd=REPOSITORY)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        wait_until(lambda: self._socket.connect_ex(str(self._control)) == 0, "QEMU", SECONDS)
        self._answers = self._socket.makefile()
        self.tell("qmp_capabilities")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._socket.close()
        self._control.unlink(missing_ok=True)

    def tell(self, command: str, **arguments: Any) -> Any:
        """Send a command. Returns its answer; events before it are passed over."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "return" not in (answer := json.loads(self._answers.readline())):
            assert "error" not in answer, answer
        return answer["return"]

    def rounds(self) -> list[tuple[int, str]]:
        """The rounds that the guest has written here from beginning to end: number and sum."""
        text = self._serial.read_text() if self._serial.exists() else ""
        return [
            (int(number, 16), total) for number, total in re.findall(r"^round (\w+) sum (\w+)\n", text, re.MULTILINE)
        ]

    def wait_for_rounds(self, number: int) -> None:
        """Wait until the guest has written this number of further rounds."""
        before = len(self.rounds())
        wait_until(lambda: len(self.rounds()) >= before + number, "the guest", SECONDS)


def check(rounds: list[tuple[int, str]], first: int = 1) -> None:
    """No round is missing, and all have the same sum: the memory of the guest is what it was."""
    assert [number for number, _ in rounds] == [*range(first, first + len(rounds))]
    assert len({total for _, total in rounds}) == 1


def writeback(vm: Path) -> float:
    """The seconds that a writeback of all takes. None of the guest's pages stays in memory."""
    began = time.monotonic()
    said = run(f"{shlex.join(TTMFS)} writeback {vm}", cwd=REPOSITORY)
    assert "swapped out, 0 in memory" in said
    return time.monotonic() - began


@pytest.mark.parametrize("way", ["shmem", "descriptor"])
def test_a_stopped_guest_is_swapped_out_and_goes_on(guest: Path, vm: Path, tmp_path: Path, way: str) -> None:
    before = (*TTMFS, "fd", str(vm), "--") if way == "descriptor" else ()
    with Qemu(guest, "{}" if before else f"{vm}/.shmem", tmp_path, before=before) as qemu:
        qemu.wait_for_rounds(2)
        qemu.tell("stop")
        stopped, resident = len(qemu.rounds()), count(vm, "resident") * 4096
        assert USED <= resident < USED + (8 << 20)
        seconds = writeback(vm)
        began = time.monotonic()
        qemu.tell("cont")
        qemu.wait_for_rounds(1)
        print(f"{resident >> 20} MiB out in {seconds:.2f} s;", end=" ")
        print(f"the guest's next round after {time.monotonic() - began:.2f} s")
        qemu.wait_for_rounds(2)
        assert count(vm, "resident") * 4096 >= USED
        assert len(qemu.rounds()) >= stopped + 3
        check(qemu.rounds())


def test_a_guest_goes_on_in_another_qemu_that_starts_with_its_backup(guest: Path, vm: Path, tmp_path: Path) -> None:
    """QEMU saves only the devices, since the memory stays in the backup (x-ignore-shared)."""
    state, memory = tmp_path / "state", f"{vm}/.shmem"
    ignore = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
    with Qemu(guest, memory, tmp_path) as qemu:
        qemu.wait_for_rounds(2)
        qemu.tell("stop")
        qemu.tell("migrate-set-capabilities", **ignore)
        qemu.tell("migrate", uri=f"exec:cat >{state}")
        wait_until(lambda: qemu.tell("query-migrate")["status"] == "completed", "the devices to be saved", SECONDS)
        rounds = qemu.rounds()
    print(f"{state.stat().st_size >> 10} KiB of devices, memory out in {writeback(vm):.2f} s")
    with Qemu(guest, memory, tmp_path, "-incoming", "defer") as qemu:
        qemu.tell("migrate-set-capabilities", **ignore)
        qemu.tell("migrate-incoming", uri=f"exec:cat {state}")
        wait_until(lambda: qemu.tell("query-status")["status"] == "paused", "the devices to be restored", SECONDS)
        qemu.tell("cont")
        qemu.wait_for_rounds(2)
        later = qemu.rounds()
    check(rounds)
    check(later, later[0][0])
    assert later[0][0] - rounds[-1][0] in (1, 2), "the line of one round may lie in both files"
    assert later[0][1] == rounds[0][1]


def test_a_guest_runs_while_the_daemon_is_killed(guest: Path, vm: Path, tmp_path: Path) -> None:
    mount = Mount.living[-1]
    mount.expect_restarts()
    with Qemu(guest, f"{vm}/.shmem", tmp_path) as qemu:
        qemu.wait_for_rounds(1)
        os.kill(mount.pid, 9)
        qemu.wait_for_rounds(2)
        check(qemu.rounds())
    assert mount.restarts() == 1
