"""A malicious user against the daemon and other users of the mount: real attacks by users without privilege.

While Alice attacks, Bob writes a page and reads it back, and says how long that took. He does the same on another
mount, so that a delay by the load of the machine does not count. Where a single request is the attack, the best of
several rounds counts.
"""

import contextlib
import errno
import json
import os
import select
import shlex
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from kept import store_of

from harness import MOUNT_PY, REPOSITORY, Mount, children, daemons, descriptors, mounts, opened, run, wait_until
from stores import ALICE, BOB, CAROL, UNSHARE, WITHOUT_USER_NAMESPACES, Place, UsersMount, acting_as, as_user, slow_swap

pytestmark = pytest.mark.serial

PAGE = 4096
LONGEST = 0.5
"""Seconds that one operation of Bob's may take during an attack; without one it is some milliseconds."""

LONGEST_REQUEST = 0.1
"""Seconds for which a single request may keep everyone else waiting."""

GROWTH = 8 << 20
"""Bytes by which the daemon may grow in an attack."""

ATTACK = """
import ctypes, errno, os, random, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.lseek.restype = ctypes.c_long
GETDENTS = {"x86_64": 217}.get(os.uname().machine, 61)
room = ctypes.create_string_buffer(65536)

def listed(fd, size=65536):
    got = libc.syscall(GETDENTS, fd, room, size)
    if got < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    return got

def refused(what, *arguments):
    try:
        what(*arguments)
    except OSError as error:
        return error.errno
    raise AssertionError(f"{what}{arguments} was carried out")

path = sys.argv[1]
"""

VICTIM = """
import os, select, sys, time
os.mkdir(sys.argv[1], 0o700)
fd = os.open(sys.argv[1] + "/1", os.O_RDWR | os.O_CREAT)
pages, worst, count, clock = [os.urandom(4096) for _ in range(8)], 0.0, 0, time.perf_counter
print("ready", flush=True)
while True:
    page = pages[count % 8]
    times = [clock()]
    os.pwrite(fd, page, 0)
    times.append(clock())
    assert os.pread(fd, 4096, 0) == page
    times.append(clock())
    worst, count = max(worst, times[1] - times[0], times[2] - times[1]), count + 1
    if select.select([0], [], [], 0.001)[0]:
        if not os.read(0, 1):
            break
        print(worst, count, flush=True)
        worst = 0.0
"""


class Victim:
    """Bob, who writes and reads one page again and again."""

    def __init__(self, place: Place, mount: Path) -> None:
        self._command = [*_as(BOB), place.python, "-I", "-c", VICTIM, str(mount / "bob")]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._line() == b"ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0, "a page of Bob's was not as he had written it"

    def worst(self, patience: float = 30.0) -> float:
        """The longest operation since the last call, in seconds."""
        assert self._process.stdin
        self._process.stdin.write(b"?")
        return float(self._line(patience).split()[0])

    def _line(self, patience: float = 30.0) -> bytes:
        assert self._process.stdout
        assert select.select([self._process.stdout], [], [], patience)[0], f"Bob has waited for {patience} s"
        return self._process.stdout.readline()


def _as(uid: int) -> list[str]:
    """The words that run a command as a user who can have many files open."""
    return ["prlimit", "--nofile=12000:12000", *shlex.split(f"setpriv --reuid {uid} --regid {uid} --clear-groups --")]


