"""What ``doctor`` checks of the machine and of this process, by use. Nothing here changes anything."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ...linux import fuse_device, memory
from ...linux.mountinfo import CEPH, NFS, mounted_at, mounts
from ...linux.system_calls import swap_space
from ...linux.tmpfs import NeedsUserNamespace, new_tmpfs
from ...options import BASE_PAGE_SIZE
from ...quoting import quoted
from ...version import __version__
from ..keepers import keepers
from .check import MISSING, OK, PROBLEM, WARNING, Check, either, read
from .child_process import PATIENCE
from .terminal import size

__all__ = ["USES"]

NO_LIMIT = 1 << 62
NOBODY = 65534
UNITS = "/etc /run /usr/local/lib /usr/lib /lib".split()
CAP_SYS_ADMIN = 21

APPARMOR = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
USER_NAMESPACES = (
    (APPARMOR, "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
)
"""What forbids user namespaces: a file of the kernel, the value that does, and what permits them again."""


def _kernel_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# --- every mount ---


def _version() -> Check:
    return Check("ttmfs", OK, f"{__version__}, Python {sys.version.split()[0]}")


def _fuse_device() -> Check:
    error = fuse_device.error()
    bad = f"cannot be opened: {error}"
    return either(fuse_device.PATH, not error, "can be opened", bad, fuse_device.ADVICE, PROBLEM)


def _fusermount() -> Check:
    path = shutil.which("fusermount3")
    return either("fusermount3", path, path or "", "is not installed", "apt install fuse3", PROBLEM)


def _kernel() -> Check:
    release = os.uname().release
    for needed, state, lacks in (
        ((6, 1), PROBLEM, "ttmfs needs Linux 6.1 or newer"),
        ((6, 5), WARNING, "before 6.5 (cachestat), finding swapped-out pages is slow"),
        ((6, 9), WARNING, "before 6.9 (FUSE_NOTIFY_RESEND), open files are lost when a daemon is killed"),
    ):  # fmt: skip
        if _kernel_version() < needed:
            return Check("kernel", state, f"{release}: {lacks}", "use a newer kernel")
    return Check("kernel", OK, release)


def _pyfuse3() -> Check:
    try:
        importlib.import_module("pyfuse3")
    except ImportError as error:
        install = "pip install pyfuse3 (Debian: python3-pyfuse3)"
        return Check("pyfuse3", PROBLEM, f"cannot be imported: {error}", install)
    return Check("pyfuse3", OK, importlib.metadata.version("pyfuse3"))


def _compiled() -> Check:
    found = importlib.util.find_spec("ttmfs.fuse.compiled_requests")
    return either(
        "compiled requests", found, "are installed: C code answers the plain requests for pages in memory",
        "are not installed: Python answers all requests, which takes longer",
        "install a C compiler and Python's headers (Debian: gcc, python3-dev), then ttmfs again",
    )  # fmt: skip


def _private_tmpfs() -> Check:
    """Whether this process gets one, by making one: it ends with its descriptor."""
    what = "private tmpfs"
    try:
        for fd in new_tmpfs(size="4096"):
            if fd is not None:
                os.close(fd)
    except NeedsUserNamespace as error:
        if not os.geteuid():
            return Check(
                what, WARNING, f"cannot be made: {error.strerror}; root lacks CAP_SYS_ADMIN here",
                "give the container CAP_SYS_ADMIN, or mount on the host",
            )  # fmt: skip
        found = f"cannot be made: {error.strerror}; pages lie in a directory instead, and size= does not limit .shmem"
        return Check(what, WARNING, found, "see user namespaces, below")
    except OSError as error:
        return Check(what, PROBLEM, f"cannot be made: {error.strerror}", "mount with store=DIR")
    return Check(what, OK, "can be made: the kernel enforces size=")


def _control_group() -> Check:
    """The limits of this process' control group. A daemon that a service starts has its own."""
    ram = os.sysconf("SC_PHYS_PAGES") * BASE_PAGE_SIZE
    for group in memory.control_groups():
        for name in "memory.max", "memory.limit_in_bytes", "memory.high":
            limit = memory.read_number(group / name)
            if limit is not None and limit < min(ram, NO_LIMIT):
                return Check(
                    "control group", WARNING, f"{quoted(group)} limits memory to {size(limit)} ({name})",
                    "for mounts made from here: choose size= below it, or raise the limit",
                )  # fmt: skip
    return Check("control group", OK, "it has no limit below the memory of the machine")


def _syslog() -> Check:
    return either(
        "syslog", os.path.exists("/dev/log"), "/dev/log exists",
        "/dev/log does not exist: the log of daemons in the background is lost",
        "mount with log=FILE, or start a syslog service",
    )  # fmt: skip


# --- mounts of ordinary users ---


def _device_for_users() -> Check | None:
    with contextlib.suppress(OSError):
        is_open = os.stat(fuse_device.PATH).st_mode & 0o006 == 0o006
        return either(
            "/dev/fuse for users", is_open, "every user may open it", "not every user may open it",
            "as root: chmod 0666 /dev/fuse (udev does so at the next start)", MISSING,
        )  # fmt: skip
    return None


