"""Root's commands against traps: a mount that a stranger serves, and files, links and processes of a stranger.

Alice serves the mounts, and owns the files near them. Root runs `ttmfs` on all of them.
"""

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import REPOSITORY, Mount, children, opened, run, stopped
from stores import ALICE

PAGE = os.sysconf("SC_PAGE_SIZE")
TTMFS = [sys.executable, "-m", "ttmfs"]
SERVER = REPOSITORY / "tests/hostile_server.py"
HARM = "\x1b]0;owned\x07\u202egnp\u2066"
ENOUGH = 20.0
"""Seconds in which every command must have ended, on a busy machine too. It gives a mount 2."""


def ttmfs(*words: object, code: int | None, **more: Any) -> str:
    """Run a command. Returns both its streams. It ends in time, without a traceback and without control characters."""
    more = {"cwd": REPOSITORY, "stdin": subprocess.DEVNULL, **more}
    command = [*TTMFS, *map(str, words)]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, timeout=ENOUGH, check=False, env=environment, **more)
    text: str = (done.stdout + done.stderr).decode()
    assert "Traceback" not in text, text
    assert not set(HARM) & {char for char in text if not char.isprintable() and char != "\n"}, text
    assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{text}"
    return text


@contextlib.contextmanager
def served(directory: Path, **plan: Any) -> Iterator["subprocess.Popen[str]"]:
    """A mount that Alice serves."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, str(SERVER), str(directory), str(ALICE), json.dumps(plan)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert select.select([process.stdout], [], [], ENOUGH)[0]
        assert process.stdout.readline() == "serving\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=ENOUGH)
        run(f"umount -l {directory}")


GOOD = {"page_size": str(PAGE), "pages": "0", "resident": "0", "swapped": "0", "size": "1048576", "map": ""}


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file of root that nothing may change."""
    path = tmp_path / "precious"
    path.write_text("root's own")
    path.chmod(0o600)
    yield path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "root's own"


# --- paths that lead elsewhere the next time ---


@pytest.mark.parametrize("times", [1, 2])
def test_create_changes_the_mode_only_of_the_new_backup(tmp_path: Path, precious: Path, times: int) -> None:
    with served(tmp_path / "mnt", values=GOOD, turns={"a": [times, str(precious)]}):
        ttmfs("create", "-m", "0777", tmp_path / "mnt/a", code=None)


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_load_changes_the_mode_only_of_the_new_backup(tmp_path: Path, precious: Path, times: int) -> None:
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, 1 << 20)
    file.chmod(0o666)
    with served(tmp_path / "mnt", values=GOOD, turns={"a": [times, str(precious)]}):
        ttmfs("load", "--into", file, tmp_path / "mnt/a", code=None)
        ttmfs("load", "--continue", file, tmp_path / "mnt/a", code=None)


@pytest.mark.parametrize("times", [1, 2])
def test_rescue_changes_the_mode_only_of_files_that_it_opens(tmp_path: Path, precious: Path, times: int) -> None:
    """Rescue gives itself, for a moment, the right to read a file that it cannot read."""
    plan = {"names": {"a": "file:x", "b": "dir"}, "turns": {"a": [times, str(precious)]}, "refuses": ["open"]}
    with served(tmp_path / "mnt", **plan), opened(tmp_path / "mnt", os.O_RDONLY) as root:
        os.set_inheritable(root, True)
        ttmfs("rescue", f"/proc/self/fd/{root}", tmp_path / "copy", code=None, pass_fds=[root])


@pytest.mark.parametrize("command", ["fini", "writeback", "map", "save", "load", "fd"])
def test_commands_do_not_follow_a_link_to_a_backup(tmp_path: Path, mountpoint: Path, command: str) -> None:
    """A stranger can make a link to any backup. Like rm(1), the commands do not follow it."""
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    with Mount(mountpoint, "size=16m"):
        (mountpoint / "a").mkdir()
        (mountpoint / "a/1").write_bytes(b"kept")
        (tmp_path / "link").symlink_to(mountpoint / "a")
        for link in tmp_path / "link", f"{tmp_path}/link/":
            words: list[object] = [command, link]
            words += [tmp_path / "saved"] if command == "save" else ["true"] if command == "fd" else []
            if command == "load":
                words = ["load", "--into", tmp_path / "file", link]
            assert "link" in ttmfs(*words, code=2)
        assert (mountpoint / "a/1").read_bytes()[:4] == b"kept"
        assert not (tmp_path / "saved").exists()


# --- processes that are named like ours ---