def resident(pid: int) -> int:
    """A process' memory in bytes."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024


@dataclass
class Arena:
    """A mount of root that is open to all, and Bob on it."""

    place: Place
    mount: Mount
    victim: Victim
    calm: Victim | None = None
    """Bob on another mount, which nobody attacks. What delays him there is the machine's load."""

    @property
    def path(self) -> Path:
        return self.mount.path

    def start(self, script: str, *arguments: object, uid: int = ALICE) -> "subprocess.Popen[str]":
        """Start an attack by a user."""
        command = [*_as(uid), self.place.python, "-I", "-c", ATTACK + script, str(self.path), *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", start_new_session=True
        )

    def attack(self, script: str, *arguments: object, uid: int = ALICE) -> str:
        """Run an attack by a user. Returns what it printed."""
        with self.start(script, *arguments, uid=uid) as process:
            try:
                said, _ = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 0, said
        return said

    @contextlib.contextmanager
    def unharmed(self, longest: float = LONGEST, growth: int = GROWTH, files: int = 0) -> Iterator[None]:
        """Check that Bob is served, and that the daemon needs no more memory, descriptors or log lines."""
        pid = self.mount.pid
        before = resident(pid), len(descriptors(pid)), len(self.mount.log)
        self.delay()
        yield
        worst = self.delay()
        after = resident(pid), len(descriptors(pid)), len(self.mount.log)
        assert worst < longest, f"Bob waited {worst:.3f} s for a page"
        assert after[0] - before[0] < growth, f"the daemon grew from {before[0]} to {after[0]} bytes"
        assert after[1] - before[1] <= 2 + files, f"it holds {after[1]} descriptors, before {before[1]}"
        said = [line for line in self.mount.log[before[2] :] if "refused: " not in line]
        assert not said, said

    def stall(self, attack: Callable[[], object], rounds: int = 3) -> float:
        """How long an attack delays Bob, without the machine's own delays."""
        found = []
        with self.unharmed(longest=30.0):
            for _ in range(rounds):
                self.delay()
                attack()
                found.append(self.delay())
        return min(found)

    def delay(self) -> float:
        """How much longer Bob's longest operation took than on the calm mount since the last call, in seconds."""
        worst, calm = self.victim.worst(), self.calm.worst() if self.calm else 0.0
        return max(0.0, worst - 2 * calm)

    def store(self, name: str, pages: int, *, step: int = 1) -> Path:
        """A backup of Alice with a number of pages, at every `step`-th index."""
        path = self.path / name
        self.attack("os.mkdir(f'{path}/{sys.argv[2]}', 0o755)", name)
        with opened(path / ".shmem") as fd:
            chunk = bytes(PAGE if step > 1 else 256 * PAGE)
            for idx in range(0, pages * step, step * len(chunk) // PAGE):
                os.pwrite(fd, chunk[: (pages * step - idx) * PAGE], idx * PAGE)
        return path


@pytest.fixture(scope="module")
def arena(place: Place) -> Iterator[Arena]:
    options = "size=800m,backup_size=4g,mode=1777,allow_other"
    with (
        place.directory("arena") as path,
        place.directory("calm") as calm_path,
        Mount(path, options, cwd=place.path) as mount,
        Mount(calm_path, options, cwd=place.path),
        Victim(place, path) as victim,
        Victim(place, calm_path) as calm,
    ):
        yield Arena(place, mount, victim, calm)


@pytest.fixture
def alices(arena: Arena) -> Iterator[Path]:
    """A backup of Alice's with 2,000 pages."""
    yield arena.store("alice", 2000)
    gone(arena.path / "alice")


def gone(backup: Path) -> None:
    os.truncate(backup / ".image", 0)
    backup.rmdir()


# --- more of everything ---


def test_ten_thousand_open_files_take_no_memory_of_the_daemon(arena: Arena, alices: Path) -> None:
    script = """
for n in range(5000):
    os.open(f"{path}/alice/{n % 2000 + 1}", os.O_RDWR)
    os.open(f"{path}/alice/.image", os.O_RDONLY)
for n in range(1000):
    os.open(f"{path}/.stats", os.O_RDONLY)
os.kill(os.getpid(), signal.SIGKILL) if len(sys.argv) > 2 else None
"""
    with arena.unharmed():
        arena.attack(script)
        with arena.start(script, "killed") as process:
            process.wait(30)
    assert alices.exists()


def test_half_read_directories_take_little_memory_of_the_daemon(arena: Arena, alices: Path) -> None:
    """There are far more than the daemon keeps listings for. Each listing continues correctly all the same."""
    with arena.unharmed():
        arena.attack("for _ in range(15_000): os.close(os.open(path + '/alice', os.O_DIRECTORY))")
        said = arena.attack("""
files = [os.open(path + "/alice", os.O_RDONLY) for _ in range(500)]
for fd in files:
    assert listed(fd, 1024)
started = files[::25]
position = os.lseek(started[0], 0, os.SEEK_CUR)
for fd in started:
    assert os.lseek(fd, 0, os.SEEK_CUR) == position
    count = 0
    while got := listed(fd):
        at = 0
        while at < got:
            at, count = at + struct.unpack_from("H", room, at + 16)[0], count + 1
    print(count)
files += [os.open(path, os.O_RDONLY) for _ in range(10_000)]
""")
    entries = {int(line) for line in said.split()}
    assert len(entries) == 1, "all have as much left"
    assert 1900 < entries.pop() < 2002
    assert alices.exists()


@pytest.mark.usefixtures("alices")
def test_a_listing_can_continue_from_any_offset(arena: Arena) -> None:
    """Offsets of up to 64 random bits give existing entries in order, nothing, or EINVAL."""
    with arena.unharmed():
        arena.attack("""
random.seed(int(sys.argv[2]))
for where in path, path + "/alice":
    fd = os.open(where, os.O_RDONLY)
    for _ in range(1500):
        offset = random.getrandbits(random.randrange(1, 65))
        at = libc.lseek(fd, ctypes.c_long(offset if offset < 2**63 else offset - 2**64), 0)
        assert at in (offset, -1)
        if at < 0:
            assert ctypes.get_errno() == errno.EINVAL
            continue
        got, place, before = listed(fd), 0, offset
        while place < got:
            _, following, length = struct.unpack_from("QqH", room, place)
            assert following > before, (offset, before, following)
            before, place = following, place + length
""", time.monotonic_ns())  # fmt: skip


@pytest.mark.usefixtures("alices")
def test_ten_thousand_errors_leave_few_log_lines_and_no_memory(arena: Arena) -> None:
    """The names differ, have 255 bytes, and contain line ends and escape sequences."""
    began, before = time.monotonic(), len(arena.mount.log)
    with arena.unharmed():
        arena.attack("""
for n in range(2000):
    name = f"{n}\\n\\x1b[31m<0>mount.py: SIGTERM: unmounting\\r\\x00"[:-1].ljust(255, "x")
    entry, named = f"{path}/alice/{name}", "user." + name[5:]
    found = [
        refused(os.stat, entry), refused(os.open, entry, os.O_RDWR | os.O_CREAT), refused(os.mkdir, entry),
        refused(os.open, f"{path}/{name}", os.O_RDWR | os.O_CREAT), refused(os.link, f"{path}/alice/1", entry),
        refused(os.rename, f"{path}/alice/1", entry), refused(os.getxattr, path + "/alice", named),
        refused(os.removexattr, path + "/alice", named),
    ]
    assert errno.EIO not in found, found
    if n % 20 == 0:
        assert refused(os.setxattr, path + "/alice", named, b"x" * 65536) == errno.EOPNOTSUPP
        os.mkdir(f"{path}/{name}")
        assert name in os.listdir(path)
        os.rename(f"{path}/{name}", f"{path}/{name[:-1]}")
        os.rmdir(f"{path}/{name[:-1]}")
""")
    lines = arena.mount.log[before:]
    assert 1 <= len(lines) <= 2 + time.monotonic() - began, "one a second at most"
    assert all(line.isprintable() and len(line) < 400 for line in lines), lines


def test_reads_and_writes_far_past_every_end_are_answered(arena: Arena, alices: Path) -> None:
    with arena.unharmed():
        arena.attack("""
page, image = (os.open(f"{path}/alice/{name}", os.O_RDWR) for name in ("1", ".image"))
for fd in page, image:
    for bits in range(33, 64):
        for offset in 2**bits - 1, 2**bits - 4096:
            got = os.pread(fd, 1 << 20, offset) if offset < 2**63 - (1 << 20) else b""
            assert not got, (bits, len(got))
            assert refused(os.pwrite, fd, b"x", offset - 1) == errno.EFBIG
            assert refused(os.ftruncate, fd, offset) in (errno.EFBIG, errno.EINVAL)
for value in b"9" * 65536, b"9" * 4300 + b"g", b"-1", b"0", b"\\xff" * 65536, b"4t", b" " * 65536, b"1e9", b"":
    assert refused(os.setxattr, path + "/alice", "user.ttmfs.size", value) == errno.EINVAL, value[:9]
""")
    assert os.getxattr(alices, "user.ttmfs.pages") == b"2000"


def test_many_backups_of_one_user_delay_no_other_user(arena: Arena) -> None:
    """Each takes a descriptor of the daemon, while it has any, and some hundred bytes."""
    arena.attack("os.listdir(path)")
    try:
        with arena.unharmed(files=4000, growth=4 << 20):
            arena.attack("for n in range(4000): os.mkdir(f'{path}/many {n}')")
            for _ in range(3):
                assert len(arena.attack("print(*os.listdir(path), sep='\\n')", uid=BOB).splitlines()) > 4000
        assert arena.stall(lambda: arena.attack("os.listdir(path)")) < LONGEST_REQUEST
    finally:
        arena.attack("for n in range(4000): os.rmdir(f'{path}/many {n}')")


# --- single requests that take long ---


@pytest.mark.parametrize("name", ["map", "pages", "resident", "swapped", "size"])
def test_attributes_of_a_fragmented_backup_delay_no_other_user(arena: Arena, name: str) -> None:
    path = arena.store("runs", 60_000, step=2)
    try:
        script = "os.getxattr(path + '/runs', 'user.ttmfs.' + sys.argv[2])"
        if name == "map":  # 60,000 ranges are more than an attribute holds
            script = f"assert refused({script[: script.index('(')]}, path + '/runs', 'user.ttmfs.map') == errno.E2BIG"
        assert arena.stall(lambda: arena.attack(script, name)) < LONGEST_REQUEST
    finally:
        gone(path)


@pytest.mark.parametrize("name", ["map", "resident", "swapped"])
def test_long_requests_delay_others_no_more_than_short_ones(arena: Arena, name: str) -> None:
    """Four processes ask; the median time of a page is compared on one machine, since machines differ."""
    path = arena.store("runs", 20_000, step=2)
    script = """
while True:
    try:
        os.getxattr(path + '/runs', 'user.ttmfs.' + sys.argv[2])
    except OSError as error:
        assert error.errno == errno.E2BIG
"""

    def median(name: str) -> float:
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                attacker = stack.enter_context(arena.start(script, name))
                stack.callback(attacker.kill)
            page, times = stack.enter_context(opened(arena.path / "bob/1")), []
            time.sleep(0.5)
            for _ in range(60):
                start = time.perf_counter()
                os.pread(page, PAGE, 0)
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    try:
        short = min(median("size") for _ in range(2))
        long = min(median(name) for _ in range(2))
        assert long < 30 * max(short, 0.0001), f"{long} s beside {short} s"
    finally:
        gone(path)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("b'1,' * 32767 + b'1'", 0),
        ("b','.join(b'%d-1048576' % n for n in range(2001, 6300))", 0),
        ("b','.join(b'%d' % (3 * n) for n in range(1, 11000))", 0),
        ("b'1,' * 32766 + b'0'", 22),
        ("b'1,' * 32766 + b'9-1'", 22),
        ("b'1-9999999999999999999,' * 2970", 22),
        ("b'1-' + b'9' * 65000", 22),
        ("b',' * 65536", 22),
        ("b'\\n' * 65536", 22),
        ("b'\\0' * 65536", 22),
    ],
)
@pytest.mark.usefixtures("alices")
def test_a_long_list_of_handles_to_drop_delays_no_other_user(arena: Arena, value: str, number: int) -> None:
    script = f"""
try:
    os.setxattr(path + "/alice", "user.ttmfs.drop", {value})
    found = 0
except OSError as error:
    found = error.errno
assert found == {number}, found
"""
    assert arena.stall(lambda: arena.attack(script)) < LONGEST_REQUEST


