"""The commands of ``ttmfs`` on real mounts: what they do, what they refuse, what a terminal sees, and interruptions."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

import stores
from harness import REPOSITORY, Mount, attribute, count, names, opened, run, set_attribute, wait_until
from stores import ALICE, BOB, Place, as_user
from ttmfs.cli import main as cli
from ttmfs.linux import system_calls as linux

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
PART = 16 * MIB
CHUNK = 4 * MIB
TTMFS = [sys.executable, "-m", "ttmfs"]
ODD = "a 'quoted'\n\x1b[31mnäme"

NOISE = np.random.default_rng(7).bytes(64 * MIB)


@pytest.fixture
def mnt(shared: Mount) -> Path:
    return shared.path


def ttmfs(*words: object, code: int | None = 0, **more: Any) -> str:
    """Run a command. Returns its output, followed by its standard error, which must hold no traceback.

    `code` is the exit status that the command must have; None allows any. `more` goes to subprocess.run().

    A command with `more`, or one that executes a program or forks, runs as a process. Others run in this process, which
    takes a third of the time and shows that they leave no descriptor open.
    """
    if not more and words[0] not in ("fd", "doctor", "ls"):
        status, text = called(*map(str, words))
    else:
        more = {"cwd": REPOSITORY, "stdin": subprocess.DEVNULL, **more}
        command = [*more.pop("command", TTMFS), *map(str, words)]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False, **more)
        status, text = done.returncode, (done.stdout + done.stderr).decode()
    assert code is None or status == code, f"{words}: {status}\n{text}"
    assert "Traceback" not in text
    return text


def called(*words: str) -> tuple[int, str]:
    output, error, before = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), sys.argv
    sys.argv = ["ttmfs", *words]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            status = cli.main()
    finally:
        sys.argv = before
    output.seek(0)
    return status, output.read() + error.getvalue()


def store(backup: Path, data: bytes, offset: int = 0) -> None:
    """Store pages, through .image."""
    with opened(backup / ".image") as fd:
        for start in range(0, len(data), MIB):
            assert os.pwrite(fd, data[start : start + MIB], offset + start) == len(data[start : start + MIB])


def content(backup: Path) -> dict[int, bytes]:
    """The pages of a backup by handle."""
    return {int(name): (backup / name).read_bytes() for name in os.listdir(backup)}


def image(path: Path) -> bytes:
    return path.read_bytes()


# --- a terminal ---


@contextlib.contextmanager
def on_terminal(
    *words: object, columns: int = 80, lines: int = 24, **environment: str
) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """Run a command on a terminal of its own. Gives the other end of the terminal."""
    ours, theirs = pty.openpty()
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*TTMFS, *map(str, words)], cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**plain, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environment},
    )  # fmt: skip
    os.close(theirs)
    try:
        yield ours, process
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


def read_until(terminal: int, condition: Callable[[str], Any], seconds: float = 20) -> str:
    """What a terminal shows up to a text, or to the end."""
    text, end = b"", time.monotonic() + seconds
    while not condition(text.decode(errors="replace")):
        assert time.monotonic() < end, f"waited {seconds} s, saw {text!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536)
            except OSError:  # EIO: the other end is closed
                break
    return text.decode(errors="replace")


def seen(*words: object, **more: Any) -> str:
    """Everything that a command writes to a terminal."""
    with on_terminal(*words, **more) as (terminal, process):
        text = read_until(terminal, lambda _: False)
        assert process.wait(10) == 0, text
    return text


# --- create, ls, writeback, fini ---


def test_create_makes_backups_of_a_size_and_mode(mnt: Path) -> None:
    ttmfs("create", "--size", "1m", "--mode", "0750", mnt / "a", mnt / "b")
    assert count(mnt / "b", "size") == MIB
    assert stat.S_IMODE((mnt / "a").stat().st_mode) == 0o750
    ttmfs("create", "c", cwd=mnt, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert count(mnt / "c", "size") == 64 * MIB


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("there was no need to")


def test_create_makes_a_private_backup_in_one_step(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise anyone could open the backup before its mode is changed."""
    ttmfs("create", "-m", "777", mnt / "all")
    assert stat.S_IMODE((mnt / "all").stat().st_mode) == 0o777, "what the umask takes is given back"
    monkeypatch.setattr(os, "chmod", refuse)
    ttmfs("create", "-m", "700", mnt / "mine")
    ttmfs("create", mnt / "usual")
    assert [stat.S_IMODE((mnt / name).stat().st_mode) for name in ("mine", "usual")] == [0o700, 0o755]


def test_create_continues_after_a_backup_that_fails(mnt: Path, tmp_path: Path) -> None:
    text = ttmfs("create", tmp_path / "x", mnt / "a", mnt / "a", "/nowhere/x", code=1)
    assert (mnt / "a").is_dir()
    assert not (tmp_path / "x").exists(), "where no ttmfs is mounted it makes no directory"
    assert "is not a mount of ttmfs" in text
    assert "File exists" in text
    assert len(text.splitlines()) == 3
    assert "at most" in ttmfs("create", "-s", "4t", mnt / "b", code=2)
    assert not (mnt / "b").exists()


@pytest.mark.parametrize("words", [["-s", "lots", "{0}/a"], ["-s", "0", "{0}/a"], ["-m", "rwx", "{0}/a"], ["{0}"]])
def test_create_refuses_impossible_names_and_sizes(mnt: Path, words: list[str]) -> None:
    assert len(ttmfs("create", *(word.format(mnt) for word in words), code=2).splitlines()) == 1
    assert not os.listdir(mnt)


def test_ls_shows_the_values_of_the_attributes(mnt: Path) -> None:
    for name, pages in ("a", 3), ("b", 0), ("c", 300):
        (mnt / name).mkdir()
        store(mnt / name, NOISE[: pages * PAGE])
    os.chown(mnt / "b", 0, 0)
    rows = json.loads(ttmfs("ls", "--json", "--sort", "pages", mnt))
    assert [(row["name"], row["pages"]) for row in rows] == [("c", 300), ("a", 3), ("b", 0)]
    for row in rows:
        assert row["size"] == count(mnt / row["name"], "size")
        assert row["resident"] == count(mnt / row["name"], "resident") * PAGE
        assert row["owner"] == "root"
        assert row["modified"] == pytest.approx((mnt / row["name"]).stat().st_mtime, abs=1)
    lines = ttmfs("ls", mnt).splitlines()
    assert lines[0].split() == "NAME PAGES SIZE RESIDENT SWAPPED OWNER AGE".split()
    assert re.fullmatch(r"c +300 +64M +1.2M +0 +root +\d+s", lines[3])
    assert lines[-1].split() == ["3", "backups", "303", "192M", "1.2M", "0"]
    assert str(300 * PAGE) in ttmfs("ls", "-b", "-r", mnt / "c")
    assert str(mnt / "a") in ttmfs("ls", "--json") or '"name": "a"' in ttmfs("ls", "--json"), (
        "all mounts, if none is given"
    )


@pytest.mark.parametrize("width", [60, 80, 200])
def test_ls_cuts_long_names_in_the_middle_to_fit_the_terminal(mnt: Path, width: int) -> None:
    name = "layer-0-" + "x" * 90 + "-activations"
    (mnt / name).mkdir()
    rows = [line.rstrip("\r") for line in seen("ls", mnt, columns=width, NO_COLOR="1").splitlines()]
    assert max(map(len, rows)) < width
    assert rows[0].split()[0] == "NAME"
    assert rows[1].startswith("layer-0")
    assert rows[1].split()[0].endswith("vations")
    assert ("…" in rows[1]) == (width < 200)
    assert name in ttmfs("ls", mnt), "a pipe gets the whole name"