PRETENDER = """
import ctypes, os, sys, time
how, device, store = sys.argv[1:4]
state = os.memfd_create("ttmfs-state")
os.write(state, ('{"format": 1, "device": "' + device + '"}').encode())
held = os.open(store, os.O_RDONLY)
if how == "set-user-id":
    os.setresuid(65534, 0, 0)
elif how != "root":
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
if how == "undumpable":
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
else:
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
ctypes.CDLL(None).prctl(15, b"ttmfs-keeper", 0, 0, 0)
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("how", ["alice", "undumpable", "set-user-id", "root"])
def test_a_process_that_imitates_a_keeper_is_not_listed(tmp_path: Path, mountpoint: Path, how: str) -> None:
    """It may look like root's, because it is not dumpable or set-user-ID. Only one that root started would be."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store/stolen").write_bytes(b"x" * PAGE)
    with Mount(mountpoint, "size=1m") as mount:
        mount.kill_both()
        command = [sys.executable, "-c", PRETENDER, how, device_of(mountpoint), f"{tmp_path}/store", str(mountpoint)]
        pretender = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert pretender.stdout
            assert pretender.stdout.readline() == "ready\n"
            if how == "root":  # the test itself would find one that is to be found
                assert re.search(rf"\b{pretender.pid}\b", ttmfs("doctor", mountpoint, code=1))
                return
            assert not re.search(rf"\b{pretender.pid}\b", ttmfs("doctor", mountpoint, code=1))
            said = ttmfs("rescue", mountpoint, tmp_path / "copy", code=2)
            assert "its keeper is gone" in said
            if how != "set-user-id":
                assert "another user's" in ttmfs("rescue", pretender.pid, tmp_path / "copy", code=2)
            assert not (tmp_path / "copy").exists()
        finally:
            pretender.kill()
            pretender.communicate(timeout=ENOUGH)


