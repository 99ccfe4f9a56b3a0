"""What ``ttmfs doctor`` says of a machine, by use, on machines that really lack what it reports."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import REPOSITORY, Mount, wait_until
from stores import ALICE, Place
from ttmfs.cli.commands.machine_checks import USES

TTMFS = f"{sys.executable} -m ttmfs"
ENOUGH = 60.0

Found = dict[tuple[str, str], dict[str, str]]
"""Checks by use and by what was checked."""


def checked(done: "subprocess.CompletedProcess[str]") -> Found:
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return {(check["use"], check["what"]): check for check in json.loads(done.stdout)}


@contextlib.contextmanager
def namespaces() -> Iterator[list[str]]:
    """A user and a mount namespace of their own, with all users: limits and mounts there are nobody else's.

    Gives the words that run a command there, as a root with all rights.
    """
    with subprocess.Popen(["unshare", "--user", "--mount", "--propagation", "private", "sleep", "1000"]) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            wait_until(lambda: comm.read_text() == "sleep\n", "the namespaces")
            for kind in "uid", "gid":
                Path(f"/proc/{process.pid}/{kind}_map").write_text("0 0 65536")
            yield ["nsenter", "-t", str(process.pid), "-U", "-m", "-S", "0", "-G", "0", "--"]
        finally:
            process.kill()


def doctor(before: Iterable[str] = (), *, command: str = TTMFS) -> Found:
    """What it says in such namespaces, after shell commands there."""
    script = "; ".join(["set -e", f"cd {REPOSITORY}", *before, f"exec {command} doctor --json"])
    with namespaces() as enter:
        words = [*enter, "sh", "-c", script]
        return checked(subprocess.run(words, capture_output=True, text=True, timeout=ENOUGH, check=False))


def here(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    command = [*TTMFS.split(), "doctor", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=ENOUGH, check=False, **{"cwd": REPOSITORY, **more}
    )


def test_every_use_is_shown_with_a_heading_and_a_line_for_each_check(mount: Mount) -> None:
    found = checked(here("--json"))
    shown = here().stdout
    lines = shown.splitlines()
    assert [line for line in lines[:-1] if not line.startswith(" ")] == [*(use for use, _ in USES), "mounts"]
    for check in found.values():
        assert any(line.split()[:2] == [check["state"], check["what"].split()[0]] for line in lines), check
        assert check["state"] == "ok" or check["do"], f"what to do about it? {check}"
    assert found["mounts", str(mount.path)]["state"] == "ok"


@pytest.mark.parametrize("who", ["root", "a user"])
def test_apparmor_of_ubuntu_restricts_user_namespaces(tmp_path: Path, place: Place, who: str) -> None:
    """A namespace in which no user namespace can be made, and the setting of Ubuntu 24.04 in /proc."""
    kernel = shutil.copytree(
        "/proc/sys/kernel", tmp_path / "kernel", ignore=lambda _, names: {*names} - {"osrelease", "hostname"}
    )
    (kernel / "apparmor_restrict_unprivileged_userns").write_text("1\n")
    before = [
        f"mount --bind {shlex.quote(str(kernel))} /proc/sys/kernel",
        "echo 0 >/proc/sys/user/max_user_namespaces",
    ]
    user = (
        f"setpriv --reuid {ALICE} --regid {ALICE} --clear-groups env -C {place.path}/repository {place.python} -m ttmfs"
    )
    found = doctor(before, command=user if who == "a user" else TTMFS)
    check = found["mounts of users", "user namespaces"]
    assert check["state"] == "warning"
    assert "AppArmor restricts them, the default of Ubuntu 24.04" in check["found"]
    assert "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0" in check["do"]
    if who == "a user":
        assert found["every mount", "private tmpfs"]["state"] == "warning"
        assert "size= does not limit .shmem" in found["every mount", "private tmpfs"]["found"]


def test_what_a_machine_lacks_is_reported_with_its_remedy(tmp_path: Path) -> None:
    """Mounts hide what the machine has: /dev/fuse, fusermount3's set-user-ID bit."""
    (tmp_path / "null").touch()
    fusermount = shutil.which("fusermount3")
    assert fusermount
    plain = shutil.copy(fusermount, tmp_path / "fusermount3")  # without the bit
    os.chmod(plain, 0o755)
    found = doctor(
        [
            f"mount --bind {tmp_path}/null /dev/fuse",
            f"mount --bind {plain} {os.path.realpath(fusermount)}",
        ]
    )
    assert found["mounts of users", "set-user-ID"]["state"] == "missing"
    assert "chmod u+s" in found["mounts of users", "set-user-ID"]["do"]
    assert found["mounts of users", "/dev/fuse for users"]["state"] == "missing"
    assert found["containers", "mount propagation"]["do"].startswith("as root: mount --make-rshared /"), "unshared"


def test_names_of_mounts_that_others_chose_do_no_harm(tmp_path: Path) -> None:
    """Any user can mount something with such a name."""
    hostile = os.fsencode(tmp_path) + b"/\xff\x1c\r\x85 /"
    os.mkdir(hostile)
    found = doctor([f"mount -t tmpfs none {tmp_path}/*"])
    assert found["containers", "mount propagation"]["state"] == "missing"


def test_root_without_the_right_to_mount_is_told() -> None:
    """As in a container that was started without --cap-add SYS_ADMIN."""
    # A user namespace would give root all rights again, so there must be none.
    before = ["echo 0 >/proc/sys/user/max_user_namespaces"]
    found = doctor(before, command=f"setpriv --bounding-set -sys_admin --inh-caps -sys_admin {TTMFS}")
    assert found["containers", "CAP_SYS_ADMIN"]["state"] == "missing"
    assert "--cap-add SYS_ADMIN" in found["containers", "CAP_SYS_ADMIN"]["do"]
    assert found["every mount", "private tmpfs"]["state"] == "warning"
    assert "CAP_SYS_ADMIN" in found["every mount", "private tmpfs"]["found"]


def test_a_user_is_told_what_only_root_can_check(place: Place) -> None:
    command = [place.python, "-m", "ttmfs", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=ENOUGH, check=False, cwd=place.path / "repository",
        user=ALICE, group=ALICE, extra_groups=[],
    )  # fmt: skip
    found = checked(done)
    assert found["mounts", "only root sees"]["do"] == "sudo ttmfs doctor"
    assert ("mounts of users", "RLIMIT_MEMLOCK") in found
    assert ("mounts", "only root sees") not in checked(here("--json"))


def test_without_the_extra_export_it_says_how_to_install_it() -> None:
    done = here("--json", env={**os.environ, "PYTHONPATH": ""})
    assert checked(done)["metrics", "prometheus_client"]["state"] == "ok"
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "ttmfs", "doctor", "--json"],
        capture_output=True, text=True, timeout=ENOUGH, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    found = checked(bare)
    assert found["metrics", "prometheus_client"]["state"] == "missing"
    assert "pip install 'prometheus_client" in found["metrics", "prometheus_client"]["do"]
    assert found["every mount", "pyfuse3"]["state"] == "problem"
    assert bare.returncode == 1