def test_commands_quote_strange_names(mnt: Path) -> None:
    (mnt / ODD).mkdir()
    (mnt / "plain").mkdir()
    text = ttmfs("ls", mnt, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert "$'a \\'quoted\\'\\n\\e[31mnäme'" in text
    assert len(text.splitlines()) == 4
    assert "\x1b" not in text
    shown = next(line for line in text.splitlines() if "quoted" in line).split("  ")[0]
    assert run(f"printf %s {shown}") == ODD, "a shell reads the name back"
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    assert "n\\xc3\\xa4me" in ttmfs("ls", mnt, env={**os.environ, **plain})
    assert [row["name"] for row in json.loads(ttmfs("ls", "--json", mnt))] == [ODD, "plain"]
    assert "\x1b" not in ttmfs("map", mnt / ODD)
    assert "\x1b" not in ttmfs("fd", mnt / (ODD + "x"), "--", "true", code=2)
    assert "\x1b" not in ttmfs("fini", mnt / ODD / "1", mnt / ODD, code=1)


@pytest.mark.parametrize("words", ["fini x -{0}", "ls --sort {0}", "create -m {0} x", "doctor {0}", "rescue {0} x",
                                   "ls --watch={0}", "save {0} {0}/", "load {0} x", "mount"])  # fmt: skip
def test_errors_and_usage_quote_strange_names(words: str) -> None:
    """The names stand in an error of the command line, and in the text of an exception."""
    strange = "\x1b]0;owned\x07\u202egnp.exe\u2066\x9b31m\udcff"
    command = [word.format(strange) for word in words.split()]
    if words == "mount":
        done = subprocess.run(
            [sys.executable, "-c", "import ttmfs.cli.mount_helper as m; m.main()", "-f", "ttm", os.fsencode(strange)],
            cwd=REPOSITORY, capture_output=True, timeout=20, check=False,
        )  # fmt: skip
        text = (done.stdout + done.stderr).decode()
    else:
        text = ttmfs(*command, code=2, **({"cwd": REPOSITORY} if command[0] in ("fini", "save") else {}))
    assert "owned" in text
    assert not set("\x1b\x07\u202e\u2066\x9b") & set(text)


def test_a_path_outside_of_any_mount_is_reported_in_one_line(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    text = ttmfs("ls", tmp_path, mnt, "/nowhere", code=1)
    assert f"ttmfs ls: {tmp_path} is not a mount of ttmfs, nor a backup" in text
    assert "/nowhere: No such file or directory" in text
    assert "\na " in text
    for command in "map", "writeback", "fini", "save", "load", "fd":
        words: list[object] = [tmp_path / "x"] if command == "save" else ["true"] if command == "fd" else []
        for path in tmp_path, mnt, "/nowhere/x":
            arguments: list[object] = ["/bin/ls", path] if command == "load" else [path, *words]
            lines = ttmfs(command, *arguments, code=2).splitlines()
            assert len(lines) == 1
            assert lines[0].startswith(f"ttmfs {command}: ")
    assert not (tmp_path / "x").exists()


def test_a_closed_pipe_ends_a_command_quietly(mnt: Path) -> None:
    (mnt / "a").mkdir()
    for words in (
        ["ls", mnt],
        ["ls", "--json", mnt],
        ["map", mnt / "a"],
        ["map", "-o", "-", mnt / "a"],
        ["doctor", mnt],
        ["--help"],
    ):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as output:
            done = subprocess.run(
                [*TTMFS, *map(str, words)],
                cwd=REPOSITORY,
                env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=20,
                check=False,
            )
        assert (done.returncode, done.stderr) == (141, b""), words


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_cause_no_error_and_are_not_reused(mnt: Path, closed: str) -> None:
    """Otherwise the first file that is opened would get the number of a standard file, and the output."""
    (mnt / "a").mkdir()
    store(mnt / "a", PAGE * b"x")
    for words, code in ("map A", 0), ("writeback A", 0), ("--help", 0), ("create A", 2), ("ls /", 2):
        words = words.replace("A", f"{mnt}/a")
        assert "Traceback" not in run(f"({sys.executable} -m ttmfs {words} {closed}) 2>&1", cwd=REPOSITORY, code=code)
    assert content(mnt / "a") == {1: PAGE * b"x"}


def test_an_interruption_at_any_moment_prints_no_traceback(mnt: Path) -> None:
    """Before the command begins, the signal ends the process.

    Later the command prints a line. Only an interruption before the first lines of ours gives Python's own traceback.
    """
    seen = set()
    for milliseconds in range(15, 3000, 8):
        command = [*TTMFS, "ls", "--watch=60", str(mnt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        seen.add(process.returncode)
        assert b"Traceback" not in said or b"/ttmfs/cli/main.py" not in said, said.decode()
        if milliseconds > 200 and seen >= {-signal.SIGINT, 0}:
            break
    assert seen >= {-signal.SIGINT, 0}


def test_an_argument_in_the_wrong_place_is_refused_with_the_reason(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    assert f"{mnt} is the root of a mount; name a backup in it, such as {mnt}/a" in ttmfs("create", mnt, code=2)
    for target in mnt / "x", mnt / "a/x":
        assert f"{target} is in a mount of ttmfs, which holds no other files" in ttmfs(
            "save", mnt / "a", target, code=2
        )
    (tmp_path / "f").write_bytes(PAGE * b"x")
    (mnt / "b").mkdir()
    (mnt / "b" / "1").write_bytes(b"x")
    assert f"load: {mnt}/{'n' * 256}: " in ttmfs("load", tmp_path / "f", mnt / ("n" * 256), code=2)


def test_doctor_reports_a_full_mount(mnt: Path) -> None:
    (mnt / "a").mkdir()
    size = os.statvfs(mnt).f_blocks * PAGE
    assert "is full" not in ttmfs("doctor", mnt, code=None)
    set_attribute(mnt / "a", "size", size)
    with opened(mnt / "a" / ".image") as image:
        for position in range(0, size, PART):
            os.pwrite(image, bytes(min(PART, size - position)), position)
    assert os.statvfs(mnt).f_bavail == 0
    assert f"ttmfs resize {mnt} SIZE" in ttmfs("doctor", mnt, code=None)


def test_save_replaces_only_regular_files(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "directory").mkdir()
    before = names(tmp_path)
    for name in before:
        assert "is not a regular file" in ttmfs("save", "-f", mnt / "a", tmp_path / name, code=2)
    (tmp_path / "file").write_text("kept")
    for name in "file/", "new/", "new/.":
        why = ttmfs("save", "-f", mnt / "a", f"{tmp_path}/{name}", code=2, cwd=REPOSITORY)
        assert f"{name}' is the name of a directory: add the name of the file to make" in why
    assert {*names(tmp_path)} == {*before, "file"}
    assert (tmp_path / "file").read_text() == "kept"
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_contradictory_arguments_are_refused(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    for words, why in (
        ("ls --watch=abc", "'abc' is neither a number of seconds nor a path"),
        (f"map --json -o {tmp_path}/a.png {mnt}/a", "give one of the two"),
        (f"create {mnt}/.hidden", "begin with a dot"),
    ):
        assert why in ttmfs(*words.split(), code=2)
    assert not names(tmp_path)


def test_fini_ends_only_the_named_backups(mnt: Path) -> None:
    for name in "abc":
        (mnt / name).mkdir()
        store(mnt / name, NOISE[: 20 * PAGE])
    text = ttmfs("fini", mnt, mnt / "a", mnt / "b/1", mnt / "b/.image", "/tmp", mnt / "absent", mnt / "c/", code=1)
    assert os.listdir(mnt) == ["b"]
    assert len(os.listdir(mnt / "b")) == 20
    assert "is the root of a mount" in text
    assert len(text.splitlines()) == 5


@pytest.mark.serial
@pytest.mark.usefixtures("swap")
def test_writeback_shows_its_progress_on_a_terminal(mnt: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 32 * MIB])
    text = seen("writeback", mnt / "a")
    assert re.search(rf"{mnt}/a .* 0% +0 of 32M", text)
    assert re.search(r"100% +32M of 32M", text)
    assert text.splitlines()[-1] == f"{mnt}/a: 32M swapped out, 0 in memory"
    assert "%" not in ttmfs("writeback", mnt / "a"), "a pipe gets the result only"


@pytest.mark.serial
def test_writeback_without_swap_says_so_and_what_to_do(mnt: Path) -> None:
    if linux.swap_space()[0]:
        pytest.skip("this machine has swap of its own")
    (mnt / "a").mkdir()
    (mnt / "b").mkdir()
    store(mnt / "a", NOISE[:MIB])
    said = "nothing to push: this machine has no swap (see swapon --show); 1M stay in memory. Add a swap device,"
    assert f"{mnt}/a: {said}" in ttmfs("writeback", mnt / "a")
    assert ttmfs("writeback", mnt / "b") == f"{mnt}/b: holds no pages\n"
    (row,) = json.loads(ttmfs("writeback", "--json", mnt / "a"))
    assert (row["resident"], row["swapped"]) == (MIB // PAGE, 0)


def test_every_command_that_changes_backups_reports_in_json(mnt: Path) -> None:
    path = str(mnt / "a")
    assert json.loads(ttmfs("create", "--json", "-s", "1m", path)) == [{"backup": path, "size": MIB}]
    store(mnt / "a", NOISE[: 2 * PAGE])
    row = {"backup": path, "pages": 2, "page_size": PAGE}
    assert json.loads(ttmfs("fini", "--json", "-n", path)) == [{**row, "ended": False}]
    assert json.loads(ttmfs("fini", "--json", path)) == [{**row, "ended": True}]


@pytest.mark.serial
@pytest.mark.usefixtures("swap")
def test_map_shows_pages_swapped_out_by_writeback(mnt: Path, tmp_path: Path) -> None:
    for name in "ab":
        (mnt / name).mkdir()
        set_attribute(mnt / name, "size", 4 * MIB)
        store(mnt / name, NOISE[: 2 * MIB])
    assert "2M swapped out, 0 in memory" in ttmfs("writeback", mnt / "a")
    for handle in range(1, 257):  # half of them come back
        (mnt / "a" / str(handle)).read_bytes()
    cold = count(mnt / "a", "swapped")
    assert 200 <= cold <= 256
    (row,) = json.loads(ttmfs("ls", "--json", mnt / "a"))
    assert row["swapped"] == cold * PAGE
    found = json.loads(ttmfs("map", "--json", mnt / "a"))
    assert (found["pages"], found["swapped"]) == (512, cold)
    assert found["runs"] == [{"first": 1, "last": 512, "swapped": cold}]
    cells = cells_of(ttmfs("map", mnt / "a", env={**os.environ, "COLUMNS": "76", "LC_ALL": "C.UTF-8"}))
    assert len(cells) == 1024, "a page a cell"
    assert abs(cells[:256].count("█") - 256) <= 56
    assert cells[256:512].count("⣿") >= 200
    assert set(cells[512:]) == {"·"}
    ttmfs("map", mnt / "a", "-o", tmp_path / "a.png", cwd=REPOSITORY)
    area = areas(tmp_path / "a.png")
    assert 0.1 < area["hot"] / area["nothing"] < 0.9
    assert 0.1 < area["cold"] / area["nothing"] < 0.9
    text = seen("map", mnt / "a", columns=76)
    assert "\x1b[0;34m⣿" in text
    assert "\x1b[0;33m█" in text


# --- the picture ---

COLOURS = {"hot": b"\xe2\x62\x0a", "cold": b"\x18\x60\xae", "nothing": b"\xe9\xeb\xee"}


def cells_of(text: str) -> str:
    """The cells of a picture in a terminal, in order."""
    return "".join(line[11:] for line in text.splitlines() if re.match(r" *\d+ [^ ]", line))


def areas(path: Path) -> dict[str, int]:
    """The number of pixels of a picture in each of the COLOURS."""
    found = (matplotlib.image.imread(path)[:, :, :3] * 255).round().astype(int)
    return {name: int((found == list(colour)).all(axis=2).sum()) for name, colour in COLOURS.items()}


@pytest.mark.parametrize(
    ("size", "pages", "expected"),
    [
        (10 * PAGE, [1, 2, 3, 7], "███···█···"),
        (10 * PAGE, [], "··········"),
        (4 * PAGE, [1, 2, 3, 4], "████"),
        ((2**30 - 3) * PAGE, [10**9, 10**9 + 2], "█·█"),
    ],
)
def test_map_draws_each_page_of_a_small_backup(
    mnt: Path, tmp_path: Path, size: int, pages: list[int], expected: str
) -> None:
    (mnt / "a").mkdir()
    set_attribute(mnt / "a", "size", size)
    for handle in pages:
        (mnt / "a" / str(handle)).touch()
    text = ttmfs("map", mnt / "a", env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert cells_of(text) == expected
    assert ("from the first page stored" in text) == (size > 16 * PAGE)
    ttmfs("map", mnt / "a", "-o", tmp_path / "a.png", cwd=REPOSITORY)
    area = areas(tmp_path / "a.png")
    share = area["hot"] / (area["hot"] + area["nothing"])
    assert abs(share - len(pages) / len(expected)) < 0.05  # the legend has both colours, too


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_file_extension_selects_the_picture_format(mnt: Path, tmp_path: Path, ending: str, begins: bytes) -> None:
    name = "a$b_{c}$ \N{GREEK SMALL LETTER ALPHA}"  # neither a formula nor a line of the terminal's
    (mnt / name).mkdir()
    ttmfs("map", mnt / name, "-o", tmp_path / f"a.{ending}", cwd=REPOSITORY)
    assert (tmp_path / f"a.{ending}").read_bytes().startswith(begins)
    assert "the ending says what to write: .png, .svg or .pdf" in ttmfs("map", mnt / name, "-o", "a.gif", code=2)


def test_a_picture_without_matplotlib_says_what_to_install(mnt: Path) -> None:
    (mnt / "a").mkdir()
    program = f"import sys; sys.modules['matplotlib'] = None; sys.argv = ['ttmfs', 'map', '{mnt}/a', '-o', 'a.png']; "
    program += "from ttmfs.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=mnt, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ttmfs map: a picture needs matplotlib: .*-m pip install .*\n", done.stderr)


def test_map_fits_the_terminal_and_is_readable_without_colours(mnt: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 32 * MIB])
    ranges = ",".join(f"{first}-{first + 2047}" for first in range(1, 8192, 4096))
    set_attribute(mnt / "a", "drop", ranges)
    for width in 40, 80, 200:
        text = ttmfs("map", mnt / "a", env={**os.environ, "COLUMNS": str(width), "LC_ALL": "C.UTF-8"})
        assert max(map(len, text.splitlines())) <= max(width, 75)
        cells = cells_of(text)
        assert cells.count("█") == pytest.approx(len(cells) / 4, abs=3)
        assert "█" in text
        assert "\x1b" not in text
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    text = ttmfs("map", mnt / "a", env={**os.environ, **plain})
    assert text.isascii()
    assert text.count("#") > 100
    assert "\x1b[" in seen("map", mnt / "a")
    for name, value in ("NO_COLOR", "1"), ("TERM", "dumb"):
        assert "\x1b[" not in seen("map", mnt / "a", **{name: value})


def test_ls_watch_redraws_in_place_only_on_a_terminal(mnt: Path) -> None:
    (mnt / "first").mkdir()
    with on_terminal("ls", "--watch=0.1", mnt, lines=10) as (terminal, process):
        text = read_until(terminal, lambda text: text.count("\x1b[H") > 2)
        assert "first" in text
        for number in range(20):
            (mnt / f"more{number}").mkdir()
        text = read_until(terminal, lambda text: "21 backups" in text)
        last = text.rpartition("\x1b[H")[2]
        assert last.count("\n") <= 9
        assert "more lines" in text
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    with subprocess.Popen([*TTMFS, "ls", "-w", "0.1", mnt], cwd=REPOSITORY, stdout=subprocess.PIPE) as client:
        assert client.stdout
        text = b"".join(next(client.stdout) for _ in range(50)).decode()
        client.send_signal(signal.SIGINT)
        client.stdout.close()
    assert "\x1b" not in text
    assert text.count("PAGES") > 1


# --- save and load ---


@pytest.fixture(params=["natively", "through the mount", "64k"])
def pair(request: pytest.FixtureRequest, mnt: Path, mountpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """Three mounts: with descriptors, without descriptors, and with larger pages."""
    if request.param == "natively":
        yield mnt
        return
    (tmp_path / "store").mkdir()
    options = f"store={tmp_path}/store" if request.param == "through the mount" else "page_size=64k"
    with Mount(mountpoint, f"{options},size=256m,backup_size=64m") as mount:
        yield mount.path


def fill(backup: Path, page: int) -> None:
    """Store scattered pages, some of them zeros or partly zeros, in several chunks of 16 MiB and across a border."""
    backup.mkdir(mode=0o750)
    set_attribute(backup, "size", 3 * PART + 5 * page)
    store(backup, NOISE[: 40 * page], 7 * page)
    store(backup, NOISE[: 4 * page], PART - 2 * page)
    store(backup, NOISE[:100] + bytes(page - 100), 3 * PART + 4 * page)
    (backup / "3").touch()
    (backup / str(2 * PART // page + 9)).touch()  # zeros alone in its part


def test_load_restores_saved_pages_at_the_same_handles(pair: Path, tmp_path: Path) -> None:
    page = count(pair, "page_size")
    fill(pair / "a", page)
    before = content(pair / "a")
    text = ttmfs("save", pair / "a", tmp_path / "f")
    assert f"saved: {len(before)} pages" in text
    assert sorted(set(os.listdir(tmp_path)) - {"mnt", "store"}) == ["f", "f.ttmfs"]
    assert image(tmp_path / "f") == image(pair / "a/.image")
    assert (tmp_path / "f").stat().st_blocks * 512 <= (len(before) + 4) * page
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert "loaded" in ttmfs("load", tmp_path / "f", pair / "b")
    assert content(pair / "b") == before
    assert attribute(pair / "b", "size") == attribute(pair / "a", "size")
    assert stat.S_IMODE((pair / "b").stat().st_mode) == 0o750
    assert "OK" in ttmfs("load", "--check", tmp_path / "f")
    assert "f exists" in ttmfs("save", pair / "b", tmp_path / "f", code=2)
    assert "is not a regular file" in ttmfs("save", "--force", pair / "b", tmp_path, code=2)
    (pair / "b/1").touch()
    assert json.loads(ttmfs("save", "--force", "--json", pair / "b", tmp_path / "f"))["pages"] == len(before) + 1
    assert "holds pages" in ttmfs("load", tmp_path / "f", pair / "b", code=2)


@pytest.mark.parametrize("sparse", ["always", "never"])
def test_load_restores_a_copy_with_other_holes_at_the_same_handles(mnt: Path, tmp_path: Path, sparse: str) -> None:
    fill(mnt / "a", PAGE)
    ttmfs("save", mnt / "a", tmp_path / "f")
    run(f"cp --sparse={sparse} f g; cp f.ttmfs g.ttmfs", cwd=tmp_path)
    ttmfs("load", tmp_path / "g", mnt / "b")
    assert content(mnt / "b") == content(mnt / "a")


def test_load_accepts_a_file_without_a_manifest(mnt: Path, tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(NOISE[: 3 * PAGE])
        file.seek(PART + 5 * PAGE)
        file.write(NOISE[: PAGE + 100])
    assert "has no manifest" in ttmfs("load", tmp_path / "f", mnt / "a")
    assert sorted(content(mnt / "a")) == [1, 2, 3, PART // PAGE + 6, PART // PAGE + 7]
    assert (mnt / "a" / str(PART // PAGE + 7)).read_bytes() == NOISE[PAGE : PAGE + 100].ljust(PAGE, b"\0")
    assert "without its manifest" in ttmfs("load", "--check", tmp_path / "f", code=2)
    (tmp_path / "empty").touch()
    assert "is empty" in ttmfs("load", tmp_path / "empty", mnt / "b", code=2)
    assert not (mnt / "b").exists()


def test_load_checks_and_loads_a_rescued_file(mnt: Path, tmp_path: Path, shared: Mount) -> None:
    fill(mnt / "a", PAGE)
    ttmfs("rescue", shared.process.pid, tmp_path / "copy")
    ttmfs("rescue", "--check", tmp_path / "copy")
    assert "has no manifest" in ttmfs("load", tmp_path / "copy/a", mnt / "b")
    assert content(mnt / "b") == content(mnt / "a")
    flip(tmp_path / "copy/a", PART - PAGE)
    ttmfs("rescue", "--check", tmp_path / "copy", code=1)


def flip(path: Path, offset: int) -> None:
    """Change a bit of a file."""
    with opened(path) as fd:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 1]), offset)


def sealed(lines: str) -> str:
    """A manifest with these lines and a valid digest."""
    return f"{lines}end {hashlib.sha256(lines.encode()).hexdigest()}\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ("1-1024", "1-1099511627776"),  # more than a chunk
        ("1-1024", "1025-2048"),  # those of the next chunk
        ("1-1024", "2-3,1"),
        ("1-1024", "1-4,4-8"),
        ("1-1024", "0-1023"),
        ("1-1024", ""),
        ("size=67108864", "size=16384"),  # beyond the end
        ("size=67108864", "size=67108865"),
        ("page_size=4096", "page_size=0"),
        ("page_size=4096", "page_size=12288"),
        ("mode=755", "mode=1755"),
        ("\n1-", "\n\n1-"),
        ("ttmfs 3", "ttmfs 2"),
    ],
)
def test_a_sealed_manifest_with_impossible_values_is_refused(mnt: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 2 * PART])
    ttmfs("save", mnt / "a", tmp_path / "f")
    manifest = tmp_path / "f.ttmfs"
    lines = manifest.read_text().rpartition("end ")[0]
    assert sealed(lines) == manifest.read_text()
    assert wrong[0] in lines
    manifest.write_text(sealed(lines.replace(*wrong, 1)))
    assert "is damaged" in ttmfs("load", tmp_path / "f", mnt / "b", code=2)
    assert not (mnt / "b").exists()


@pytest.mark.parametrize("wrong", [("mode=755", "mode=777"), ("\n3-4", "\n3-5")])
def test_a_changed_manifest_is_detected(mnt: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    """Only the manifest's own digest covers pages of zeros."""
    (mnt / "a").mkdir()
    for handle in "34":
        (mnt / "a" / handle).touch()
    ttmfs("save", mnt / "a", tmp_path / "f")
    text = (tmp_path / "f.ttmfs").read_text()
    assert wrong[0] in text
    (tmp_path / "f.ttmfs").write_text(text.replace(*wrong))
    for words in ["--check", tmp_path / "f"], [tmp_path / "f", mnt / "b"]:
        assert "f.ttmfs is damaged" in ttmfs("load", *words, code=2)


def test_check_json_has_the_unquoted_name(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    ttmfs("save", mnt / "a", tmp_path / ODD)
    assert json.loads(ttmfs("load", "--check", "--json", tmp_path / ODD)) == {"file": str(tmp_path / ODD), "ok": True}


def test_a_damaged_chunk_is_reported_and_not_stored(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 3 * PART])
    ttmfs("save", mnt / "a", tmp_path / "f")
    flip(tmp_path / "f", PART + 12345)
    first, last = PART // PAGE + 1, PART // PAGE + CHUNK // PAGE
    why = f"the pages of handles {first}-{last} are not those that were saved"
    assert why in ttmfs("load", "--check", tmp_path / "f", code=2)
    assert '"ok": false}' in ttmfs("load", "--check", "--json", tmp_path / "f", code=2)
    text = ttmfs("load", tmp_path / "f", mnt / "b", code=1)
    assert why in text
    assert f"To resume, ttmfs load --continue {tmp_path}/f {mnt}/b" in text
    stored = content(mnt / "b")
    assert stored
    assert not set(range(first, last + 1)) & set(stored)
    flip(tmp_path / "f", PART + 12345)
    ttmfs("load", "--continue", tmp_path / "f", mnt / "b")
    assert image(mnt / "b/.image") == image(mnt / "a/.image")

    os.truncate(tmp_path / "f", 3 * PART - 1)
    assert f"has {3 * PART - 1} bytes, and had" in ttmfs("load", tmp_path / "f", mnt / "c", code=2)
    os.truncate(tmp_path / "f", 64 * MIB)
    text = (tmp_path / "f.ttmfs").read_text()
    (tmp_path / "f.ttmfs").write_text(sealed("ttmfs 3 page_size=65536 size=67108864 mode=755\n"))
    assert "mount with page_size=64K" in ttmfs("load", tmp_path / "f", mnt / "c", code=2)
    for damaged in text[:-1].rpartition("\n")[0] + "\n", text + "\n", text[100:], "", "{}\n", "\0" * 99:
        (tmp_path / "f.ttmfs").write_text(damaged)
        assert "f.ttmfs is damaged" in ttmfs("load", tmp_path / "f", mnt / "c", code=2)
    assert not (mnt / "c").exists()


def test_a_load_that_runs_out_of_room_can_be_continued(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE)
    ttmfs("save", mnt / "a", tmp_path / "f")
    os.truncate(mnt / "a/.image", 0)
    set_attribute(mnt, "size", 40 * MIB)
    text = ttmfs("load", tmp_path / "f", mnt / "b", code=1)
    assert "make room" in text
    assert len(text.splitlines()) == 1
    assert 0 < count(mnt / "b", "pages") <= 40 * MIB // PAGE
    set_attribute(mnt, "size", "512m")
    assert f"loaded: {64 * MIB // PAGE} pages" in ttmfs("load", "--continue", tmp_path / "f", mnt / "b")
    assert image(mnt / "b/.image") == NOISE
    small = tmp_path / "small"
    with stores.mounted(small, "tmpfs", "size=20m"):
        assert "No space left" in ttmfs("save", mnt / "b", small / "f", code=1)
        assert not (small / "f").exists()
        run(f"mount -o remount,size=100m {small}")
        ttmfs("save", mnt / "b", small / "f")
        assert image(small / "f") == NOISE


def started(*words: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([*TTMFS, *map(str, words)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(client: "subprocess.Popen[bytes]", done: Callable[[], int], more_than: int) -> None:
    """Wait until a command has reached a count, or has ended."""
    wait_until(lambda: done() > more_than or client.poll() is not None, "the command to do something", 30)


def pages_of(backup: Path) -> int:
    return count(backup, "pages") if backup.exists() else 0


def bytes_in(partial: Path) -> int:
    """Bytes that a save has written so far."""
    return partial.stat().st_blocks * 512 if partial.exists() else 0


@pytest.fixture
def large(mnt: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A backup of 128 MiB, and a file to save it to: 8 chunks."""
    (mnt / "a").mkdir()
    set_attribute(mnt / "a", "size", 2 * len(NOISE))
    for n in range(2):
        store(mnt / "a", NOISE, n * len(NOISE))
    yield mnt / "a", tmp_path / "f"
    shutil.rmtree(tmp_path, ignore_errors=True)


def first_data(path: Path) -> int:
    with opened(path) as fd:
        return os.lseek(fd, 0, os.SEEK_DATA)


def test_a_killed_save_can_be_continued_and_looks_complete_only_at_its_end(large: tuple[Path, Path]) -> None:
    backup, target = large
    hidden, chance = target.with_name(".f.partial"), random.Random(os.environ.get("CI"))
    kills = damaged = 0
    while not target.exists() or not kills:
        for path in target, target.with_name("f.ttmfs"):  # it was through before it could be killed
            path.unlink(missing_ok=True)
        before, more = bytes_in(hidden), chance.randrange(3 * PART)
        with started("save", backup, target) as client:
            wait_for(client, partial(bytes_in, hidden), before + more)
            client.kill()
        kills += client.returncode == -signal.SIGKILL
        assert client.returncode in (0, -signal.SIGKILL), client.stderr and client.stderr.read()
        if bytes_in(hidden) and not damaged:
            damaged = 1
            flip(hidden, first_data(hidden) + 99)  # what a machine that failed may have lost
    if hidden.exists():  # killed between the last two steps
        ttmfs("save", "--force", backup, target)
    assert "OK" in ttmfs("load", "--check", target)
    assert image(target) == image(backup / ".image")
    assert not list(target.parent.glob(".*"))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def bytes_written() -> int:
    """Bytes written by this process."""
    return int(re.findall(r"wchar: (\d+)", Path("/proc/self/io").read_text())[0])


@pytest.fixture(params=[1, 2], ids=["before the manifest has its name", "before the file has its name"])
def stopped(request: pytest.FixtureRequest, mnt: Path, tmp_path: Path) -> Path:
    """The directory of a save that was to replace a file and was stopped in its last steps."""
    target, calls = tmp_path / "f", 0
    replace = os.replace

    def stop(*names: Any, **directories: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == request.param:
            raise KeyboardInterrupt
        replace(*names, **directories)

    (mnt / "old").mkdir()
    store(mnt / "old", NOISE[:PAGE])
    ttmfs("save", mnt / "old", target)
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 3 * PART])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop)
        ttmfs("save", "--force", mnt / "a", target, code=130)
    assert image(target) == image(mnt / "old/.image")
    return target


def test_the_same_command_completes_a_save_stopped_in_its_last_steps(mnt: Path, stopped: Path) -> None:
    assert "f exists" in ttmfs("save", mnt / "a", stopped, code=2)
    before = bytes_written()
    assert "saved: " in ttmfs("save", "--force", mnt / "a", stopped)
    assert bytes_written() < before + MIB, "what was there was not copied again"
    assert image(stopped) == image(mnt / "a/.image")
    assert "OK" in ttmfs("load", "--check", stopped)
    assert not list(stopped.parent.glob(".*"))


def test_the_rest_of_an_interrupted_save_is_not_used_for_another_backup(mnt: Path, stopped: Path) -> None:
    (mnt / "other").mkdir()
    set_attribute(mnt / "other", "size", 2 * PART)
    store(mnt / "other", NOISE[MIB : 2 * MIB], PART)
    ttmfs("save", "--force", mnt / "other", stopped)
    assert image(stopped) == image(mnt / "other/.image")
    assert "OK" in ttmfs("load", "--check", stopped)
    ttmfs("load", stopped, mnt / "b")
    assert content(mnt / "b") == content(mnt / "other")


def test_a_file_that_does_not_match_its_manifest_is_not_loaded(mnt: Path, stopped: Path) -> None:
    if (stopped.parent / ".f.partial.ttmfs").exists():
        assert "OK" in ttmfs("load", "--check", stopped), "nothing was replaced yet"
        return
    assert "is damaged" in ttmfs("load", "--check", stopped, code=2)
    assert "is damaged" in ttmfs("load", stopped, mnt / "b", code=2)
    assert not (mnt / "b").exists()


def cannot(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no holes")


@pytest.mark.parametrize("has_holes", [True, False])
def test_a_continued_save_omits_pages_dropped_since_the_interruption(
    mnt: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, has_holes: bool
) -> None:
    backup, pages = mnt / "a", PART // PAGE
    set_attribute(backup, "drop", f"{pages + 1}-{2 * pages},{2 * pages + 7}")
    if not has_holes:
        monkeypatch.setattr(linux, "punch_hole", cannot)
    ttmfs("save", "--force", backup, stopped)
    if has_holes:
        assert stopped.stat().st_blocks * 512 < 2 * PART + MIB
    assert image(stopped) == image(backup / ".image")
    ttmfs("load", stopped, mnt / "b")
    assert content(mnt / "b") == content(backup)


def test_a_continued_save_includes_pages_stored_through_a_mapping_since(mnt: Path, tmp_path: Path) -> None:
    """Such a write changes no time if the page was written to before."""
    backup, target = mnt / "a", tmp_path / "f"
    backup.mkdir()
    store(backup, NOISE[:PART])
    with opened(backup / ".shmem") as fd, mmap.mmap(fd, PART) as memory:
        memory[:5] = b"first"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", interrupt)
            ttmfs("save", backup, target, code=130)
        memory[:5] = b"later"
    ttmfs("save", backup, target)
    assert image(target)[:5] == b"later"
    assert "OK" in ttmfs("load", "--check", target)


def test_a_save_refuses_a_file_that_another_save_writes(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    hidden = tmp_path / ".f.partial"
    hidden.touch()
    with opened(hidden) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert "is being written by another" in ttmfs("save", mnt / "a", tmp_path / "f", code=2)
        assert os.path.samestat(hidden.stat(), os.fstat(fd)), "which it has not begun yet"
    ttmfs("save", mnt / "a", tmp_path / "f")
    assert sorted(os.listdir(tmp_path)) == ["f", "f.ttmfs"]


def test_a_save_follows_no_link_and_uses_no_file_of_other_users(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[:PAGE])
    precious, hidden = tmp_path / "precious", tmp_path / ".f.partial"
    precious.write_text("precious")

    def touch(owner: int, mode: int) -> None:
        hidden.touch()
        hidden.chmod(mode)
        os.chown(hidden, owner, owner)

    for make in (
        partial(hidden.symlink_to, precious),
        partial(hidden.hardlink_to, precious),
        partial(os.mkfifo, hidden),
        partial(touch, ALICE, 0o600),
        partial(touch, 0, 0o620),
    ):
        make()
        assert ".f.partial" in ttmfs("save", mnt / "a", tmp_path / "f", code=2)
        hidden.unlink()
        assert precious.read_text() == "precious"
    hidden.with_name(".f.partial.ttmfs").symlink_to(precious)
    assert ".f.partial.ttmfs: Too many levels of symbolic links" in ttmfs("save", mnt / "a", tmp_path / "f", code=2)
    hidden.with_name(".f.partial.ttmfs").unlink()
    ttmfs("save", mnt / "a", tmp_path / "f")
    assert precious.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["f", "f.ttmfs", "precious"]


def test_a_save_replaces_a_file_only_on_request(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    (tmp_path / "f.ttmfs").write_text("somebody's")
    assert "f.ttmfs exists" in ttmfs("save", mnt / "a", tmp_path / "f", code=2)
    assert "File name too long" in ttmfs("save", mnt / "a", tmp_path / ("f" * 253), code=2)
    assert f"{tmp_path}/none/f: No such file" in ttmfs("save", mnt / "a", tmp_path / "none/f", code=2)
    assert os.listdir(tmp_path) == ["f.ttmfs"]
    (tmp_path / "d.ttmfs").mkdir()
    assert "is not a regular file" in ttmfs("save", "--force", mnt / "a", tmp_path / "d", code=2)


def test_a_saved_file_belongs_to_the_caller_and_has_the_mode_of_the_backup(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    for mode, gid, expected in (0o777, 0, 0o666), (0o750, 0, 0o640), (0o775, ALICE, 0o604), (0o070, 0, 0o660):
        os.chown(mnt / "a", ALICE, gid)
        os.chmod(mnt / "a", mode)
        ttmfs("save", "--force", mnt / "a", tmp_path / "f")
        for name in "f", "f.ttmfs":
            found = (tmp_path / name).stat()
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, expected)


def amid_a_save(
    backup: Path, target: Path, act: "Callable[[subprocess.Popen[bytes]], object]"
) -> tuple[int, bytes, bytes]:
    """Do something to a save when a part of it is done. Returns its exit status and output."""
    for _ in range(5):
        with started("save", backup, target) as client:
            wait_for(client, partial(bytes_in, target.with_name(".f.partial")), 0)
            act(client)
            out, err = client.communicate(timeout=30)
        if client.returncode:
            return client.returncode, out, err
        for path in target, target.with_name("f.ttmfs"):  # it was through before
            path.unlink()
    raise AssertionError("it is always through before")


def test_a_save_after_ctrl_c_has_the_pages_of_now(large: tuple[Path, Path]) -> None:
    backup, target = large
    status, out, err = amid_a_save(backup, target, lambda client: client.send_signal(signal.SIGINT))
    assert (status, out) == (130, b"")
    assert err == b"ttmfs save: interrupted; the same command resumes\n"
    (backup / "1").write_bytes(b"changed")
    ttmfs("save", backup, target)
    assert image(target) == image(backup / ".image")


def test_a_save_reports_a_backup_that_changed_meanwhile(large: tuple[Path, Path]) -> None:
    backup, target = large

    def change(client: "subprocess.Popen[bytes]") -> None:
        client.send_signal(signal.SIGSTOP)
        (backup / "1").write_bytes(b"changed")
        set_attribute(backup, "drop", f"{len(NOISE) // PAGE}-{2 * len(NOISE) // PAGE}")
        client.send_signal(signal.SIGCONT)

    status, _, err = amid_a_save(backup, target, change)
    assert status == 1
    assert b"was changed during the save" in err
    assert "OK" in ttmfs("load", "--check", target)


def test_a_killed_load_can_be_continued(large: tuple[Path, Path], mnt: Path) -> None:
    backup, target = large
    ttmfs("save", backup, target)
    expected = image(target)
    ttmfs("fini", backup)
    chance, kills = random.Random(os.environ.get("CI")), 0
    words: list[str] = []
    while True:
        before = pages_of(mnt / "b")
        more = chance.randrange(3 * PART // PAGE)
        with started("load", *words, target, mnt / "b") as client:
            wait_for(client, lambda: pages_of(mnt / "b"), before + more)
            client.kill()
        if not client.returncode and kills:
            break
        if not client.returncode:  # it was through before it could be killed
            ttmfs("fini", mnt / "b")
            continue
        assert client.returncode == -signal.SIGKILL
        kills, words = kills + 1, ["--continue"]
        if kills == 1:
            assert "--continue resumes" in ttmfs("load", target, mnt / "b", code=2)
    assert image(mnt / "b/.image") == expected


def limited(length: int) -> Callable[[], None]:
    """A function that limits the file size of a process, and so the pages that it can store."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))


def test_a_failed_load_reports_which_pages_are_loaded(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 3 * PART])
    os.chmod(mnt / "a", 0o555)
    ttmfs("save", mnt / "a", tmp_path / "f")
    text = ttmfs("load", tmp_path / "f", mnt / "b", code=2, preexec_fn=limited(0))
    assert f"{mnt}/b: File too large; nothing was loaded" in text
    assert not (mnt / "b").exists()
    text = ttmfs("load", tmp_path / "f", mnt / "b", code=1, preexec_fn=limited(2 * PART + 5 * PAGE))
    assert f"To resume, ttmfs load --continue {tmp_path}/f {mnt}/b" in text
    assert f"; {count(mnt / 'b', 'pages')} pages are there" in text
    assert stat.S_IMODE((mnt / "b").stat().st_mode) == 0o700, "until all of it is there"
    ttmfs("load", "--continue", tmp_path / "f", mnt / "b")
    assert stat.S_IMODE((mnt / "b").stat().st_mode) == 0o555
    assert image(mnt / "b/.image") == image(mnt / "a/.image")


def test_a_load_reports_a_mount_that_dies(large: tuple[Path, Path], mountpoint: Path, tmp_path: Path) -> None:
    backup, target = large
    ttmfs("save", backup, target)
    (tmp_path / "store").mkdir()
    with (
        Mount(mountpoint, f"store={tmp_path}/store") as mount,  # where every page goes through it
        started("load", target, mountpoint / "b") as client,
    ):
        wait_for(client, lambda: pages_of(mountpoint / "b"), 2 * PART // PAGE)
        mount.kill_both()
        _, error = client.communicate(timeout=30)
    assert client.returncode == 1, error
    assert b"To resume" in error
    assert b"Traceback" not in error


def test_a_file_without_an_intact_chunk_creates_no_backup(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[:PAGE])
    ttmfs("save", mnt / "a", tmp_path / "f")
    flip(tmp_path / "f", 1)
    assert "nothing was loaded" in ttmfs("load", tmp_path / "f", mnt / "b", code=2)
    assert not (mnt / "b").exists()
    (mnt / "a/1").write_bytes(b"other")
    before = content(mnt / "a")
    assert "is damaged" in ttmfs("load", "--into", tmp_path / "f", mnt / "a", code=1)
    assert content(mnt / "a") == before


def test_a_backup_is_private_until_its_load_is_complete(
    mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mnt / "a").mkdir(mode=0o751)
    store(mnt / "a", NOISE[:PAGE])
    ttmfs("save", mnt / "a", tmp_path / "f")
    run("cp --sparse=always f plain; chmod 640 plain", cwd=tmp_path)
    changes: list[tuple[int, int, int]] = []
    chmod = os.chmod

    def noted(path: str, mode: int) -> None:
        changes.append((stat.S_IMODE(os.stat(path).st_mode), count(Path(path), "pages"), mode))
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", noted)
    ttmfs("load", tmp_path / "f", mnt / "b")
    ttmfs("load", tmp_path / "plain", mnt / "c")
    assert changes == [(0o700, 1, 0o751), (0o700, 1, 0o750)]
    ttmfs("create", "-m", "700", mnt / "mine")
    ttmfs("load", "--into", tmp_path / "f", mnt / "mine")
    assert len(changes) == 2, "its mode stays"


def test_a_file_of_another_user_is_loaded_into_a_private_backup(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir(mode=0o755)
    store(mnt / "a", NOISE[:PAGE])
    ttmfs("save", mnt / "a", tmp_path / "f")
    os.chown(tmp_path / "f.ttmfs", ALICE, ALICE)
    assert "belongs to another user than" in ttmfs("load", tmp_path / "f", mnt / "b", code=2)
    os.chown(tmp_path / "f", ALICE, ALICE)
    ttmfs("load", tmp_path / "f", mnt / "b")
    (tmp_path / "f.ttmfs").unlink()
    ttmfs("load", tmp_path / "f", mnt / "c")
    for name in "bc":
        found = (mnt / name).stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o700)
        assert content(mnt / name) == content(mnt / "a")
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in ttmfs("load", tmp_path / "fifo", mnt / "d", code=2)
    os.mkfifo(tmp_path / "f.ttmfs")
    assert "f.ttmfs is damaged" in ttmfs("load", tmp_path / "f", mnt / "d", code=2)


def test_load_into_a_backup_of_another_user_needs_a_request(mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[:PAGE])
    ttmfs("save", mnt / "a", tmp_path / "f")
    (mnt / "b").mkdir()
    os.chown(mnt / "b", ALICE, ALICE)
    for words in [], ["--continue"]:
        assert "belongs to another user" in ttmfs("load", *words, tmp_path / "f", mnt / "b", code=2)
    assert not content(mnt / "b")
    ttmfs("load", "--into", tmp_path / "f", mnt / "b")
    assert content(mnt / "b") == content(mnt / "a")


# --- streams ---


def stream_of(backup: Path, code: int = 0) -> bytes:
    """What ``ttmfs save BACKUP -`` writes to standard output."""
    done = subprocess.run([*TTMFS, "save", backup, "-"], cwd=REPOSITORY, capture_output=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(b"saved: ")
    return done.stdout


def load_stream(data: bytes, *words: object, code: int) -> str:
    return ttmfs("load", *words[:-1], "-", *words[-1:], code=code, stdin=None, input=data)


def test_a_stream_is_loaded_at_the_same_handles(pair: Path) -> None:
    fill(pair / "a", count(pair, "page_size"))
    text = run(f"{sys.executable} -m ttmfs save {pair}/a - | {sys.executable} -m ttmfs load - {pair}/b", cwd=REPOSITORY)
    before = content(pair / "a")
    assert f"loaded: {len(before)} pages" in text
    assert content(pair / "b") == before
    assert attribute(pair / "b", "size") == attribute(pair / "a", "size")
    assert stat.S_IMODE((pair / "b").stat().st_mode) == 0o750
    assert sorted(names(pair)) == ["a", "b"]
    data = stream_of(pair / "a")
    assert "holds pages" in load_stream(data, pair / "b", code=2)
    assert "-: OK" in ttmfs("load", "--check", "-", stdin=None, input=data)
    (pair / "b/1").touch()
    (pair / "b/8").write_bytes(b"changed")
    for words in ["--into"], ["--continue"]:
        load_stream(data, *words, pair / "b", code=0)
        assert content(pair / "b") == {**before, 1: bytes(count(pair, "page_size"))}
    assert sorted(names(pair)) == ["a", "b"]


def test_an_incomplete_stream_changes_nothing(mnt: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 3 * CHUNK])
    data = stream_of(mnt / "a")
    (mnt / "b").mkdir()
    (mnt / "b/5").write_bytes(b"kept")
    before = content(mnt / "b")
    at = len(data) // 2
    flipped = bytes([data[at] ^ 1])
    for damaged, why in (
        (b"", "is cut short"),
        (data[:20], "is cut short"),
        (data[:at], "is cut short"),
        (data[:-1], "is cut short"),
        (data[: data.rindex(b"end ")], "is cut short"),
        (data[:at] + flipped + data[at + 1 :], "is damaged: the pages of handles"),
        (data + b"x", "does not end with the checksum"),
        (data.replace(b"mode=755", b"mode=777", 1), "does not end with the checksum"),
        (data.replace(b"ttmfs 3 ", b"ttmfs 4 ", 1), "it has format 4, and this version of ttmfs reads format 3"),
        (NOISE[:PAGE], "does not begin as a saved copy does"),
    ):
        for words in [mnt / "new"], ["--into", mnt / "b"]:
            text = load_stream(damaged, *words, code=2)
            assert why in text
            assert len(text.splitlines()) == 1
        assert sorted(names(mnt)) == ["a", "b"]
    assert content(mnt / "b") == before


def test_a_stream_without_room_changes_nothing(mnt: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 3 * CHUNK])
    data = stream_of(mnt / "a")
    set_attribute(mnt, "size", 4 * CHUNK)
    assert "No space left on device; nothing was loaded" in load_stream(data, mnt / "b", code=2)
    assert names(mnt) == ["a"]


def test_an_interrupted_stream_changes_nothing(mnt: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 12 * CHUNK])
    data = stream_of(mnt / "a")
    with subprocess.Popen(
        [*TTMFS, "load", "-", mnt / "b"], cwd=REPOSITORY, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdin
        assert client.stderr
        client.stdin.write(data[: 11 * CHUNK])
        client.stdin.flush()
        wait_until(lambda: pages_of(mnt / "b.loading"), "pages to arrive")
        client.send_signal(signal.SIGINT)
        assert client.stderr.read().startswith(b"ttmfs load: interrupted")
        client.wait(20)
    assert client.returncode == 130
    assert names(mnt) == ["a"]


def test_a_save_to_a_closed_pipe_ends_quietly(mnt: Path) -> None:
    (mnt / "a").mkdir()
    store(mnt / "a", NOISE[: 3 * CHUNK])
    with started("save", mnt / "a", "-") as client:
        assert client.stdout
        assert client.stderr
        client.stdout.read(10)
        client.stdout.close()
        assert client.stderr.read() == b""
    assert client.returncode == 141


def test_a_progress_bar_is_drawn_only_on_a_terminal(mnt: Path, tmp_path: Path) -> None:
    backup, target = mnt / "a", tmp_path / "f"
    backup.mkdir()
    store(backup, NOISE[: 2 * PART])
    text = seen("save", backup, target, columns=140)
    assert re.search(r"save \S+/a .*█.* 100% +32M of 32M", text)
    assert re.search(r"\d[KMG]/s  \d:\d\d", text)
    text = ttmfs("save", "--force", backup, target, stdin=None)
    assert text.startswith("saved: "), "and nothing on standard error"
    text = seen("load", target, mnt / "b", columns=60)
    assert re.search(r"…\S*/b .*\d[KMG]/s  \d:\d\d", text), "the name is cut, not the figures"
    assert max(len(re.sub(r"\x1b\[[^m]*[mK]", "", part)) for part in re.split(r"[\r\n]+", text) if "%" in part) < 60
    assert "\r" not in seen("load", "--continue", target, mnt / "b", TERM="dumb").replace("\r\n", "\n")


# --- fd ---


def test_fd_passes_the_descriptor_to_a_program(mnt: Path) -> None:
    (mnt / "a").mkdir()
    assert (
        ttmfs("fd", mnt / "a", "--", "sh", "-c", "echo hello | dd of={} conv=notrunc status=none; head -c 6 {}")
        == "hello\n"
    )
    assert (mnt / "a/1").read_bytes()[:6] == b"hello\n"
    assert "nowhere: No such file" in ttmfs("fd", mnt / "a", "nowhere", code=127)
    assert "give a program" in ttmfs("fd", mnt / "a", code=2)


def test_the_mode_bits_decide_who_gets_a_descriptor_or_the_reason(place: Place, tmp_path: Path) -> None:
    command = [place.python, "-m", "ttmfs"]
    more = {"command": command, "cwd": place.path / "repository"}
    (tmp_path / "store").mkdir()
    with place.directory("shared") as path, Mount(path, "size=16m,allow_other,mode=1777"):
        alice, bob = (as_user(uid, **more) for uid in (ALICE, BOB))
        ttmfs("create", "-m", "0755", path / "hers", **alice)
        assert ttmfs("fd", path / "hers", "--", "wc", "-c", "{}", **alice).split()[0] == str(16 * MIB)
        assert "mode bits must let you" in ttmfs("fd", path / "hers", "--", "wc", "{}", code=2, **bob)
        assert json.loads(ttmfs("ls", "--json", path, **bob))[0]["uid"] == ALICE
        text = ttmfs("fini", path / "hers", code=2, **bob)
        assert "Permission denied" in text
        store(path / "hers", NOISE[: 8 * PAGE])
        with place.directory("files", BOB) as files:  # not natively: bob may only read
            os.chmod(path / "hers", 0o711)
            assert "Permission denied" in ttmfs("save", path / "hers", files / "f", code=2, **bob)
            assert not os.listdir(files)
            os.chmod(path / "hers", 0o755)
            ttmfs("save", path / "hers", files / "f", **bob)
            ttmfs("load", files / "f", path / "his", **bob)
            for name in "f", "f.ttmfs":
                (files / name).unlink()
        assert content(path / "his") == content(path / "hers")
        assert (path / "his").stat().st_uid == BOB
    with place.directory("shared") as path, Mount(path, f"store={tmp_path}/store"):
        (path / "a").mkdir()
        os.chmod(path / "a", 0o777)
        assert "store=" in ttmfs("fd", path / "a", "true", code=2)


# --- doctor ---


def checks(*words: object, code: int, **more: Any) -> dict[str, dict[str, str]]:
    return {check["what"]: check for check in json.loads(ttmfs("doctor", "--json", *words, code=code, **more))}


def test_doctor_tells_dead_mounts_from_live_ones_and_says_what_to_do(
    mnt: Path, mountpoint: Path, tmp_path: Path
) -> None:
    assert checks(mnt, code=0)[str(mnt)]["state"] == "ok"
    text = ttmfs("doctor", mnt)
    assert re.search(rf"^  ok +{mnt} +answers; daemon \d+", text, re.MULTILINE)
    with Mount(mountpoint) as mount:
        (mountpoint / "a").mkdir()
        mount.kill_both()
        found = checks(mountpoint, code=1)[str(mountpoint)]
        assert found["state"] == "problem"
        assert f"ttmfs umount {mountpoint}" in found["do"]
        text = ttmfs("ls", mountpoint, mnt, code=1)
        assert "ttmfs doctor says what to do" in text
    assert "is not a mount" in ttmfs("doctor", tmp_path, code=2)
    assert "\x1b[" in seen("doctor", mnt)


def test_doctor_reports_a_daemon_that_does_not_answer(mnt: Path, shared: Mount) -> None:
    os.kill(shared.pid, signal.SIGSTOP)
    try:
        found = checks(mnt, code=1)[str(mnt)]
    finally:
        os.kill(shared.pid, signal.SIGCONT)
    assert f"kill -CONT {shared.pid} " in found["do"]
    assert f"kill -KILL {shared.pid} makes its keeper, {shared.process.pid}," in found["do"]


def test_doctor_reports_other_versions_and_missing_packages(mnt: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "ttmfs", tmp_path / "ttmfs")
    (tmp_path / "ttmfs/version.py").write_text('__version__ = "99.1"\n')
    found = checks(mnt, code=1, cwd=tmp_path, env={**os.environ, "PATH": "/nonexistent"})
    assert "installed is 99.1" in found[str(mnt)]["found"]
    assert found[str(mnt)]["state"] == "warning"
    assert found["fusermount3"]["state"] == "problem"
    assert found["fusermount3"]["do"] == "apt install fuse3"


def test_doctor_works_for_users_without_privilege(place: Place) -> None:
    alice = as_user(ALICE, cwd=place.path / "repository", command=[place.python, "-m", "ttmfs"])
    with place.directory("shared") as path, Mount(path, "allow_other"):
        found = checks(path, code=0, **alice)
        assert found["/dev/fuse"]["state"] == found[str(path)]["state"] == "ok"
        assert {
            "kernel",
            "swap",
            "user namespaces",
            "RLIMIT_MEMLOCK",
            "pyfuse3",
            "compiled requests",
            "allow_other",
        } <= set(found)
    with place.directory("shared") as path, Mount(path):
        assert "not shown to you" in checks(path, code=0, **alice)[str(path)]["found"]