def device_of(mountpoint: Path) -> str:
    """The device number of a mount, without touching it."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line.split()[2] for line in lines if line.split()[4] == str(mountpoint))


# --- files that a stranger put there ---


def checksum(data: bytes) -> str:
    """The checksum of a file of one page, as ttmfs rescue computes it."""
    part = hashlib.sha256((0).to_bytes(8, "little") + data.ljust(4096, b"\0")).digest()
    return hashlib.sha256((0).to_bytes(8, "little") + part).hexdigest()


def test_checksum_files_of_a_stranger_lead_to_no_file_of_others(tmp_path: Path, precious: Path) -> None:
    """They cannot block a command either. The only failure is an error of one line."""
    copy = tmp_path / "copy"
    copy.mkdir()
    os.mkfifo(copy / "fifo")
    (copy / "zero").symlink_to("/dev/zero")
    (copy / "link").symlink_to(precious)
    sound = f"{checksum(precious.read_bytes())} 1 {precious.stat().st_size}"
    names: list[object] = [
        str(precious),
        "../precious",
        "../..",
        "..",
        ".",
        "",
        "fifo",
        "zero",
        "link",
        "a\0b",
        7,
        None,
    ]
    names += [["a"], {"a": 1}, "n" * 300, HARM, True, 1e999]
    lines = [f"{sound} {json.dumps(name)}" for name in names] + [sound, "", f"{sound} " + "[" * 3000, HARM]
    (copy / ".CHECKSUMS").write_text("\n".join(lines[:-1]) + "\n")
    text = ttmfs("rescue", "--check", copy, code=1)
    assert "OK" not in text
    assert f"0 of {len(lines) - 1} backups" in text
    for more in HARM, "x" * 100000:
        (copy / ".CHECKSUMS").write_text(more)
        assert "was not written by ttmfs rescue" in ttmfs("rescue", "--check", copy, code=2)
    for kind in "fifo", "zero":
        (copy / ".CHECKSUMS").unlink()
        (copy / kind).rename(copy / ".CHECKSUMS")
        assert ".CHECKSUMS: it is" in ttmfs("rescue", "--check", copy, code=2)


def test_checksum_files_of_a_stranger_in_a_shared_directory_are_ignored(tmp_path: Path, mountpoint: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "mine").write_bytes(b"x" * PAGE)
    (shared / ".CHECKSUMS").write_text(f'{checksum(b"y" * PAGE)} 1 {PAGE} "mine"\n')
    os.chown(shared / ".CHECKSUMS", ALICE, ALICE)
    assert "belongs neither to you nor to" in ttmfs("rescue", "--check", shared, code=2)
    with Mount(mountpoint, "size=16m"):
        assert "has no manifest" in ttmfs("load", shared / "mine", mountpoint / "a", code=0)
        assert (mountpoint / "a/1").read_bytes() == b"x" * PAGE
        for number, kind in enumerate(("fifo", "zero", "endless", "manifest")):
            for name in ".CHECKSUMS", "mine.ttmfs":
                with contextlib.suppress(FileNotFoundError):
                    (shared / name).unlink()
            place = shared / (".CHECKSUMS" if number % 2 else "mine.ttmfs")
            if kind == "fifo":
                os.mkfifo(place)
            elif kind == "zero":
                place.symlink_to("/dev/zero")
            else:
                place.touch()
                os.truncate(place, 1 << 42)
            ttmfs("load", shared / "mine", mountpoint / f"b{number}", code=None)


@pytest.mark.parametrize("name", [".CHECKSUMS", "file.ttmfs"])
@pytest.mark.parametrize("kind", ["fifo", "link", "long", "directory"])
def test_files_beside_a_file_to_load_cannot_block_the_load(
    tmp_path: Path, mountpoint: Path, name: str, kind: str
) -> None:
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    place = tmp_path / name
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to("/dev/zero")
    elif kind == "directory":
        place.mkdir()
    else:
        place.touch()
        os.truncate(place, 1 << 42)
    with Mount(mountpoint, "size=16m"):
        text = ttmfs("load", tmp_path / "file", mountpoint / "a", code=None)
        assert "has no manifest" in text or "damaged" in text
        text = ttmfs("load", "--check", tmp_path / "file", code=2)
        assert len(text.splitlines()) == 1
        text = ttmfs("save", "-f", mountpoint, tmp_path / "file", code=2)


# --- what a stranger's mount says ---


def test_doctor_reads_little_from_a_mount_of_a_stranger_and_prints_none_of_it(tmp_path: Path) -> None:
    for config in (
        f"endless:{HARM}", "fifo", "dir", "link:/dev/zero", "file:[1]", "file:" + "[" * 4000, "file:7",
        f'file:{{"keeper_pid": "{HARM} -1", "daemon_pid": -1, "store": 7, "descriptors": [1]}}',
        'file:{"keeper_pid": 1, "daemon_pid": 1}',
    ):  # fmt: skip
        names = {".config": config, ".stats": 'file:ttmfs_build_info{version="1\x1b[31m"} 1'}
        with served(tmp_path / "mnt", names=names, values=GOOD):
            text = ttmfs("doctor", tmp_path / "mnt", code=None, preexec_fn=limit_memory)
            assert "kill" not in text
            assert "owned" not in text
            found = [
                row for row in json.loads(ttmfs("doctor", "--json", code=None)) if row["what"] == f"{tmp_path}/mnt"
            ]
            assert len(found) == 1


METRICS = "\n".join((
    f'ttmfs_operation_duration_seconds_bucket{{operation="{HARM}",le="nan"}} 1e308',
    'ttmfs_operation_duration_seconds_bucket{operation="read",le="-inf"} inf',
    'ttmfs_operation_duration_seconds_count{operation="read"} 1e308',
    'ttmfs_operation_duration_seconds_sum{operation="read"} -1e308',
    'ttmfs_operation_errors_total{operation="\x1b[31m",errno="\x1b[31m"} 1e300',
    "ttmfs_size_bytes 1e308", "ttmfs_stored_bytes{state=\"resident\"} -1e308", "ttmfs_restarts_total 1e300",
    "ttmfs_serving_since_seconds -1e300", "ttmfs_page_ins_waiting 1e300", "ttmfs_backups nan",
))  # fmt: skip


def test_what_a_strangers_mount_says_of_itself_harms_no_command(tmp_path: Path) -> None:
    for config, recent in (
        (f"endless:{HARM}", HARM), ("fifo", "[" * 4000), ("dir", "{}"), ("file:[1]", '{"seconds": 0, "requests": [1]}'),
        (
            f'file:{{"reserve": 1e308, "store": "{HARM[:5]}", "size": [], "log_to": {{}}, "daemon_pid": "{HARM[:9]}"}}',
            '{"seconds": 1e-300, "requests": [["\\u001b[31m", 1e300, -1, "\\n", 1e308, 1e308]]}',
        ),
        ('file:{"uid": -1, "mode": 7, "log": "\\u001b"}', '{"seconds": "x", "requests": {"a": 1}}'),
        ('file:{"log_to": NaN}', '{"seconds": NaN, "requests": [["b", 1, 1, "read", Infinity, 1]]}'),
    ):  # fmt: skip
        names = {".config": config, ".stats": f"file:{METRICS}"}
        with served(tmp_path / "mnt", names=names, values={**GOOD, "recent": recent, "refusals": '[{"time": NaN}]'}):
            for words in ["status"], ["status", "--json"], ["top", "--once"], ["top", "--json"], ["log"], ["why"]:
                text = ttmfs(*words, tmp_path / "mnt", code=None, preexec_fn=limit_memory)
                assert "\x1b" not in text
                assert "owned" not in text
                assert "Traceback" not in text, (words, config, text)
                assert max(map(len, text.splitlines())) < 300, "a number is too long for a table"
                assert not re.search(r"\b(NaN|Infinity)\b", text), "that is no JSON"


def limit_memory() -> None:
    """Limit the memory of a command to 1 GiB, libraries included."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