def test_dropping_and_ending_a_large_backup_delay_no_other_user(arena: Arena) -> None:
    for drop in (
        "os.truncate(path + '/large/.image', 0)",
        "os.setxattr(path + '/large', 'user.ttmfs.drop', b'1-100000')",
    ):
        path = arena.store("large", 100_000)
        with arena.unharmed():
            arena.attack(f"assert refused(os.rmdir, path + '/large') == errno.ENOTEMPTY\n{drop}")
            assert os.listdir(path) == []
        path.rmdir()


def test_a_listing_during_a_drop_shows_existing_pages_and_ends(arena: Arena) -> None:
    path = arena.store("both", 30_000)
    lister = """
print("began", flush=True)
while True:
    names = [int(name) for name in os.listdir(path + "/both")]
    assert names == sorted(set(names)) and all(0 < name <= 30_000 for name in names)
    if not names:
        break
"""
    with arena.unharmed():
        processes = [arena.start(lister, uid=uid) for uid in (ALICE, BOB, CAROL)]
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "began\n"
        arena.attack("""
for first in range(1, 30_001, 1000):
    os.setxattr(path + "/both", "user.ttmfs.drop", b"%d-%d" % (first, first + 999))
""")
        for process in processes:
            assert process.communicate(timeout=30)[0] == ""
            assert process.returncode == 0
    path.rmdir()