def _set_uid() -> Check | None:
    if not (path := shutil.which("fusermount3")):
        return None
    works = os.stat(path).st_mode & stat.S_ISUID
    bad = f"{path} is not set-user-ID, so users cannot mount"
    state = PROBLEM if os.geteuid() else MISSING
    return either("set-user-ID", works, f"{path} has it", bad, f"as root: chmod u+s {path}", state)


def _user_namespaces() -> Check:
    command, is_allowed = ["unshare", "-U", "-r", "-m", "true"], False
    user = {} if os.geteuid() else {"user": NOBODY, "group": NOBODY, "extra_groups": list[int]()}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, cwd="/", **user)  # type: ignore[call-overload]
        is_allowed = not done.returncode
    if is_allowed:
        return Check("user namespaces", OK, "users may create them: their mounts have a private tmpfs")
    mending = [do for path, value, do in USER_NAMESPACES if read(path).strip() == value]
    why = " (AppArmor restricts them, the default of Ubuntu 24.04)" if read(APPARMOR).strip() == "1" else ""
    return Check(
        "user namespaces", WARNING,
        f"users may not create them{why}: their pages lie in a directory in memory, where size= does not limit .shmem",
        f"as root: {'; '.join(mending)}" if mending else "if this is a container: permit unshare(2), or mount as root",
    )  # fmt: skip


def _allow_other() -> Check:
    allowed = re.search(r"^\s*user_allow_other\b", read("/etc/fuse.conf"), re.MULTILINE)
    return either(
        "allow_other", allowed, "users may give it (user_allow_other in /etc/fuse.conf)",
        "users cannot let others into their mounts",
        "if you want that, as root: echo user_allow_other >>/etc/fuse.conf", MISSING,
    )  # fmt: skip


def _locked_memory() -> Check | None:
    if not os.geteuid():
        return None  # a limit does not hold for root
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return either(
        "RLIMIT_MEMLOCK", soft == resource.RLIM_INFINITY, "the daemon can lock its memory",
        f"{size(soft)}: the daemon itself can be swapped out, and is slow then",
        "set memlock to unlimited in /etc/security/limits.conf, or LimitMEMLOCK= in the unit",
    )  # fmt: skip


# --- writeback ---