NONSENSE = (
    ("page_size", "1e9"), ("page_size", "0"), ("page_size", "3"), ("pages", HARM), ("pages", "9" * 5000),
    ("resident", "-1"), ("size", "0"), ("size", ""), ("map", "5-1,9-2"), ("map", "1-999999999999"), ("map", "\udcff"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_nonsense_from_a_mount_of_a_stranger_is_reported_in_one_line(tmp_path: Path, name: str, value: str) -> None:
    values = {**GOOD, "pages": "3", "map": "1-3", name: value}
    with served(tmp_path / "mnt", names={"a": "dir", ".image": "file:x"}, values=values):
        for command in "ls", "map", "save":
            words = [tmp_path / "saved"] if command == "save" else []
            text = ttmfs(command, tmp_path / "mnt/a", *words, code=None)
            assert "owned" not in text or "nonsense" in text


# --- mounts that do not answer ---


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Mount, Mount]]:
    """Two mounts with a backup each. Tests make the first one hang."""
    (tmp_path / "hangs").mkdir()
    (tmp_path / "well").mkdir()
    with Mount(tmp_path / "hangs", "size=64m") as hangs, Mount(tmp_path / "well", "size=64m") as well:
        hangs.expect_log("")  # its keeper may kill it
        for mount in hangs, well:
            (mount.path / "a").mkdir()
            with opened(mount.path / "a/.image") as image:
                os.pwrite(image, b"x" * 5 * PAGE, 0)
        yield hangs, well


@pytest.mark.parametrize("are_named", [False, True])
def test_a_mount_that_does_not_answer_does_not_delay_other_mounts(two: tuple[Mount, Mount], are_named: bool) -> None:
    hangs, well = two
    words = [hangs.path, well.path] if are_named else []
    with stopped(hangs.pid):
        text = ttmfs("ls", *words, code=1)
        assert f"{hangs.path} has not answered for 2 s; ttmfs doctor {hangs.path} says what to do" in text
        assert re.search(r"^(\S+/)?a +5 ", text, re.MULTILINE)
        rows = json.loads(ttmfs("ls", "--json", code=1).rpartition("]")[0] + "]")
        assert [row["pages"] for row in rows if row["mount"] == str(well.path)] == [5]
        (silent,) = [row for row in rows if row["mount"] == str(hangs.path)]
        assert "has not answered" in silent["error"]
        assert "has not answered" in ttmfs("ls", hangs.path / "a", code=2)


def test_doctor_reports_a_mount_that_does_not_answer_under_any_name(two: tuple[Mount, Mount]) -> None:
    hangs, well = two
    with stopped(hangs.pid):
        checks = {check["what"]: check for check in json.loads(ttmfs("doctor", "--json", code=1))}
        assert checks[str(well.path)]["state"] == "ok"
        assert checks[str(hangs.path)]["state"] == "problem"
        for path in str(hangs.path), f"{hangs.path}/", os.path.relpath(hangs.path, REPOSITORY):
            assert "has not answered" in ttmfs("doctor", path, code=1)
        assert "give the mount point" in ttmfs("doctor", hangs.path / "a", code=2)


@pytest.mark.parametrize("kind", ["daemon", "keeper", "both"])
def test_the_advice_of_doctor_for_a_stopped_daemon_works(two: tuple[Mount, Mount], kind: str) -> None:
    """Each command that doctor names is tried by itself: -CONT, -USR1 and -KILL."""
    hangs, _ = two
    daemon, keeper = hangs.pid, hangs.process.pid
    pids = {"daemon": [daemon], "keeper": [keeper], "both": [daemon, keeper]}[kind]
    with stopped(*pids):
        for _ in pids:
            text = ttmfs("doctor", hangs.path, code=None)
            (advice,) = re.findall(r"kill -CONT \d+", text)
            run(advice)
        assert "answers; daemon" in ttmfs("doctor", hangs.path, code=0)
    if kind == "daemon":
        os.kill(daemon, signal.SIGSTOP)
        (advice,) = re.findall(r"kill -KILL \d+", ttmfs("doctor", hangs.path, code=1))
        run(advice)
        assert (hangs.path / "a/5").read_bytes() == b"x" * PAGE
        assert "answers; daemon" in ttmfs("doctor", hangs.path, code=0)