# --- clients that do not take their answers ---


@pytest.mark.usefixtures("alices")
def test_killed_readers_leave_nothing_behind(arena: Arena) -> None:
    with arena.unharmed():
        arena.attack("""
image, into = os.open(path + "/alice/.image", os.O_RDWR), [bytearray(1 << 20)]
for n in range(400):
    if not (child := os.fork()):
        while True:
            for at in range(7):
                os.preadv(image, into, at << 20)
                os.pwrite(image, into[0], at << 20) if n % 4 == 0 else None
    time.sleep(0.004 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
""")


@pytest.mark.usefixtures("alices")
def test_stopped_clients_delay_no_other_user(arena: Arena) -> None:
    with arena.unharmed():
        arena.attack("""
pids = []
for _ in range(40):
    if not (child := os.fork()):
        image, into = os.open(path + "/alice/.image", os.O_RDWR), [bytearray(1 << 20)]
        while True:
            for at in range(7):
                os.preadv(image, into, at << 20)
                os.listdir(path + "/alice") if at == 3 else None
    pids.append(child)
for _ in range(5):
    time.sleep(0.1)
    for child in pids:
        os.kill(child, signal.SIGSTOP)
    time.sleep(0.1)
    for child in pids:
        os.kill(child, signal.SIGCONT)
for child in pids:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
""")


# --- what waits for a slow device ---