def _swap() -> Check:
    total, free = swap_space()
    found = f"{size(free)} of {size(total)} is free" if total else "there is none, so pages cannot leave memory"
    if total and read("/proc/sys/vm/swappiness").strip() == "0":
        bad = "vm.swappiness is 0: the kernel swaps pages out only as a last resort"
        return Check("swap", WARNING, bad, "sysctl vm.swappiness=60")
    return either("swap", total and free >= total // 10, found, found, "add a device, a file or zram: see swapon(8)")


def _swap_of_group() -> Check | None:
    for group in memory.control_groups():
        limit = memory.read_number(group / "memory.swap.max")
        if limit == 0:
            return Check(
                "swap of the group", WARNING, f"{quoted(group)} may not use swap (memory.swap.max is 0)",
                "for mounts made from here: set MemorySwapMax= of its unit, or mount from elsewhere",
            )  # fmt: skip
    return Check("swap of the group", OK, "its control group may use swap")


# --- a service ---


def _systemd() -> Check:
    return either(
        "systemd", os.path.isdir("/run/systemd/system"), "runs", "does not run",
        "use fstab or ttmfs mount instead; in a container, see docs/containers.md", MISSING,
    )  # fmt: skip


def _unit() -> Check:
    kind = "user" if os.geteuid() else "system"
    at = [path for above in UNITS if os.path.exists(path := f"{above}/systemd/{kind}/ttmfs@.service")]
    bad = f"there is no ttmfs@.service for {'users' if os.geteuid() else 'the machine'}"
    return either(
        "unit",
        at,
        at[0] if at else "",
        bad,
        "install a package of ttmfs; or, in its source tree: sudo make install",
        MISSING,
    )


def _mount_helper() -> Check:
    at = [path for above in ("/sbin", "/usr/sbin") if os.access(path := f"{above}/mount.ttmfs", os.X_OK)]
    bad = "there is no /sbin/mount.ttmfs: mount -t ttmfs and fstab do not work"
    do = "sudo make install, in the source tree; after pip install: sudo ln -s $(command -v mount.ttmfs) /sbin"
    return either("mount -t ttmfs", at, at[0] if at else "", bad, do, MISSING)


def _users_manager() -> Check | None:
    if not os.geteuid():
        return None
    directory = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    return either(
        "systemd --user", os.path.exists(f"{directory}/systemd/private"), "runs",
        "does not run for you, so systemctl --user does not work", "as root: loginctl enable-linger USER", MISSING,
    )  # fmt: skip


# --- containers ---


def _may_mount() -> Check:
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", read("/proc/self/status"), re.MULTILINE)
    may = bool(effective and int(effective[1], 16) >> CAP_SYS_ADMIN & 1)
    where = "this container" if _container() else "a container started from here"
    if not os.geteuid():
        return either(
            "CAP_SYS_ADMIN", may, "root has it here, and may mount",
            f"root lacks it: {where} cannot mount",
            "start it with --device /dev/fuse --cap-add SYS_ADMIN, or mount on the host with rshared", MISSING,
        )  # fmt: skip
    return Check("CAP_SYS_ADMIN", OK, "not looked for: users mount by fusermount3; run it as root in the container")


def _container() -> str:
    """Which kind of container this is; "" if it seems to be none."""
    if kind := read("/run/systemd/container").strip() or os.environ.get("container", ""):  # noqa: SIM112 - its name
        return kind
    return next((name for file, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman"))
                 if os.path.exists(file)), "")  # fmt: skip


def _propagation() -> Check:
    rows = read("/proc/self/mountinfo").split("\n")[:-1]
    root = next((row for row in rows if row.split(" ")[4] == "/"), "")
    kind = f"; this is a container ({quoted(_container())})" if _container() else ""
    return either(
        "mount propagation", " shared:" in root.partition(" - ")[0],
        f"/ is shared: containers with rshared or rslave see mounts made here{kind}",
        f"/ is not shared: running containers do not see mounts made here later{kind}",
        "as root: mount --make-rshared /; or mount before the container starts", MISSING,
    )  # fmt: skip


# --- scale-out ---


def _distributed() -> Check:
    found = [mount for mount in mounts() if mount.type in CEPH or (mount.type in NFS and "vers=4.2" in mount.options)]
    shown = ", ".join(f"{quoted(mount.path)} ({mount.type})" for mount in found[:5])
    return either(
        "a filesystem for it", found, f"a store can lie on {shown}",
        "neither CephFS nor NFS 4.2 is mounted here", "mount CephFS: docs/scale-out.md", MISSING,
    )  # fmt: skip


def _client() -> Check:
    known = re.search(r"\tceph$", read("/proc/filesystems"), re.MULTILINE)
    program = shutil.which("ceph-fuse") or shutil.which("mount.ceph")
    return either(
        "a client of CephFS", known or program, program or "the kernel has one", "there is none",
        "apt install ceph-fuse, or ceph-common for the kernel's", MISSING,
    )  # fmt: skip


# --- .shmem, rescue, metrics ---


def _passthrough() -> Check:
    what, slower = "passthrough", "use .image, or the client, which gets the file by itself"
    if _kernel_version() < (6, 9):
        return Check(
            what, MISSING, f"{os.uname().release} has none: .shmem is a link that only root can follow", slower
        )
    if "CONFIG_FUSE_PASSTHROUGH=y" not in (config := _kernel_config()) and config:
        return Check(what, MISSING, "the kernel was built without CONFIG_FUSE_PASSTHROUGH", slower)
    if os.geteuid():
        return Check(
            what, MISSING, "only in mounts that root makes: in yours, .shmem is a link that you can follow", slower
        )
    return Check(what, OK, "the kernel has it, and root's mounts use it")


def _kernel_config() -> str:
    with contextlib.suppress(OSError):
        return gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    return read(f"/boot/config-{os.uname().release}")


def _rescue() -> Check:
    proc = mounted_at("/proc")
    hides = proc and any(
        option.startswith("hidepid=") and not option.endswith(("=0", "=off")) for option in proc.options
    )
    whose = "root's keepers" if not os.geteuid() else "your keepers; root's only as root"
    if hides and os.geteuid():
        return Check("keepers", WARNING, "/proc is mounted with hidepid=", "run ttmfs rescue as root")
    return Check("keepers", OK, f"{len(keepers())} found: ttmfs rescue can read what they hold ({whose})")


def _exporter() -> Check:
    found = importlib.util.find_spec("prometheus_client")
    return either(
        "prometheus_client", found, "is installed: ttmfs export works", "is not installed: ttmfs export does not work",
        f"{quoted(sys.executable)} -m pip install 'prometheus_client>=0.20,<1'", MISSING,
    )  # fmt: skip


USES: tuple[tuple[str, tuple[Callable[[], Check | None], ...]], ...] = (
    ("every mount",
     (_version, _kernel, _fuse_device, _fusermount, _pyfuse3, _compiled, _private_tmpfs, _control_group, _syslog)),
    ("mounts of users", (_device_for_users, _set_uid, _user_namespaces, _allow_other, _locked_memory)),
    ("writeback to swap", (_swap, _swap_of_group)),
    ("a service", (_systemd, _unit, _mount_helper, _users_manager)),
    ("containers", (_may_mount, _propagation)),
    ("scale-out", (_client, _distributed)),
    ("fast .shmem", (_passthrough,)),
    ("rescue", (_rescue,)),
    ("metrics", (_exporter,)),
)  # fmt: skip
"""The checks of each use. A check that does not apply here gives None."""
