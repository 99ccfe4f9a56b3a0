"""A machine for tests: a real systemd as process 1 in its own namespaces, on a temporary overlay of this system.

Inside, /, /tmp, /run and /var are private, so nothing here is written to. The devices and the kernel are shared, so
/dev/fuse works. Every user may open it, as udev would have it. It needs root, and Debian's package systemd.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

from harness import REPOSITORY, wait_until

BOOT_SECONDS, COMMAND_SECONDS = 60.0, 100.0

NOT_WANTED = (
    "getty.target systemd-logind.service systemd-udevd.service systemd-timesyncd.service e2scrub_reap.service "
    "systemd-tmpfiles-setup.service systemd-tmpfiles-clean.timer cron.service apt-daily.timer apt-daily-upgrade.timer"
).split()
"""What a machine has and this one does not need; or what would reach out of it."""

INIT = f"""
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 machine {{room}}
mkdir {{room}}/changes {{room}}/work {{room}}/root {{room}}/changes-here {{room}}/work-here
mount -t overlay -o lowerdir=/,upperdir={{room}}/changes,workdir={{room}}/work machine {{room}}/root
cd {{room}}/root
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
for place in run tmp var/log; do mount -t tmpfs tmpfs $place; done
mknod -m 666 run/fuse c 10 229
mount --bind run/fuse dev/fuse
mkdir -p .{REPOSITORY}
cd .{REPOSITORY}
mount -t overlay -o lowerdir={REPOSITORY},upperdir={{room}}/changes-here,workdir={{room}}/work-here machine .
cd {{room}}/root
for unit in {" ".join(NOT_WANTED)}; do ln -sf /dev/null etc/systemd/system/$unit; done
rm -rf etc/systemd/system/multi-user.target.wants/*
mkdir .before
pivot_root . .before
umount -l /.before
export container=other
exec /lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=no
"""


class Machine:
    """A booted systemd, for the time of a ``with``."""

    def __enter__(self) -> Self:
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            room = undo.enter_context(tempfile.TemporaryDirectory(prefix="ttmfs-machine-"))
            log = undo.enter_context(tempfile.TemporaryFile("w+"))
            outer = subprocess.Popen(
                ["unshare", "--fork", "--pid", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc",
                 "sh", "-c", INIT.format(room=room)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            undo.callback(outer.wait, 10)  # it buries the other's first process
            self._init = 0
            undo.callback(self._power_off, outer)

            def booted() -> bool:
                children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
                if outer.poll() is not None or not children:
                    log.seek(0)
                    assert outer.poll() is None, f"systemd did not come up: {log.read()}"
                    return False
                self._init = int(children[0])
                return self.call("systemctl is-system-running", seconds=20).stdout.strip() in ("running", "degraded")

            wait_until(booted, "systemd", BOOT_SECONDS)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _power_off(self, outer: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init or outer.pid, signal.SIGKILL)

    def call(
        self, command: str, *, seconds: float = COMMAND_SECONDS, **more: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run a shell command inside, as root, in the repository."""
        return subprocess.run(
            self.words(command), capture_output=True, text=True, errors="replace", timeout=seconds, check=False, **more
        )

    def words(self, command: str) -> list[str]:
        """The command line that runs a shell command inside."""
        return ["nsenter", "-t", str(self._init), "-a", "env", "-C", str(REPOSITORY), "bash", "-c", command]

    def run(self, command: str, *, code: int = 0, **more: Any) -> str:
        """Run a shell command inside, which must end with a status. Returns both output streams."""
        done = self.call(command, **more)
        assert done.returncode == code, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def path(self, path: str) -> Path:
        """The path of a file inside for processes outside."""
        return Path(f"/proc/{self._init}/root{path}")

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def pid(self, inner: int) -> int:
        """The process id outside of a process inside."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, StopIteration, IndexError):
                    lines = (entry / "status").read_text().splitlines()
                    ids = next(line for line in lines if line.startswith("NSpid:")).split()[1:]
                    same = os.stat(entry / "ns/pid").st_ino == os.stat(f"/proc/{self._init}/ns/pid").st_ino
                    if same and int(ids[-1]) == inner:
                        return int(entry.name)
        raise AssertionError(f"no process {inner} is inside")


class Unit:
    """A unit of a machine, or of a user's manager in it; `systemctl` is then the command that reaches that manager."""

    def __init__(self, machine: Machine, name: str, systemctl: str = "systemctl") -> None:
        self.machine = machine
        self.name = name
        self.systemctl = systemctl

    def __call__(self, verb: str, *, code: int = 0) -> str:
        return self.machine.run(f"{self.systemctl} {verb} {shlex.quote(self.name)}", code=code)

    def show(self, what: str) -> str:
        """One property."""
        return self.machine.run(f"{self.systemctl} show -P {what} {shlex.quote(self.name)}").strip()

    @property
    def main_pid(self) -> int:
        """Its main process, inside."""
        return int(self.show("MainPID"))

    @property
    def state(self) -> tuple[str, str]:
        return self.show("ActiveState"), self.show("SubState")

    def journal(self) -> list[dict[str, Any]]:
        """Its log messages, and the manager's messages about it."""
        flag = "--user-unit" if "--user" in self.systemctl else "-u"
        out = self.machine.run(f"journalctl --sync; journalctl -q -o json {flag} {shlex.quote(self.name)}")
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]