@contextlib.contextmanager
def waiting(place: Place, directory: Path, prepare: str, attack: str) -> Iterator[tuple[Arena, str]]:
    """A user whose attack waits for a swap device that reads four times a second, for pages stored before.

    Gives also what the attack printed first.
    """
    with (
        place.directory("slow") as path,
        Mount(path, "size=1g,backup_size=64g,mode=1777,allow_other", cwd=place.path) as mount,
    ):
        for words in r"reading device: Software caused connection abort", r"fuse_release\(\): fuse_reply_\* failed":
            mount.expect_log(words)  # libfuse's and pyfuse3's, if unmounted amid a request
        arena = Arena(place, mount, Victim(place, path))
        with (
            contextlib.ExitStack() as ended,  # when the device is fast again: before that nothing could be ended
            slow_swap(mount.pid, directory, reads_a_second=4, size=64 << 20) as swap,
        ):
            arena.attack(prepare)
            swap.push_out()
            ended.enter_context(arena.victim)
            attacker = ended.enter_context(arena.start(attack))
            try:
                assert attacker.stdout
                yield arena, attacker.stdout.readline().strip()
            finally:
                attacker.kill()


WAIT = """
threading.stack_size(65536)
for n in range(count):
    threading.Thread(target=wait, args=(n,), daemon=True).start()
say()
time.sleep(60)
"""


def least_delay(victim: Victim) -> float:
    """Bob's longest operation in seconds, in the best of three periods. The attack does not pause between them."""
    delays = []
    for _ in range(3):
        time.sleep(0.3)
        delays.append(victim.worst(patience=3.0))
    return min(delays)


def test_thousands_of_waits_for_a_slow_device_delay_no_other_user(place: Place, tmp_path: Path) -> None:
    """Bob's page is in memory. (At most ten thousand requests can wait: docs/security.md.)"""
    prepare = """
os.mkdir(path + "/alice")
for n in range(2500):
    with open(f"{path}/alice/{n * 512 + 1}", "wb") as page:
        page.write(bytes(range(256)))
"""
    attack = """
count = 2500
def wait(n):
    with open(f"{path}/alice/{n * 512 + 1}", "rb", buffering=0) as page:
        page.read(4096)
def say():
    print("all wait", flush=True)
"""
    with waiting(place, tmp_path, prepare, attack + WAIT) as (arena, said):
        assert said == "all wait"
        assert least_delay(arena.victim) < 2 * LONGEST
        assert len(descriptors(arena.mount.pid)) < 200, "a descriptor is taken when a thread is free"


def test_writes_that_wait_for_a_slow_device_take_little_memory(place: Place, tmp_path: Path) -> None:
    """At most 128 writes of 1 MiB wait. More are refused."""
    prepare = """
for n in range(400):
    os.mkdir(f"{path}/alice{n}")
    with open(f"{path}/alice{n}/1", "wb") as page:
        page.write(bytes(range(256)))
"""
    attack = """
import mmap
count, data, refused = 400, mmap.mmap(-1, 1 << 20), []
def wait(n):
    with open(f"{path}/alice{n}/.image", "r+b", buffering=0) as image:
        try:
            image.write(data)
        except OSError as error:
            refused.append(error.errno)
def say():
    end = time.monotonic() + 10
    while len(refused) < count - 140 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # in which more of them could be refused
    print(len(refused), *set(refused), flush=True)
"""
    with waiting(place, tmp_path, prepare, attack + WAIT) as (arena, said):
        count, *numbers = said.split()
        assert 260 <= int(count) <= 272, "a few may be done with waiting"
        assert numbers == [str(errno.ENOMEM)]
        held = resident(arena.mount.pid)
        assert held < 400 << 20, f"128 MiB take {held} bytes"
        assert arena.victim.worst(patience=3.0) < 2 * LONGEST


# --- the keeper ---


def channel_of(pid: int) -> str:
    """The abstract name that a process' datagram socket is bound to; empty if there is none."""
    held = {name for name in descriptors(pid) if name.startswith("socket:")}
    for row in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = row.split()
        if len(fields) == 8 and f"socket:[{fields[6]}]" in held:
            return fields[7]
    return ""


FLOOD = """
try:
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(8)]
    null, end = os.open("/dev/null", os.O_RDONLY), time.monotonic() + float(sys.argv[3])
    words = [b"FDSTOREREMOVE=1\\nFDNAME=fuse", b"STOPPING=1", b"READY=1", b"BARRIER=1", b"x" * 4096]
    nulls = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("8i", *[null] * 8))]
    for each in sockets:
        each.setblocking(False)
        each.connect("\\0" + sys.argv[2][1:])
except OSError:
    print("refused", flush=True)
    sys.exit()
print("began", flush=True)
while time.monotonic() < end:
    for each in sockets:
        try:
            for word in words:
                each.sendmsg([word], nulls if word[:1] == b"B" else [])
        except OSError:
            pass
"""

LINGER = """
listener = socket.create_server(("127.0.0.1", 0))
ours = socket.socket()
ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
ours.connect(listener.getsockname())
theirs, _ = listener.accept()
theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 8))
ours.setblocking(False)
for _ in range(20):
    try:
        while True:
            ours.send(b"x" * 65536)
    except BlockingIOError:
        time.sleep(0.05)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", ours.fileno()))]
try:
    keeper = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(8)]
    for each in keeper:
        each.setblocking(False)
        each.connect("\\0" + sys.argv[2][1:])
        try:
            while True:
                each.send(b"x")
        except BlockingIOError:
            pass
    keeper[0].setblocking(True)
    keeper[0].sendmsg([b"x"], rights)
except OSError:
    print("refused", flush=True)
    sys.exit()
ours.close()
print("sent", flush=True)
time.sleep(10)
"""


