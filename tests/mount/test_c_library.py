"""The C library, compiled here with sanitizers, on real mounts: its results are those of the Python client."""

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from harness import REPOSITORY, Mount, names, run, set_attribute
from stores import ALICE, BOB, Place, UsersMount, acting_as, as_user, slow_swap
from ttmfs.client import Backup
from ttmfs.errors import TtmfsError, errno_of

SOURCE = REPOSITORY / "c"
STRICT = "-std=c11 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror"
SANITIZED = f"{STRICT} -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
PAGE = os.sysconf("SC_PAGE_SIZE")
NATIVE, THROUGH_THE_MOUNT = 0, 1
WAYS = {"natively": NATIVE, "through the mount": THROUGH_THE_MOUNT}
ALL = " ".join(str(handle) for handle in range(1, 65))


@pytest.fixture(scope="module")
def program(place: Place) -> Iterator[Path]:
    """The compiled driver, where every user can run it."""
    source, path = Path(__file__).with_name("c_library_driver.c"), place.path / "driver"
    run(f"cc {SANITIZED} -I{SOURCE} -pthread -o {path} {source} {SOURCE}/ttmfs.c")
    yield path
    path.unlink()


class Driver:
    """A process that calls the library. :meth:`call` returns the numbers that it answers."""

    def __init__(self, program: Path, **popen: Any) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **popen
        )

    def send(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")

    def answer(self) -> list[int]:
        assert self._process.stdout
        return [int(word) for word in self._process.stdout.readline().split()]

    def call(self, line: str) -> int | list[int]:
        self.send(line)
        first, *more = self.answer()
        return [first, *more] if more else first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._process.communicate(timeout=30)  # the end of its input ends it
        assert kind or self._process.returncode == 0, "a sanitizer found something, on standard error"


@contextlib.contextmanager
def opened(program: Path, path: Path, flags: int, size: int = 64 * PAGE, **popen: Any) -> Iterator[Driver]:
    with Driver(program, **popen) as driver:
        assert driver.call(f"create {path} {size} 700") == 0
        assert driver.call("close") == 0
        assert driver.call(f"open {path} {flags}") == 0
        assert (driver.call("fd") == -errno.EOPNOTSUPP) == (flags == THROUGH_THE_MOUNT)
        yield driver


# --- the build ---


def test_the_library_is_installed_and_found_by_pkg_config_from_c_and_c_plus_plus(tmp_path: Path) -> None:
    """The header, both libraries and the .pc file, below DESTDIR and PREFIX."""
    run(f"make -C {SOURCE} install BUILD={tmp_path}/build PREFIX={tmp_path}/usr CFLAGS='-O2 -Werror'")
    run(f"make -C {SOURCE} install BUILD={tmp_path}/build PREFIX=/usr LIBDIR=/usr/lib64 DESTDIR={tmp_path}/root")
    assert (tmp_path / "root/usr/lib64/libttmfs.so.0").is_file()
    assert "libdir=/usr/lib64\n" in (tmp_path / "root/usr/lib64/pkgconfig/ttmfs.pc").read_text()
    code = '#include <ttmfs.h>\nint main(void) { struct ttmfs *b; return ttmfs_open(&b, "/", 0) == -22 ? 0 : 1; }\n'
    environment = {**os.environ, "PKG_CONFIG_PATH": f"{tmp_path}/usr/lib/pkgconfig"}
    for compiler, name in ("cc -std=c11", "main.c"), ("c++ -std=c++11", "main.cc"):
        (tmp_path / name).write_text(code)
        words = f"-Wall -Wextra -Wpedantic -Wconversion -Werror {name} $(pkg-config --cflags --libs ttmfs)"
        run(f"{compiler} -o main {words} -Wl,-rpath,{tmp_path}/usr/lib && ./main", cwd=tmp_path, env=environment)
        assert "libttmfs.so.0" in run("ldd main", cwd=tmp_path)
    exported = run("nm -D --defined-only usr/lib/libttmfs.so", cwd=tmp_path).splitlines()
    assert all(re.search(r" (T ttmfs_\w+@@|A )TTMFS_0$", line) for line in exported)
    run(f"make -C {SOURCE} uninstall BUILD={tmp_path}/build PREFIX={tmp_path}/usr")
    assert not [path for path in (tmp_path / "usr").rglob("*") if not path.is_dir()]


def test_the_library_has_no_findings_of_an_analyzer(tmp_path: Path) -> None:
    run(f"cc {STRICT} -O2 -fanalyzer -c -o {tmp_path}/ttmfs.o {SOURCE}/ttmfs.c")


# --- the same as the Python client ---

VERBS = st.one_of(
    st.tuples(st.just("store"), st.integers(0, 70), st.integers(1, 12), st.integers(0, 1000)),
    st.tuples(st.just("drop"), st.integers(0, 70), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("copy"), st.integers(0, 70), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("copy backwards"), st.integers(0, 66), st.integers(2, 4), st.just(0)),
)


def page_of(number: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The page that the driver makes of a number."""
    words = (np.uint64(number) << np.uint64(32)) + np.arange(size // 8, dtype=np.uint64)
    return (words if number else np.zeros_like(words)).view(np.uint8)


def by_python(backup: Backup, verb: str, idx: int, count: int, number: int) -> int | list[int]:
    """The answer of the Python client in the driver's form."""
    handles = np.arange(idx + 1, idx + count + 1, dtype=np.uint64)
    try:
        if verb == "store":
            pages = np.stack([page_of(number and number + i, backup.page_size) for i in range(count)])
            if count == 1:
                return backup.backup_page(pages[0], idx)
            return len(backup.backup_pages(pages, idx))
        if verb == "drop":
            backup.drop_pages(handles)
            return 0
        pages = np.empty((count, backup.page_size), np.uint8)
        backup.copy_pages(pages, handles[::-1] if verb != "copy" else handles)
    except TtmfsError as error:
        return -errno_of(error)
    numbers = [int(page.view(np.uint64)[0] >> np.uint64(32)) for page in pages]
    assert all((page == page_of(number, len(page))).all() for page, number in zip(pages, numbers, strict=True))
    return [0, *numbers]


def by_c(driver: Driver, verb: str, idx: int, count: int, number: int) -> int | list[int]:
    handles = [str(handle) for handle in range(idx + 1, idx + count + 1)]
    if verb == "store":
        return driver.call(f"store {idx} {count} {number} 0")
    return driver.call(f"{verb.split()[0]} {' '.join(handles[::-1] if 'backwards' in verb else handles)}")


@pytest.mark.parametrize("page_size", [PAGE, 64 << 10])
@pytest.mark.parametrize("way", WAYS)
def test_c_library_and_python_client_agree(mountpoint: Path, program: Path, way: str, page_size: int) -> None:
    """The same verbs have the same results and errors. Each sees what the other stored."""
    with (
        Mount(mountpoint, f"size=64m,page_size={page_size}"),
        Backup.create(mountpoint / "python", 64 * page_size, native=WAYS[way] == NATIVE) as backup,
        opened(program, mountpoint / "c", WAYS[way], 64 * page_size) as driver,
        Backup.open(mountpoint / "c") as seen,
    ):

        @hypothesis.settings(max_examples=40, deadline=None)
        @hypothesis.given(st.lists(VERBS, max_size=12))
        def agree(verbs: list[tuple[str, int, int, int]]) -> None:
            assert driver.call(f"drop {ALL}") == 0
            backup.drop_pages(backup.handles())
            for verb in verbs:
                assert by_c(driver, *verb) == by_python(backup, *verb)
            assert seen.handles().tolist() == backup.handles().tolist()
            assert driver.call("pages") == len(backup.handles())

        agree()


@pytest.mark.parametrize("page_size", [PAGE, 64 << 10, 1 << 20, 2 << 20])
@pytest.mark.parametrize("way", WAYS)
def test_every_page_size_with_memory_that_is_not_aligned(
    mountpoint: Path, program: Path, way: str, page_size: int
) -> None:
    with (
        Mount(mountpoint, f"size=64m,page_size={page_size}"),
        opened(program, mountpoint / "a", WAYS[way], 8 * page_size) as driver,
    ):
        assert driver.call("store 1 5 100 0") == 5
        assert driver.call("store 3 1 0 0") == 4
        assert driver.call("copy 2 3 4 5 6") == [0, 100, 101, 0, 103, 104]
        assert driver.call("copy 1 2") == -errno.ENOENT
        assert driver.call("drop 4") == 0
        assert driver.call("copy 2 3 4") == -errno.ENOENT
        assert driver.call("copy 6 2") == [0, 104, 100]


@pytest.mark.parametrize("way", WAYS)
def test_c3_running_out_of_room_is_a_short_count_and_then_enospc(shared: Mount, program: Path, way: str) -> None:
    set_attribute(shared.path, "size", 300 * PAGE)
    with opened(program, shared.path / "a", WAYS[way], 4096 * PAGE) as driver:
        assert driver.call("store 3 512 1 0") == 300
        assert driver.call("store 2000 5 1 0") == -errno.ENOSPC
        assert driver.call("store 2000 1 1 0") == -errno.ENOSPC
        assert driver.call("pages") == 300, "C6: what was absent stays absent"
        assert driver.call("copy 303") == [0, 300]


@pytest.mark.parametrize("way", WAYS)
def test_c6_a_large_page_is_never_stored_in_part(mountpoint: Path, program: Path, way: str) -> None:
    size = 64 << 10
    with (
        Mount(mountpoint, f"size={5 * size},page_size={size}"),
        opened(program, mountpoint / "a", WAYS[way], 64 * size) as driver,
    ):
        assert driver.call("store 1 8 1 0") == 5
        assert driver.call("copy 2 3 4 5 6") == [0, 1, 2, 3, 4, 5]
        assert driver.call("store 40 1 1 0") == -errno.ENOSPC
        assert driver.call("pages") == 5


def test_c5_writeback_does_not_change_what_is_stored(mountpoint: Path, program: Path) -> None:
    """Through the mount the reserve refuses it. Natively there is room."""
    with (
        Mount(mountpoint, "size=1m,backup_size=2m,reserve=1t"),
        opened(program, mountpoint / "a", NATIVE) as driver,
    ):
        assert driver.call("store 0 1 7 1") == 1
        assert driver.call("store 1 3 8 1") == 3
        assert driver.call("copy 1 2 3 4") == [0, 7, 8, 9, 10]
        assert driver.call("writeback") == 0


# --- arguments, ends ---


@pytest.mark.parametrize("way", WAYS)
def test_c10_what_lies_past_the_end_is_einval(shared: Mount, program: Path, way: str) -> None:
    with opened(program, shared.path / "a", WAYS[way]) as driver:
        for line in (
            "store 64 1 1 0", "store 63 2 1 0", "store -1 1 1 0", "store -1 2 1 0", "copy 65", "copy 0", "copy 1 0",
            "drop 65", "drop 1 65", "drop 0", "copy 18446744073709551615", "resize 0", "resize -1",
        ):  # fmt: skip
            assert driver.call(line) == -errno.EINVAL, line
        assert driver.call("pages") == 0
        assert driver.call(f"resize {100 * PAGE - 1}") == 0
        assert driver.call("size") == 100 * PAGE
        assert driver.call("store 99 1 1 0") == 100
        assert driver.call(f"resize {PAGE}") == -errno.EINVAL


def test_create_and_open_refuse_what_is_no_backup(shared: Mount, program: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(shared.path)
    with Driver(program, cwd=tmp_path) as driver:
        assert driver.call(f"create {shared.path}/a/ 4096 500") == 0
        assert (shared.path / "a").stat().st_mode & 0o777 == 0o500
        assert driver.call("close") == 0
        for line, error in {
            f"create {shared.path}/a 4096 700": errno.EEXIST,
            f"create {shared.path}/.hidden 4096 700": errno.EPERM,
            f"create {shared.path}/b 4611686018427387904 700": errno.EINVAL,
            f"create {shared.path}/{'x' * 256} 4096 700": errno.ENAMETOOLONG,
            "create a 4096 700": errno.EINVAL,
            "create nowhere/a 4096 700": errno.ENOENT,
            f"open {shared.path}/b 0": errno.ENOENT,
            f"open {shared.path}/a 2": errno.EINVAL,
            f"open {shared.path} 0": errno.EINVAL,
            f"open {tmp_path} 0": errno.EINVAL,
            "open file 0": errno.EINVAL,
        }.items():
            assert driver.call(line) == -error, line
        assert names(shared.path) == ["a"], "one that could not be made whole is not left"
        assert driver.call("create link/c 4096 700") == 0
        assert driver.call("fini") == 0


@pytest.mark.parametrize("way", WAYS)
def test_c13_fini_refuses_every_later_operation(shared: Mount, program: Path, way: str) -> None:
    with (
        opened(program, shared.path / "a", WAYS[way]) as driver,
        Driver(program) as another,
    ):
        assert another.call(f"open {shared.path}/a {WAYS[way]}") == 0
        assert driver.call("store 0 10 1 0") == 10
        os.rename(shared.path / "a", shared.path / "b")
        assert driver.call("fini") == 0
        assert names(shared.path) == []
        for one in driver, another:
            for line in "store 0 1 1 0", "copy 1", "drop 1", "size", "pages", "writeback", f"resize {PAGE}", "fini":
                assert one.call(line) == -errno.ESTALE, line
    assert os.statvfs(shared.path).f_bfree == os.statvfs(shared.path).f_blocks


# --- other users ---


def test_users_reach_what_the_mode_lets_them(place: Place, program: Path) -> None:
    """Alice may do all with her backup, natively; Bob may only read it, through the mount."""
    with (
        place.directory("shared") as directory,
        Mount(directory, "size=16m,allow_other,mode=1777"),
        Driver(program, **as_user(ALICE)) as alice,
        Driver(program, **as_user(BOB)) as bob,
    ):
        assert alice.call(f"create {directory}/a {64 * PAGE} 755") == 0
        assert isinstance(fd := alice.call("fd"), int)
        assert fd > 0
        assert alice.call("store 0 3 1 0") == 3
        assert bob.call(f"open {directory}/a 0") == 0
        assert bob.call("fd") == -errno.EOPNOTSUPP
        assert bob.call("copy 1 2 3") == [0, 1, 2, 3]
        for line in "store 0 1 1 0", "drop 1":
            assert bob.call(line) == -errno.EACCES
        for line in "fini", f"resize {PAGE << 7}":
            assert bob.call(line) in (-errno.EACCES, -errno.EPERM)
        assert alice.call("copy 1 2 3") == [0, 1, 2, 3]
        assert alice.call("fini") == 0


def test_in_a_users_mount_its_user_is_native_and_keeps_that_after_a_restart(place: Place, program: Path) -> None:
    with (
        place.directory("home", ALICE) as directory,
        UsersMount(place, directory, "size=16m") as mount,
        Driver(program, **as_user(ALICE)) as alice,
    ):
        mount.expect_restarts()
        assert alice.call(f"create {directory}/a {64 * PAGE} 700") == 0
        assert isinstance(fd := alice.call("fd"), int)
        assert fd > 0
        assert alice.call("store 0 3 1 0") == 3
        with acting_as(ALICE):
            mount.kill()
        assert alice.call("copy 1 2 3") == [0, 1, 2, 3]
        assert alice.call("fini") == 0


def test_where_the_daemon_counts_pages_all_goes_through_the_mount(
    mountpoint: Path, program: Path, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    for options in "uid_size=16m", f"store={tmp_path / 'store'}":
        with Mount(mountpoint, f"size=64m,{options}"), Driver(program) as driver:
            assert driver.call(f"create {mountpoint}/a {64 * PAGE} 700") == 0
            assert driver.call("fd") == -errno.EOPNOTSUPP
            assert driver.call("store 0 3 1 1") == 3
            assert driver.call("copy 1 2 3") == [0, 1, 2, 3]
            assert driver.call("copy 3 4") == -errno.ENOENT
            assert driver.call("fini") == 0


# --- threads, and the death of the daemon ---


@pytest.mark.parametrize("way", WAYS)
def test_c22_threads_do_not_notice_that_daemons_are_killed(mountpoint: Path, program: Path, way: str) -> None:
    with (
        Mount(mountpoint, "size=64m") as mount,
        opened(program, mountpoint / "a", WAYS[way], 4096 * PAGE) as driver,
    ):
        mount.expect_restarts()
        for kill in range(5):
            driver.send("threads 8 4")
            mount.kill()
            assert mount.restarts() == kill + 1, "the next daemon answers"
            assert driver.answer() == [0]
        assert driver.call("fini") == 0


def test_c22_the_thread_sanitizer_finds_no_race(mountpoint: Path, tmp_path: Path) -> None:
    source = Path(__file__).with_name("c_library_driver.c")
    run(f"cc {STRICT} -g -O1 -fsanitize=thread -I{SOURCE} -pthread -o {tmp_path}/driver {source} {SOURCE}/ttmfs.c")
    with (
        Mount(mountpoint, "size=64m"),
        opened(tmp_path / "driver", mountpoint / "a", THROUGH_THE_MOUNT, 4096 * PAGE) as driver,
    ):
        assert driver.call("threads 8 3") == 0


@pytest.mark.serial
def test_c9_a_signal_ends_a_wait_and_the_page_stays(mountpoint: Path, program: Path, tmp_path: Path) -> None:
    with (
        Mount(mountpoint, "size=64m") as mount,
        opened(program, mountpoint / "a", THROUGH_THE_MOUNT) as driver,
    ):
        with slow_swap(mount.pid, tmp_path) as slow:
            assert driver.call("store 0 64 1 0") == 64
            slow.push_out()
            assert driver.call(f"interrupt 100 {ALL}") == -errno.EINTR
            assert driver.call("pages") == 64
        assert driver.call("copy 1 64") == [0, 1, 64]


def test_a_signal_ends_no_call_but_an_interruptible_copy(mountpoint: Path, program: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with (
        Mount(mountpoint, f"size=64m,store={tmp_path}/store"),
        opened(program, mountpoint / "a", THROUGH_THE_MOUNT, 1024 * PAGE) as driver,
    ):
        assert driver.call("store 0 1024 1 0") == 1024
        assert driver.call("look 1000") == 0
        assert driver.call("fini") == 0


def test_creating_without_descriptors_leaves_nothing(mountpoint: Path, program: Path) -> None:
    with Mount(mountpoint, "size=64m"), Driver(program) as driver:
        for most in range(3, 6):
            assert driver.call(f"descriptors {most}") == 0
            assert driver.call(f"create {mountpoint}/a 0 700") == -errno.EMFILE
            assert names(mountpoint) == []
        assert driver.call("descriptors 1024") == 0
        assert driver.call(f"create {mountpoint}/a 0 700") == 0
