"""Containers: a mount inside with the rights that docs/containers.md names, and a mount of the host that they use.

The containers are bubblewrap's. Like a container runtime it gives new namespaces, few capabilities and a /dev of its
own. It sets no_new_privs, and its containers receive mounts of the host (rslave).
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from harness import Mount, children, mounts_below, opened, run, wait_until
from stores import FUSE, ControlGroup, Place, mounted

SECONDS = 30.0
BWRAP = ("bwrap", "--die-with-parent", "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-pid")
DEVICE = ("--dev-bind", str(FUSE), str(FUSE))
NO_RIGHTS = ("--cap-drop", "ALL")
MAY_MOUNT = (*NO_RIGHTS, "--cap-add", "CAP_SYS_ADMIN")
"""What docs/containers.md says a container needs that mounts."""


STORE = "dd conv=notrunc status=none of="
"""The length of .shmem must not change, as a redirection of the shell would do."""


class Container:
    """A container for the time of a ``with``. Its process 1 runs `command`.

    Its log is what that process writes to standard error. The end kills it, and with it all of its processes.
    """

    def __init__(self, *flags: str, command: tuple[str, ...] = ("sleep", "1000"), **popen: Any) -> None:
        self._flags, self._command, self._popen = flags, command, popen

    def __enter__(self) -> Self:
        told, tell = os.pipe()
        self._errors = tempfile.TemporaryFile()  # until the end
        words = [*BWRAP, "--as-pid-1", "--info-fd", str(tell), *self._flags, *self._command]
        try:
            self.process = subprocess.Popen(
                words, pass_fds=(tell,), stdin=subprocess.DEVNULL, stderr=self._errors, **self._popen
            )
        finally:
            os.close(tell)
        with open(told, encoding="ascii") as info:
            self.pid = int(json.load(info)["child-pid"])
        wait_until(lambda: self.process.poll() is not None or self._has_begun(), "the container", SECONDS)
        return self

    def _has_begun(self) -> bool:
        """Whether it has left bubblewrap, which first makes the namespaces and mounts."""
        return Path(f"/proc/{self.pid}/comm").read_text() != "bwrap\n"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.end()
        self._errors.close()

    def run(self, command: str, code: int = 0, **more: Any) -> str:
        """Run a shell command in the container, as its root without capabilities. Returns both output streams."""
        enter = f"nsenter -t {self.pid} --all --wd=/ -- setpriv --no-new-privs --inh-caps=-all --bounding-set=-all"
        return run(f"{enter} sh -c {shlex.quote(command)} 2>&1", code=code, **more)

    def serves(self, path: Path) -> bool:
        """Whether a ttmfs at a path answers in the container."""
        return self.run(f"cat {path}/.config >/dev/null 2>&1; echo $?") == "0\n"

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return os.pread(self._errors.fileno(), 1 << 16, 0).decode()

    def wait_for_mount(self) -> None:
        """Wait until its process 1 has mounted."""
        wait_until(lambda: "serving /" in self.log, "the mount", SECONDS)

    def end(self) -> int:
        """Wait for its end. Returns the exit status of its process 1."""
        return self.process.wait(SECONDS)


def mounting(directory: Path, options: str = "size=16m") -> tuple[str, ...]:
    """The command `ttmfs mount -f`, with warnings as errors."""
    return (sys.executable, "-W", "error", "-m", "ttmfs", "mount", "-f", str(directory), "-o", options)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "inside"
    path.mkdir()
    return path


# --- a mount inside ---


def test_a_container_with_the_device_and_one_capability_mounts(directory: Path) -> None:
    with Container(*DEVICE, *MAY_MOUNT, command=mounting(directory)) as container:
        container.wait_for_mount()
        container.run(f"mkdir {directory}/a && echo stored | {STORE}{directory}/a/.shmem")
        assert container.run(f"head -c 7 {directory}/a/1") == "stored\n"
        assert not mounts_below(directory), "it is mounted outside"


def test_the_root_of_a_user_namespace_mounts_by_itself(directory: Path) -> None:
    """As in a rootless container. `.shmem` is a link there: only root of the machine may give files to the kernel."""
    rootless = ("--unshare-user", "--uid", "0", "--gid", "0")
    with Container(*rootless, *DEVICE, *MAY_MOUNT, command=mounting(directory)) as container:
        container.wait_for_mount()
        container.run(f"mkdir {directory}/a && echo stored >{directory}/a/1")
        assert container.run(f"head -c 7 {directory}/a/.image") == "stored\n"
        assert container.run(f"stat -c %F {directory}/a/.shmem") == "symbolic link\n"


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (MAY_MOUNT, "fuse device not found.*--device /dev/fuse"),
        ((*DEVICE, *NO_RIGHTS), r"needs CAP_SYS_ADMIN; for a container: --cap-add SYS_ADMIN, or bind"),
        (
            (*DEVICE, "--unshare-user", "--uid", "1000", "--gid", "1000"),
            r"set-user-id programs .* \(no_new_privs\): mount it as root",
        ),
    ],
    ids=["device", "capability", "no_new_privs"],
)
@pytest.mark.usefixtures("place")  # in which every user may open /dev/fuse
def test_what_is_missing_is_named_with_its_remedy(directory: Path, flags: tuple[str, ...], remedy: str) -> None:
    with Container(*flags, command=mounting(directory)) as container:
        assert container.end() == 2
        assert re.search(remedy, container.log), container.log
        assert len(container.log.splitlines()) == 1


# --- as process 1 ---


def test_process_1_unmounts_at_sigterm_and_ends_with_0(directory: Path) -> None:
    with Container(*DEVICE, *MAY_MOUNT, command=mounting(directory)) as container:
        container.wait_for_mount()
        os.kill(container.pid, signal.SIGTERM)
        assert container.end() == 0, container.log
        assert re.fullmatch(r".* serving /\S+\n.* SIGTERM: unmounting /\S+\n", container.log)


def test_process_1_replaces_its_daemon_and_reaps_orphans(directory: Path) -> None:
    with Container(*DEVICE, *MAY_MOUNT, command=mounting(directory, "standby=off")) as container:
        container.wait_for_mount()
        (daemon,) = children(container.pid)
        container.run(f"mkdir {directory}/a && echo kept >{directory}/a/1")
        os.kill(daemon, signal.SIGKILL)
        assert container.run(f"head -c 5 {directory}/a/1") == "kept\n"
        assert json.loads(container.run(f"cat {directory}/.config"))["keeper_pid"] == 1
        container.run("sleep 0.01 & :")  # its parent, the shell, ends first
        wait_until(lambda: len(children(container.pid)) == 1, "the orphan to be reaped")


# --- a mount of the host ---


@pytest.fixture
def shared(place: Place) -> Iterator[Path]:
    """A directory whose mounts reach the containers that have it: a mount of its own, of shared propagation."""
    with place.directory("containers") as base, mounted(base / "shared", "tmpfs") as path:
        run(f"mount --make-shared {path}")
        (path / "ttm").mkdir()
        yield path


@pytest.fixture
def host(shared: Path) -> Iterator[Mount]:
    """A mount of the host in that directory."""
    with Mount(shared / "ttm", "size=64m,allow_other,mode=1777") as mount:
        yield mount


def test_a_container_without_rights_uses_a_mount_of_the_host(host: Mount) -> None:
    with Container(*NO_RIGHTS) as container:
        container.run(f"mkdir {host.path}/a && echo stored | {STORE}{host.path}/a/.shmem && test ! -e /dev/fuse")
        assert container.run(f"stat -c %F {host.path}/a/.shmem") == "regular file\n"
    assert (host.path / "a/1").read_bytes()[:7] == b"stored\n"


def test_a_mount_made_later_reaches_a_container_that_runs(shared: Path) -> None:
    path = shared / "ttm"
    with Container(*NO_RIGHTS) as container:
        assert not container.serves(path)
        with Mount(path) as mount:
            assert container.serves(path)
            (path / "a").mkdir()
            mount.expect_restarts()
            mount.expect_log(r"was cut off, but it was not unmounted|mounted /\S+ anew")
            with opened(path / "a", os.O_RDONLY):
                assert "busy" in run(f"umount -f {path}", code=32)
            wait_until(lambda: container.serves(path), "the next mount", SECONDS)
            assert container.run(f"ls {path}") == "a\n"
        assert not container.serves(path)
        assert container.run(f"findmnt {path}", code=1) == ""


def test_a_container_goes_on_when_the_daemon_of_the_host_is_killed(host: Mount) -> None:
    host.expect_restarts()
    with Container(*NO_RIGHTS) as container:
        container.run(f"mkdir {host.path}/a && echo kept >{host.path}/a/1")
        host.kill()
        assert container.run(f"head -c 5 {host.path}/a/1; echo more >{host.path}/a/2") == "kept\n"
    assert host.restarts() == 1


def test_a_copy_of_the_mount_that_is_not_told_of_its_end_is_dead(shared: Path) -> None:
    """Without propagation a container keeps its copy, and the daemon ends all the same."""
    with contextlib.ExitStack() as ended:
        with Mount(shared / "ttm") as mount:
            container = ended.enter_context(Container(*NO_RIGHTS))
            run(f"nsenter -t {container.pid} --mount --wd=/ -- mount --make-rprivate /")
        assert "not connected" in container.run(f"ls {mount.path}", code=2)


@contextlib.contextmanager
def user_namespace(first: int) -> Iterator[str]:
    """A user namespace in which uid 0 is a user of the host, and so on. Gives a command that enters it as its root."""
    process = subprocess.Popen(["unshare", "--user", "sleep", "1000"])
    try:
        ours = os.readlink("/proc/self/ns/user")
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/user") != ours, "the namespace", SECONDS)
        for name in "uid_map", "gid_map":
            Path(f"/proc/{process.pid}/{name}").write_text(f"0 {first} 1000")
        yield f"nsenter -t {process.pid} --user --setuid 0 --setgid 0 --"
    finally:
        process.kill()
        process.wait()


def test_users_of_a_container_are_the_users_that_they_are_mapped_to(host: Mount) -> None:
    (host.path / "roots").mkdir(mode=0o700)
    with user_namespace(100_000) as inside:
        run(f"{inside} sh -c 'mkdir {host.path}/a && echo stored | {STORE}{host.path}/a/.shmem'")
        assert (host.path / "a").stat().st_uid == 100_000
        assert run(f"{inside} stat -c %u {host.path}/a {host.path}/roots") == "0\n65534\n"
        assert "Permission denied" in run(f"{inside} ls {host.path}/roots", code=2)


def test_users_of_a_container_need_allow_other(shared: Path) -> None:
    with Mount(shared / "ttm") as mount, user_namespace(100_000) as inside:
        assert "Permission denied" in run(f"{inside} ls {mount.path}", code=2)


def test_a_page_is_charged_to_the_process_that_stores_it_in_the_tmpfs(shared: Path) -> None:
    """That is the daemon for requests, and the program itself for .shmem."""
    size, limit, near = 8 << 20, 1 << 30, 1 << 20
    with (
        ControlGroup(limit) as daemons,
        ControlGroup(limit) as writers,
        Mount(shared / "ttm", preexec_fn=daemons.join) as mount,
        Container(*NO_RIGHTS) as container,
    ):
        (mount.path / "a").mkdir()
        write = f"dd if=/dev/urandom bs=1M count={size >> 20} conv=notrunc status=none of={mount.path}/a/"
        container.run(f"{write}.image", preexec_fn=writers.join)
        assert (round(daemons.shmem() / near), round(writers.shmem() / near)) == (8, 0)
        container.run(f"{write}.shmem oflag=seek_bytes seek={size}", preexec_fn=writers.join)
        assert (round(daemons.shmem() / near), round(writers.shmem() / near)) == (8, 8)


# --- a sidecar ---


@contextlib.contextmanager
def sidecar(path: Path) -> Iterator[int]:
    """A container that mounts for others: its mounts reach them (rshared). Gives its process 1, which is to end.

    Its command is that of examples/kubernetes-pod.yaml.
    """
    namespaces = ["unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = [*namespaces, "sh", "-c", f"mkdir -p {path}; exec {shlex.join(mounting(path))}"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: children(process.pid), "process 1", SECONDS)
        (first,) = children(process.pid)
        yield first
        process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def test_a_sidecar_mounts_for_another_container(shared: Path) -> None:
    path = shared / "ttm"
    with Container(*NO_RIGHTS) as program:
        with sidecar(path) as killed:
            wait_until(lambda: program.serves(path), "the mount", SECONDS)
            program.run(f"mkdir {path}/a && echo stored >{path}/a/1")
            os.kill(killed, signal.SIGKILL)  # and with it all of the container: the mount is dead
            wait_until(lambda: "not connected" in program.run(f"ls {path} || true"), "its end")
        with sidecar(path) as replaced:
            wait_until(lambda: program.serves(path), "the mount of the next sidecar", SECONDS)
            assert program.run(f"ls {path}") == "", "pages of a mount without store= are gone"
            os.kill(replaced, signal.SIGTERM)
            wait_until(lambda: path not in map(Path, mounts_below(shared)), "the end of the mount", SECONDS)
            wait_until(lambda: not program.serves(path), "its end in the container")
    assert mounts_below(shared) == [str(shared)]