def answered_in(mount: Mount, page: Path) -> float:
    """Kill the daemon. Returns the seconds until the next one answers."""
    restarts, start = mount.restarts(), time.monotonic()
    mount.kill()
    client = subprocess.Popen(["head", "-c", "3", page], stdout=subprocess.PIPE)
    try:
        said, _ = client.communicate(timeout=30)
    finally:
        client.kill()
    assert said == b"all"
    taken = time.monotonic() - start
    assert mount.restarts() == restarts + 1
    return taken


@pytest.mark.parametrize(("script", "attackers"), [(FLOOD, 2), (LINGER, 1)], ids=["flooded", "lingering"])
def test_a_stranger_cannot_block_the_keeper(place: Place, script: str, attackers: int) -> None:
    """The stranger sends endless messages to its socket, and descriptors that take long to close."""
    with place.directory("kept") as path, Mount(path, "size=1m,mode=1777,allow_other", cwd=place.path) as mount:
        arena = Arena(place, mount, Victim(place, path))
        mount.expect_restarts()
        (path / "a").mkdir()
        (path / "a/1").write_bytes(b"all is well")
        processes = [arena.start(script, channel_of(mount.process.pid) or "@none", 5) for _ in range(attackers)]
        try:
            for process in processes:
                assert process.stdout
                assert process.stdout.readline() in ("began\n", "sent\n", "refused\n")
            assert answered_in(mount, path / "a/1") < 5
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def test_a_stranger_cannot_make_a_keeper_that_gave_up_release_pages(tmp_path: Path) -> None:
    """Processes of a container, outside of the keeper's process namespace, have pid 0 there. No daemon has pid 0."""
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    program = tmp_path / "mount.py"
    mountpoint.mkdir()
    program.symlink_to(MOUNT_PY)
    options = "size=1m,mode=1777,allow_other"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", sys.executable, str(program), str(mountpoint), "-f", "-o", options],
            stderr=file,
        )
    keeper = 0
    try:
        wait_until(lambda: "serving" in log.read_text(), "the mount")
        (keeper,) = children(process.pid)
        (daemon,) = daemons(keeper)
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"kept")
        program.unlink()
        os.kill(daemon, 9)
        wait_until(lambda: "gave up" in log.read_text(), "the keeper to give up")
        address = channel_of(keeper) or "@none"
        script = """
channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for name in "fuse", "store", "state", "ledger":
    try:
        channel.sendto(f"FDSTOREREMOVE=1\\nFDNAME={name}".encode(), "\\0" + sys.argv[2][1:])
        channel.sendto(b"STOPPING=1", "\\0" + sys.argv[2][1:])
    except OSError:
        pass
"""
        run(
            shlex.join(["/usr/bin/env", "python3", "-I", "-c", ATTACK + script, "/", address]),
            **as_user(ALICE, cwd=Path("/")),
        )
        run(f"{sys.executable} {REPOSITORY}/ttmfs/cli/rescue.py {keeper} {tmp_path}/out")
        assert (tmp_path / "out/a").read_bytes()[:4] == b"kept"
    finally:
        if str(mountpoint) in mounts():
            run(f"umount -l {mountpoint}")
        if keeper:
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, 9)
        process.wait(10)


# --- what is another's ---