COMMANDS = [
    "create {0}/new",
    "save {0}/a {1}",
    "load {1} {0}/b",
    "writeback {0}/a",
    "map {0}/a",
    "fini {0}/b",
    "fd {0}/a true",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_says_that_it_waits_for_a_mount_and_can_be_interrupted(
    two: tuple[Mount, Mount], tmp_path: Path, words: str
) -> None:
    hangs, _ = two
    (hangs.path / "b").mkdir()
    if "load" in words:
        (hangs.path / "b").rmdir()
        (tmp_path / "saved").write_bytes(b"x" * PAGE)
    command = [*TTMFS, *words.format(hangs.path, tmp_path / "saved").split()]
    for interrupt in True, False:
        with stopped(hangs.pid):
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert process.stderr
            assert select.select([process.stderr], [], [], ENOUGH)[0]
            said = process.stderr.readline()
            assert f"{hangs.path} does not answer; waiting" in said
            assert f"ttmfs doctor {hangs.path}" in said
            if interrupt:
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=ENOUGH)
                assert "interrupted" in said
                assert process.returncode == 130
        if not interrupt:
            _, said = process.communicate(timeout=ENOUGH)
            assert process.returncode == 0, said


@pytest.mark.parametrize("request_", ["lookup", "getxattr", "statfs", "opendir", "open"])
def test_a_server_that_never_answers_blocks_no_command(tmp_path: Path, request_: str) -> None:
    """The kernel does not end the process that asks, even if killed. The command leaves it alone."""
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    names = {"a": "dir", ".config": "file:{}", ".stats": "file:", ".image": "file:x"}
    with served(tmp_path / "mnt", hangs=[request_], names=names, values={**GOOD, "pages": "3"}):
        began = time.monotonic()
        ttmfs("ls", tmp_path / "mnt", code=None)
        ttmfs("doctor", tmp_path / "mnt", code=None)
        ttmfs("ls", "--json", code=None)
        for command in "status", "top":
            ttmfs(command, tmp_path / "mnt", code=None)
        for words in (
            f"bench {tmp_path}/mnt",
            f"map {tmp_path}/mnt/a",
            f"save {tmp_path}/mnt/a {tmp_path}/saved",
            f"load {tmp_path}/file {tmp_path}/mnt/b",
        ):
            process = subprocess.Popen(
                [*TTMFS, *words.split()], cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            process.wait(ENOUGH)
            assert process.stderr
            process.stderr.close()
        assert time.monotonic() - began < 10 * ENOUGH


def test_ls_watch_leaves_one_process_waiting_for_a_stopped_mount(two: tuple[Mount, Mount]) -> None:
    hangs, well = two
    with stopped(hangs.pid):
        command = [*TTMFS, "ls", "--watch=0.1"]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            tables = 0
            for line in process.stdout:
                tables += "has not answered" in line
                if tables == 6:
                    break
            assert len(children(process.pid)) <= 4, "not one for each table"
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=ENOUGH)
    assert process.returncode == 0
    assert well.path.is_dir()


@pytest.mark.parametrize("large", [1 << 20, 2 << 20])
def test_libttmfs_writes_to_no_memory_but_the_callers(tmp_path: Path, large: int) -> None:
    """The server answers reads in part, so that the rest of a page is a little less than a request."""
    driver, request = tmp_path / "driver", 1 << 20
    files = f"{REPOSITORY}/tests/mount/c_library_driver.c {REPOSITORY}/c/ttmfs.c"
    run(f"cc -g -O1 -fsanitize=address -I{REPOSITORY}/c -pthread -o {driver} {files}")
    values = {**GOOD, "page_size": str(large), "size": str(2 << 20)}
    lengths = [request // 2, request // 2 + 8]
    handles = "1 2" if large == request else "1"
    with served(tmp_path / "mnt", names={"a": "dir", ".image": "endless:x"}, values=values, lengths=lengths):
        said = run(f"printf 'open {tmp_path}/mnt/a 1\\ncopy {handles}\\n' | {driver} 2>&1")
    assert said.split()[:2] == ["0", "0"], said