LOOK = """
import resource
pid = int(sys.argv[2])
numbers = {"x86_64": (101, 310, 438)}.get(os.uname().machine, (117, 270, 438))
PTRACE, VM_READ, GETFD = numbers
SEIZE = 0x4206
allowed = []
def tried(what, call, *arguments):
    try:
        result = call(*arguments)
    except OSError as error:
        absent = what[:3] == "fd/" and error.errno == errno.ENOENT  # their numbers are seen by the same user
        assert absent or error.errno in (errno.EPERM, errno.EACCES), (what, error)
    else:
        allowed.append(what)
def called(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments]) < 0:
        raise OSError(ctypes.get_errno(), "")
for name in "mem", "maps", "environ", "auxv", "syscall", "stack", "io", "pagemap", "smaps":
    tried(name, lambda: open(f"/proc/{pid}/{name}", "rb").read(1))
for name in "fd", "fdinfo", "map_files", "root/", "cwd/", "ns":
    tried(name, lambda: [os.readlink(f"/proc/{pid}/{name}/{n}") for n in os.listdir(f"/proc/{pid}/{name}")] and 0)
for name in "root", "cwd", "exe":
    tried(name, os.readlink, f"/proc/{pid}/{name}")
for n in range(64):
    tried(f"fd/{n}", os.open, f"/proc/{pid}/fd/{n}", os.O_RDONLY)
tried("ptrace", called, PTRACE, SEIZE, pid, 0, 0)
local, remote = (ctypes.c_ulong * 2)(ctypes.addressof(room), 8), (ctypes.c_ulong * 2)(4096, 8)
tried("process_vm_readv", called, VM_READ, pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
handle = os.pidfd_open(pid)
for n in range(32):
    tried("pidfd_getfd", called, GETFD, handle, n, 0)
for number in (0, *map(signal.Signals, (1, 2, 9, 10, 12, 14, 15, 18, 19))):
    tried(f"signal {number}", os.kill, pid, number)
    tried(f"signal {number} by pidfd", signal.pidfd_send_signal, handle, number)
tried("nice", os.setpriority, os.PRIO_PROCESS, pid, 19)
tried("affinity", os.sched_setaffinity, pid, {0})
tried("idle", os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))
tried("limits", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (16, 16)))
tried("oom", lambda: open(f"/proc/{pid}/oom_score_adj", "w").write("1000"))
print(allowed)
"""


def test_a_stranger_cannot_reach_processes_of_a_mount_of_root(arena: Arena, alices: Path) -> None:
    """The stranger cannot look into them, send them signals, or follow their links in /proc."""
    daemon, keeper = arena.mount.pid, arena.mount.process.pid
    assert daemon != keeper
    for pid in daemon, keeper:
        for uid in ALICE, BOB:
            assert arena.attack(LOOK, pid, uid=uid) == "[]\n"
    os.chmod(alices, 0o777)
    store = store_of(daemon)
    for uid in ALICE, BOB:
        assert arena.attack(f"print(refused(open, '{store}/alice', 'r+'))", uid=uid) == "13\n"


@pytest.mark.parametrize(("uid", "gid"), [(BOB, BOB), (BOB, ALICE), (ALICE, BOB)])
def test_a_stranger_cannot_reach_processes_of_a_mount_of_a_user(place: Place, uid: int, gid: int) -> None:
    """The user's own processes in another group cannot either, as with any process."""
    with place.directory("home", ALICE) as home, UsersMount(place, home, "size=1m") as mount:
        for pid in mount.pid, mount.process.pid:
            command = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]
            script = LOOK
            if uid == ALICE:  # signals, priority and the like go by the user alone
                script = LOOK[: LOOK.index("for number in")] + "print(allowed)\n"
            said = run(
                shlex.join([*command, place.python, "-I", "-c", ATTACK + script, str(home), str(pid)]),
                cwd=Path("/"),
                start_new_session=True,  # within one SIGCONT may be sent to anyone
            )
            assert said == "[]\n"


def test_the_fallback_directory_is_private_to_its_user(place: Place) -> None:
    """Others may see its name. A decoy there does not make the next mount remove anything."""
    shm = Path("/dev/shm")
    become = (place.python, "-I", "-c", WITHOUT_USER_NAMESPACES, UNSHARE, ALICE, place.path)
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    before = set(shm.glob("ttmfs-*"))
    with place.directory("home", ALICE) as home, tempfile.TemporaryDirectory(dir=place.path) as kept:
        decoy = shm / f"ttmfs-decoy-{os.getpid()}"
        run(f"""
chown {ALICE} {kept}
setpriv --reuid {ALICE} --regid {ALICE} --clear-groups sh -c '
    mkdir {kept}/store; touch {kept}/removed-by-the-next-mount {kept}/store/.ttmfs {kept}/store/precious'
setpriv --reuid {BOB} --regid {BOB} --clear-groups ln -s {kept} {decoy}""")  # fmt: skip
        try:
            command = (*map(str, become), *place.mount_command)
            with Mount(home, "size=1m", command=command, env=environment) as mount:
                (mine,) = set(shm.glob("ttmfs-*")) - before - {decoy}
                found = mine.stat()
                assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (ALICE, 0o700)
                with acting_as(ALICE):
                    (home / "a").mkdir(0o777)
                    (home / "a").chmod(0o777)
                    (home / "a/1").write_bytes(b"secret")
                    target = os.readlink(home / "a/.shmem")
                    assert json.loads((home / ".config").read_text())["store"] == str(mine / "store")
                    assert Path(target).read_bytes()[:6] == b"secret"
                assert (mine / "store/a").read_bytes()[:6] == b"secret"
                for path in mine, mine / "store", mine / "store/a", mine / "store/.ttmfs", Path(target):
                    for uid in BOB, CAROL:
                        with acting_as(uid), pytest.raises(PermissionError):
                            os.open(path, os.O_RDONLY)
                for call in (lambda: mine.rename(shm / "other"), mine.rmdir, lambda: mine.chmod(0o777), decoy.rmdir):
                    with acting_as(BOB), pytest.raises((PermissionError, NotADirectoryError)):
                        call()
                assert mount.pid
            assert not mine.exists()
            assert Path(kept, "store/precious").exists()
        finally:
            decoy.unlink()
            shutil.rmtree(Path(kept, "store"))


SECRET = b"SECRET.." * 512


@pytest.mark.parametrize("page_size", [PAGE, 65536])
def test_no_byte_of_a_dropped_page_can_be_read(place: Place, page_size: int) -> None:
    """The page is dropped in every way, and anyone creates it again. What was not written since reads as zeros."""
    drops = [
        "for n in 1, 2, 3: os.unlink(f'{a}/{n}')",
        "os.truncate(a + '/.image', 0)",
        "os.setxattr(a, 'user.ttmfs.drop', b'1-3')",
        "os.unlink(a + '/1'); os.unlink(a + '/2'); os.unlink(a + '/3'); os.rmdir(a); os.mkdir(a); os.chmod(a, 0o777)",
    ]
    makes = [
        "os.close(os.open(a + '/1', os.O_CREAT | os.O_RDWR))", "os.mknod(a + '/1')",
        "os.pwrite(os.open(a + '/1', os.O_CREAT | os.O_RDWR), b'new', 100)",
        "os.pwrite(os.open(a + '/.image', os.O_RDWR), b'new', 100)",
        "os.pwrite(os.open(a + '/.image', os.O_RDWR), b'new', size - 1)", "os.truncate(os.open(a + '/1', 66), 7)",
    ]  # fmt: skip
    script = """
import mmap
a, size, drop, make = path + "/a", int(sys.argv[2]), sys.argv[3], sys.argv[4]
pages = [os.open(f"{a}/{n}", os.O_RDWR) for n in (1, 2, 3)]
image = os.open(a + "/.image", os.O_RDWR)
untouched = mmap.mmap(pages[0], size, mmap.MAP_PRIVATE, mmap.PROT_READ)
exec(drop)
if "rmdir" not in drop:
    assert not os.pread(image, 4 * size, 0).strip(b"\\0")
for fd in pages:
    assert refused(os.pread, fd, size, 0) == refused(os.pwrite, fd, b"x", 0) == errno.ESTALE
if not (child := os.fork()):  # a mapping that was not touched while the page was there
    seen = untouched[:]
    os._exit(b"SECRET" in seen)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status in (0, -signal.SIGBUS), status
exec(make)
for fd in os.open(a + "/1", os.O_RDONLY), os.open(a + "/.image", os.O_RDONLY):
    seen = os.pread(fd, 4 * size, 0)
    assert len(seen) == size or len(seen) == 4 * size
    assert not set(seen) - set(b"new\\0"), seen[:200]
    mapped = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ)
    assert mapped[:] == seen[:size]
    try:
        where = os.lseek(fd, 0, os.SEEK_DATA)
    except OSError:
        pass
"""
    with (
        place.directory("stale") as path,
        Mount(path, f"size=8m,backup_size={16 * page_size},page_size={page_size},mode=777,allow_other") as mount,
    ):
        arena = Arena(place, mount, Victim(place, path))
        a = path / "a"
        for number, drop in enumerate(drops):
            for make in makes[number % 2 :: 2]:
                arena.attack("os.mkdir(path + '/a'); os.chmod(path + '/a', 0o777)")
                for n in 1, 2, 3:
                    (a / str(n)).write_bytes((SECRET * (page_size // len(SECRET)))[:page_size])
                for uid in BOB, ALICE:
                    if uid == ALICE:
                        for n in 1, 2, 3:
                            (a / str(n)).write_bytes((SECRET * (page_size // len(SECRET)))[:page_size])
                    arena.attack(script, page_size, drop, make, uid=uid)
                gone(a)


def test_a_mapping_of_a_dropped_page_shows_its_bytes_to_no_other_user(arena: Arena, alices: Path) -> None:
    """Bob keeps his own mapping, whose page the kernel has cached."""
    os.chmod(alices, 0o777)
    (alices / "1").write_bytes(SECRET)
    bob = arena.start("""
import mmap
kept = mmap.mmap(os.open(path + "/alice/1", os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
assert kept[:6] == b"SECRET"
print("mapped", flush=True)
time.sleep(30)
""", uid=BOB)  # fmt: skip
    try:
        assert bob.stdout
        assert bob.stdout.readline() == "mapped\n"
        arena.attack("os.unlink(path + '/alice/1'); os.close(os.open(path + '/alice/1', os.O_CREAT | os.O_WRONLY))")
        arena.attack("""
import mmap
seen = mmap.mmap(os.open(path + "/alice/1", os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
assert seen[:] == bytes(4096)
""", uid=CAROL)  # fmt: skip
    finally:
        bob.kill()
        bob.communicate()
