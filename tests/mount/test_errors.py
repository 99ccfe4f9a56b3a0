"""Every error of the mount, one by one. Then random bytes everywhere: no other errno, and nothing lost."""

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from errno import (
    E2BIG,
    EACCES,
    EBUSY,
    EEXIST,
    EFBIG,
    EINVAL,
    EIO,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENODATA,
    ENOENT,
    ENOSPC,
    ENOTDIR,
    ENOTEMPTY,
    EOPNOTSUPP,
    EPERM,
    ERANGE,
    ESTALE,
    EXDEV,
    errorcode,
)  # fmt: skip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import Mount, opened, raises_errno, run, wait_until
from ttmfs.fuse.directories import BackupDirectory, Root
from ttmfs.fuse.xattrs import XATTRS

PAGE = mmap.PAGESIZE
PAGES = 64  # that a backup spans here
STORED = 4  # that are there at first
MAX_HANDLE = 2**30 - 3
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One mount for the module. At its end its log must hold the lines of a normal life and nothing else."""
    with Mount(tmp_path_factory.mktemp("errors"), f"size=8m,backup_size={PAGES * PAGE}") as mounted:
        yield mounted.path


def new_backup(root: Path) -> Path:
    path = root / f"backup {next(_serial)}"
    path.mkdir()
    for handle in range(1, STORED + 1):
        (path / str(handle)).write_bytes(bytes([handle]) * PAGE)
    return path


@pytest.fixture
def a(root: Path) -> Iterator[Path]:
    """A new backup with the pages 1 to STORED in it, each full of its handle."""
    path = new_backup(root)
    yield path
    if path.exists():
        os.truncate(path / ".image", 0)
        path.rmdir()


def content(backup: Path) -> dict[str, bytes]:
    return {page.name: page.read_bytes() for page in backup.iterdir()}


INTACT = {str(handle): bytes([handle]) * PAGE for handle in range(1, STORED + 1)}


def read(path: Path) -> None:
    path.read_bytes()


def create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def write_only(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY))


def mknod(path: Path) -> None:
    os.mknod(path, 0o644 | stat.S_IFREG)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix, opened(path.parent, os.O_PATH) as fd:
        unix.bind(f"/proc/self/fd/{fd}/{path.name}")


def renameat2(old: Path | str, new: Path | str, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# --- names that are no page's, looked up and created ---

NO_HANDLES = [
    "0", "00", "01", "+1", "-1", " 1", "1 ", "1\n", "1.0", "1_0", "0x1", "1e3", "\u0661", "\uff11", "a", "*", ".1",
    "...",
    ".images", ".stats", "x" * 255, "\udcff", "1\udcff",
]  # fmt: skip
BEYOND = [PAGES + 1, MAX_HANDLE, MAX_HANDLE + 1, MAX_HANDLE + 2, 2**30, 2**30 + 1, 2**32 + 1, 2**64 + 1, 10**254]


@pytest.mark.parametrize("look", [os.stat, read, os.unlink, lambda p: os.rename(p, p.with_name("9")),
                                  lambda p: os.truncate(p, 0), os.rmdir, write_only])  # fmt: skip
@pytest.mark.parametrize("name", [*NO_HANDLES, *map(str, BEYOND), "5", str(PAGES)], ids=ascii)
def test_looking_up_an_absent_page_is_enoent(a: Path, name: str, look: Callable[[Path], object]) -> None:
    with raises_errno(ENOENT):
        look(a / name)


@pytest.mark.parametrize("make", [create, mknod, lambda p: p.write_bytes(b"x")])
@pytest.mark.parametrize("name", NO_HANDLES, ids=ascii)
def test_creating_a_file_whose_name_is_not_a_handle_is_einval(
    a: Path, name: str, make: Callable[[Path], object]
) -> None:
    with raises_errno(EINVAL):
        make(a / name)
    assert content(a) == INTACT


@pytest.mark.parametrize("make", [create, mknod, lambda p: p.write_bytes(b"x")])
@pytest.mark.parametrize("handle", BEYOND)
def test_c10_creating_a_handle_past_the_size_is_efbig(a: Path, handle: int, make: Callable[[Path], object]) -> None:
    with raises_errno(EFBIG):
        make(a / str(handle))
    assert content(a) == INTACT


def test_c10_the_last_handle_can_be_stored(a: Path) -> None:
    create(a / str(PAGES))
    with raises_errno(EFBIG):
        create(a / str(PAGES + 1))
    assert (a / str(PAGES)).read_bytes() == bytes(PAGE)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_socket, lambda p: os.symlink("/", p),
                                  lambda p: os.mknod(p, 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
                                  lambda p: os.link(p.with_name("1"), p)])  # fmt: skip
@pytest.mark.parametrize("name", ["5", "a", "0", ".x"])
def test_only_pages_can_be_created_in_a_backup(a: Path, name: str, make: Callable[[Path], object]) -> None:
    with raises_errno(EPERM):
        make(a / name)
    assert content(a) == INTACT


# --- the root ---


@pytest.mark.parametrize(
    ("name", "make", "error"),
    [
        ("x", create, EPERM), (".x", create, EPERM), ("1", create, EPERM), ("1", mknod, EPERM), (".x", mknod, EPERM),
        ("x", os.mkfifo, EPERM), ("x", make_socket, EPERM), ("x", lambda p: os.symlink("/", p), EPERM),
        (".x", os.mkdir, EPERM), ("...", os.mkdir, EPERM), (".\n", os.mkdir, EPERM), (".image", os.mkdir, EPERM),
        (".", os.mkdir, EEXIST), ("..", os.mkdir, EEXIST), (".stats", os.mkdir, EEXIST), (".config", os.mkdir, EEXIST),
        ("x" * 256, os.mkdir, ENAMETOOLONG), ("\u00e9" * 128, os.mkdir, ENAMETOOLONG),
         ("x" * 256, os.stat, ENAMETOOLONG),
        ("x", os.stat, ENOENT), ("x", os.rmdir, ENOENT), ("x", os.unlink, ENOENT), (".x", os.stat, ENOENT),
        (".x", os.rmdir, ENOENT), ("x/1", os.stat, ENOENT), (".stats/1", os.stat, ENOTDIR),
    ],
)  # fmt: skip
def test_the_root_refuses_everything_but_backups(
    root: Path, name: str, make: Callable[[Path], object], error: int
) -> None:
    before = os.listdir(root)
    with raises_errno(error):
        make(Path(f"{root}/{name}"))
    assert os.listdir(root) == before


@pytest.mark.parametrize(
    "name",
    [" ", "a b", "-rf", "a\nb", "\n", "\x01\x7f", "*", "'", '"', "\\", "%s", "~", "1", "0", "a.", "a..b",
     "\u65e5\u672c",
     "\u00fcn\u00ef", "e\u0301", "\U0001f4be", "x" * 255, "\u00e9" * 127, "\udcff\udcfe", "\udc80" * 255],
    ids=ascii,
)  # fmt: skip
def test_a_backup_may_have_any_other_name(root: Path, name: str) -> None:
    backup = root / name
    backup.mkdir()
    (backup / "1").write_bytes(b"x" * PAGE)
    assert name in os.listdir(root)
    assert (backup / ".shmem").read_bytes()[:PAGE] == b"x" * PAGE
    backup.rename(root / "plain")
    (root / "plain").rename(backup)
    assert content(backup) == {"1": b"x" * PAGE}
    (backup / "1").unlink()
    backup.rmdir()
    with raises_errno(ENOENT):
        backup.stat()


def test_rmdir_of_a_backup_with_pages_is_enotempty(a: Path) -> None:
    with raises_errno(ENOTEMPTY):
        a.rmdir()
    assert content(a) == INTACT
    (a / ".image").open("wb").close()
    a.rmdir()
    with raises_errno(ENOENT):
        a.stat()


# --- hidden names ---

HIDDEN = [".stats", ".config", "A/.image", "A/.shmem"]


def hidden(a: Path, name: str) -> Path:
    return a / name[2:] if name.startswith("A/") else a.parent / name


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize(
    ("do", "error"),
    [
        (os.unlink, EPERM), (os.rmdir, ENOTDIR), (os.mkdir, EEXIST), (lambda p: os.symlink("/", p), EEXIST),
        (lambda p: os.open(p, os.O_CREAT | os.O_EXCL), EEXIST), (lambda p: os.rename(p, p.with_name("9")), EPERM),
        (lambda p: os.link(p, p.with_name("9"), follow_symlinks=False), EPERM),
        (lambda p: os.chown(p, 1, 1, follow_symlinks=False), EPERM),
    ],
)  # fmt: skip
def test_hidden_names_cannot_be_changed(a: Path, name: str, do: Callable[[Path], object], error: int) -> None:
    with raises_errno(error):
        do(hidden(a, name))
    assert content(a) == INTACT


@pytest.mark.parametrize("name", [".stats", ".config"])
@pytest.mark.parametrize(
    ("do", "error"),
    [(write_only, EACCES), (lambda p: os.open(p, os.O_RDWR), EACCES),
      (lambda p: os.open(p, os.O_WRONLY | os.O_TRUNC), EACCES),
     (lambda p: os.truncate(p, 0), EPERM), (lambda p: p.chmod(0o666), EPERM), (os.utime, EPERM)],
)  # fmt: skip
def test_the_mounts_own_files_can_only_be_read(root: Path, name: str, do: Callable[[Path], object], error: int) -> None:
    with raises_errno(error):
        do(root / name)
    assert len((root / name).read_text()) > 100


def test_no_file_of_a_backup_is_a_link(a: Path) -> None:
    for name in "1", ".image", ".shmem":
        with raises_errno(EINVAL):
            os.readlink(a / name)


# --- renaming ---


@pytest.mark.parametrize(
    ("old", "new", "flags", "error"),
    [
        ("A/1", "A/9", 0, EXDEV), ("A/1", "A/2", 0, EXDEV), ("A/1", "A/x", 0, EXDEV), ("A/1", "A/.image", 0, EXDEV),
        ("A/1", "B/9", 0, EXDEV), ("A/1", "B/1", 0, EXDEV), ("A/1", "new", 0, EXDEV), ("A/1", "OUT/x", 0, EXDEV),
        ("A/1", "A/9", NOREPLACE, EXDEV), ("A/1", "A/2", NOREPLACE, EEXIST), ("A/1", "A/2", EXCHANGE, EINVAL),
        ("A/1", "A/9", WHITEOUT, EINVAL), ("A/9", "A/8", 0, ENOENT), ("A/.image", "A/9", 0, EPERM),
        ("A/.image", "new", 0, EPERM), ("A/.shmem", "B/9", 0, EPERM), ("A/.image", "OUT/x", 0, EXDEV),
        (".stats", "new", 0, EPERM), (".stats", "A/9", 0, EPERM), (".stats", ".config", 0, EPERM),
        ("A", "B", 0, ENOTEMPTY), ("A", "B", NOREPLACE, EEXIST), ("A", "B", EXCHANGE, EINVAL),
         ("A", "new", WHITEOUT, EINVAL),
        ("A", "new", 1 << 4, EINVAL), ("A", "B/9", 0, EPERM), ("A", "B/x", 0, EPERM), ("A", "A/9", 0, EINVAL),
        ("A", "OUT/x", 0, EXDEV), ("A", ".x", 0, EPERM), ("A", ".stats", 0, ENOTDIR), ("A", "B/1", 0, ENOTDIR),
        ("A", "x" * 256, 0, ENAMETOOLONG), ("nothing", "new", 0, ENOENT), ("OUT/file", "A/9", 0, EXDEV),
        ("OUT/file", "new", 0, EXDEV),
    ],
)  # fmt: skip
def test_renames_that_are_refused(a: Path, tmp_path: Path, old: str, new: str, flags: int, error: int) -> None:
    b = new_backup(a.parent)
    (tmp_path / "file").touch()
    places = {"A": a, "B": b, "OUT": tmp_path}

    def path(text: str) -> Path:
        first, _, rest = text.partition("/")
        return places.get(first, a.parent / first) / rest

    before = sorted(os.listdir(a.parent))
    with raises_errno(error):
        renameat2(path(old), path(new), flags)
    assert sorted(os.listdir(a.parent)) == before
    assert content(a) == content(b) == INTACT
    assert (tmp_path / "file").exists()
    os.truncate(b / ".image", 0)
    b.rmdir()


# --- past the end ---


@pytest.mark.parametrize(("name", "end"), [("1", PAGE), (".image", PAGES * PAGE)])
def test_a_write_past_the_end_is_efbig_and_one_across_it_is_short(a: Path, name: str, end: int) -> None:
    with opened(a / name) as fd:
        for offset in (end, end + 1, 2**31, 2**32, 2**40, 2**62):
            with raises_errno(EFBIG):
                os.pwrite(fd, b"x", offset)
            assert os.pread(fd, 10, offset) == b""
        assert os.pwrite(fd, b"y" * 100, end - 10) == 10
        assert os.pread(fd, 100, end - 12)[-10:] == b"y" * 10
        for size in (end + 1, 2**40, 2**62):
            with raises_errno(EFBIG):
                os.ftruncate(fd, size)
        os.ftruncate(fd, end)
        assert os.fstat(fd).st_size == end
    with opened(a / name, os.O_WRONLY | os.O_APPEND) as fd, raises_errno(EFBIG):
        os.write(fd, b"x")
    assert content(a) == INTACT | ({"1": b"\1" * (PAGE - 10) + b"y" * 10} if end == PAGE else
                                   {str(PAGES): bytes(PAGE - 10) + b"y" * 10})  # fmt: skip


# --- ESTALE ---


def remove(a: Path) -> None:
    for handle in range(1, STORED + 1):
        (a / str(handle)).unlink()


def punch(a: Path) -> None:
    run(f"fallocate -p -o 0 -l {STORED * PAGE} '{a}/.shmem'")


def cut(a: Path) -> None:
    os.truncate(a / ".shmem", 0)
    os.truncate(a / ".shmem", PAGES * PAGE)


DROPS: dict[str, Callable[[Path], object]] = {
    "rm": remove,
    "truncate .image": lambda a: os.truncate(a / ".image", 0),
    "O_TRUNC .image": lambda a: (a / ".image").open("wb").close(),
    "drop attribute": lambda a: os.setxattr(a, "user.ttmfs.drop", b"1-3,4"),
    "punched out of .shmem": punch,
    ".shmem cut": cut,
}

USES: dict[str, Callable[[int], object]] = {
    "read": lambda fd: os.pread(fd, PAGE, 0),
    "write": lambda fd: os.pwrite(fd, b"x", 0),
    "truncate": lambda fd: os.ftruncate(fd, 0),
    "chmod": lambda fd: os.fchmod(fd, 0o600),
    "utime": os.utime,
}


def is_stale(fd: int) -> bool:
    """Whether fstat gives ESTALE. (The kernel caches attributes for a second, unless it dropped the page itself.)"""
    number = outcome(lambda: os.fstat(fd))
    assert number in {0, ESTALE}
    return number == ESTALE


@pytest.mark.parametrize("drop", DROPS)
def test_a_descriptor_of_a_dropped_page_is_stale_until_the_page_exists_again(a: Path, drop: str) -> None:
    with contextlib.ExitStack() as stack:
        first, last = (stack.enter_context(opened(a / str(handle))) for handle in (1, STORED))
        os.fstat(first)
        DROPS[drop](a)
        if drop == "rm":
            assert is_stale(first)
        wait_until(lambda: is_stale(first), "fstat to say ESTALE", 3)
        for fd in (first, last):
            for use in USES.values():
                with raises_errno(ESTALE):
                    use(fd)
        os.fsync(first)  # nothing is left to be written
        assert content(a) == {}, "none of it brought a page back"
        (a / "1").write_bytes(b"new" * 1000)
        assert os.pread(first, 3000, 0) == b"new" * 1000
        assert os.fstat(first).st_size == PAGE
        assert os.pwrite(first, b"N", 0) == 1
        assert (a / "1").read_bytes()[:3] == b"New"
        with raises_errno(ESTALE):
            os.pread(last, 1, 0)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("use", [read, write_only, lambda p: os.truncate(p, 0)])
def test_c11_a_path_of_a_dropped_page_is_enoent_not_estale(a: Path, drop: str, use: Callable[[Path], object]) -> None:
    (a / "1").stat()  # the kernel knows the name for a second from now on, whoever drops the page
    DROPS[drop](a)
    with raises_errno(ENOENT):
        use(a / "1")


@pytest.mark.parametrize("drop", [d for d in DROPS if "shmem" not in d])
def test_a_page_dropped_through_the_mount_is_invisible_at_once(a: Path, drop: str) -> None:
    (a / "1").stat()
    DROPS[drop](a)
    with raises_errno(ENOENT):
        (a / "1").stat()


@pytest.mark.parametrize("drop", [d for d in DROPS if "shmem" in d])
def test_a_page_dropped_through_shmem_is_invisible_after_a_second(a: Path, drop: str) -> None:
    (a / "1").stat()
    DROPS[drop](a)
    wait_until(lambda: not (a / "1").exists(), "the name to go", 2)


def rmdir(a: Path) -> None:
    os.truncate(a / ".image", 0)
    a.rmdir()


def replace(a: Path) -> None:
    os.truncate(a / ".image", 0)
    other = new_backup(a.parent)
    other.rename(a)


DIRECTORY_USES: list[Callable[[int], object]] = [
    os.fstat,
    os.listdir,
    lambda fd: os.fchmod(fd, 0o700),
    lambda fd: os.getxattr(fd, "user.ttmfs.pages"),
    lambda fd: os.setxattr(fd, "user.ttmfs.drop", b"1"),
]


@pytest.mark.parametrize("ended", [rmdir, replace])
def test_c13_descriptors_of_an_ended_backup_are_stale(a: Path, ended: Callable[[Path], object]) -> None:
    with opened(a / "1") as page, opened(a / ".image") as image, opened(a, os.O_DIRECTORY | os.O_RDONLY) as directory:
        for fd in (page, image, directory):
            os.fstat(fd)
        ended(a)
        for again in range(2):
            for fd in (page, image):
                for use in USES.values():
                    with raises_errno(ESTALE):
                        use(fd)
            for ask in DIRECTORY_USES:
                with raises_errno(ESTALE):
                    ask(directory)
            with raises_errno(ENOENT):  # of a directory that was removed, the kernel itself says so
                os.stat("1", dir_fd=directory)
            with raises_errno(ENOENT):
                os.open("1", os.O_CREAT, dir_fd=directory)
            wait_until(lambda: is_stale(page) and is_stale(image), "fstat to say ESTALE", 3)
            if not again and not a.exists():
                a.mkdir()  # another backup of the same name is another one


# --- extended attributes ---

ROOT_ATTRIBUTES, BACKUP_ATTRIBUTES = (
    [name.decode().removeprefix("user.ttmfs.") for name in XATTRS[node]] for node in (Root, BackupDirectory)
)


@pytest.mark.parametrize(
    ("where", "name", "value", "error"),
    [
        *(("", f"user.ttmfs.{name}", b"1", EPERM) for name in ("bytes_avail", "page_size")),
        *(("A", f"user.ttmfs.{name}", b"1", EPERM) for name in ("pages", "resident", "swapped", "map")),
        *((where, f"user.ttmfs.{name}", b"1", EOPNOTSUPP) for where in ("A/1", "A/.image", ".stats")
          for name in (*ROOT_ATTRIBUTES, *BACKUP_ATTRIBUTES)),
        *((where, name, b"1", EOPNOTSUPP) for where in ("", "A", "A/1") for name in ("user.x", "trusted.x",
        "security.x")),
        ("", "user.ttmfs.pages", b"1", EOPNOTSUPP), ("A", "user.ttmfs.page_size", b"1", EOPNOTSUPP),
        *((where, "user.ttmfs.size", value, EINVAL) for where in ("", "A")
          for value in (b"", b"0", b"-1", b"x", b"1.5.2m", b"1 m", b"\xff", b"\0", b"1\0", b"9" * 30, b"9" * 19 + b"t",
          b"1mm", b"1e6",
                        b"1" * 65536)),
        ("A", "user.ttmfs.size", b"4096", EINVAL), ("", "user.ttmfs.size", b"4096", EINVAL),  # less than what is stored
        ("A", "user.ttmfs.size", b"8191t", EINVAL),
         ("A", "user.ttmfs.size", b"4t", EINVAL),  # more than there are handles
        *(("A", "user.ttmfs.drop", value, EINVAL)
          for value in (b"", b"0", b"01", b"-", b"1-", b"-1", b"2-1", b"1,,2", b"1;2", b"x", b"1,x", b"1 2", b"\xff",
          b"1\0",
                        b"%d" % (PAGES + 1), b"1-%d" % (PAGES + 1), b"1-" + b"9" * 19, b"9" * 100)),
    ],
)  # fmt: skip
def test_attributes_that_cannot_be_set(a: Path, where: str, name: str, value: bytes, error: int) -> None:
    path = a / where[2:] if where[:1] == "A" else a.parent / where
    budget, size = os.getxattr(a.parent, "user.ttmfs.size"), os.getxattr(a, "user.ttmfs.size")
    with raises_errno(error):
        os.setxattr(path, name, value)
    assert os.getxattr(a.parent, "user.ttmfs.size") == budget
    assert os.getxattr(a, "user.ttmfs.size") == size
    assert content(a) == INTACT


def test_attributes_that_cannot_be_read_or_removed(a: Path) -> None:
    for path, names in (a.parent, ROOT_ATTRIBUTES), (a, BACKUP_ATTRIBUTES), (a / "1", []), (a / ".image", []):
        assert os.listxattr(path) == []
        for name in {*ROOT_ATTRIBUTES, *BACKUP_ATTRIBUTES, "x"}:
            with raises_errno(EPERM if name in names else ENODATA):
                os.removexattr(path, f"user.ttmfs.{name}")
            if name in names and name not in ("drop", "move"):
                assert os.getxattr(path, f"user.ttmfs.{name}")
                with raises_errno(EEXIST):
                    os.setxattr(path, f"user.ttmfs.{name}", b"1", os.XATTR_CREATE)
            else:
                with raises_errno(ENODATA):
                    os.getxattr(path, f"user.ttmfs.{name}")
                with raises_errno(ENODATA):
                    os.setxattr(path, f"user.ttmfs.{name}", b"1", os.XATTR_REPLACE)
    assert content(a) == INTACT


def test_a_backup_cannot_be_moved_from_a_store_in_memory(a: Path, tmp_path: Path) -> None:
    with raises_errno(EOPNOTSUPP):
        os.setxattr(a, "user.ttmfs.move", os.fsencode(tmp_path))
    with raises_errno(EINVAL):
        os.setxattr(a, "user.ttmfs.move", b"elsewhere")
    assert content(a) == INTACT


def test_a_map_longer_than_an_attribute_may_be_is_e2big(mountpoint: Path) -> None:
    with Mount(mountpoint, "size=128m") as mount:
        a = mount.path / "a"
        a.mkdir()
        with opened(a / ".image") as fd:
            for idx in range(0, 30000, 2):
                os.pwrite(fd, b"x", idx * PAGE)
        with raises_errno(E2BIG):
            os.getxattr(a, "user.ttmfs.map")
        os.setxattr(a, "user.ttmfs.drop", b"100-30000")
        assert os.getxattr(a, "user.ttmfs.map") == ",".join(map(str, range(1, 100, 2))).encode()


# --- the store fails ---


def test_a_failing_store_gives_eio_logged_once_and_recovers(mount: Mount, backup: Path) -> None:
    """The test takes the daemon's free descriptors away, so that it cannot make another file."""
    (backup / "1").write_bytes(b"x" * PAGE)
    limits = resource.prlimit(mount.pid, resource.RLIMIT_NOFILE)
    mount.expect_log("Too many open files.*logged once")
    taken = os.listdir(f"/proc/{mount.pid}/fd")
    free = next(number for number in itertools.count() if str(number) not in taken)
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    for name in "bcdb":
        with raises_errno(EIO):
            (mount.path / name).mkdir()
    assert (backup / "1").read_bytes() == b"x" * PAGE
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, limits)
    (mount.path / "b").mkdir()
    wait_until(lambda: len(mount.log) == 2, "the log")
    assert sum("Too many open files" in line for line in mount.log) == 1


# --- random bytes for everything ---

RANDOM = settings(max_examples=300, deadline=None, derandomize=True, database=None)
DOCUMENTED = {
    EACCES, EBUSY, EEXIST, EFBIG, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENODATA, ENOENT, ENOSPC, ENOTDIR, ENOTEMPTY,
    EOPNOTSUPP,
    EPERM, ERANGE, ESTALE, EXDEV,
}  # fmt: skip
DIGITS = st.integers(0, 2**66).map(str)
NAMES = st.one_of(
    st.binary(min_size=1, max_size=300).filter(lambda name: not {0, 47} & set(name)).map(os.fsdecode),
    DIGITS,
    st.sampled_from(["1", "2", "9", "b", ".image", ".shmem", ".stats", ".config", ".", "..", ".x"]),
)
EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1, PAGES * PAGE - 1, PAGES * PAGE, 2**31, 2**32, 2**62, 2**63 - 1]
OFFSETS = st.one_of(st.integers(0, PAGES * PAGE + 10), st.sampled_from(EDGES), st.integers(0, 2**63 - 1))
LENGTHS = st.one_of(st.integers(0, 3 * PAGE), st.sampled_from([PAGE, PAGES * PAGE, 2 << 20]))


def outcome(do: Callable[[], object]) -> int:
    """The errno of a call, 0 for none. An undocumented errno fails the test."""
    number = 0
    try:
        do()
    except OSError as error:
        number = error.errno or EIO
    assert number in DOCUMENTED | {0}, f"{errorcode[number]} is not documented"
    return number


@pytest.fixture(scope="module")
def kept(root: Path) -> Path:
    """A backup that no test may change."""
    path = root / "kept"
    path.mkdir()
    for handle in INTACT:
        (path / handle).write_bytes(INTACT[handle])
    return path


@pytest.fixture(scope="module")
def victim(root: Path) -> Path:
    """A backup for the random tests."""
    path = root / "victim"
    path.mkdir()
    return path


def reset(backup: Path) -> None:
    """Empty a backup, and restore its size, which a truncate(2) of its .shmem may have changed."""
    (backup / ".image").open("wb").close()
    os.setxattr(backup, "user.ttmfs.size", b"%d" % (PAGES * PAGE))


@RANDOM
@given(name=NAMES, other=NAMES, in_root=st.booleans(), flags=st.integers(0, 7))
def test_random_names(kept: Path, victim: Path, name: str, other: str, in_root: bool, flags: int) -> None:
    parent = kept.parent if in_root else victim
    path, target = f"{parent}/{name}", f"{parent}/{other}"
    assert outcome(lambda: os.lstat(path)) in {0, ENOENT, ENAMETOOLONG}
    calls: list[Callable[[], object]] = [
        lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
        lambda: os.mkdir(path),
        lambda: os.mkfifo(path),
        lambda: renameat2(path, target, flags),
        lambda: renameat2(target, path, 0),
        lambda: os.truncate(path, 7),
        lambda: os.link(path, target),
        lambda: os.listdir(path),
        lambda: os.rmdir(path),
        lambda: os.unlink(path),
    ]
    for call in calls:
        outcome(call)
    for left in set(os.listdir(kept.parent)) - {kept.name, victim.name}:
        (kept.parent / left).rmdir()
    assert content(kept) == INTACT


@RANDOM
@given(
    name=st.sampled_from([".image", "3"]),
    steps=st.lists(st.tuples(st.sampled_from(["write", "read", "truncate"]), OFFSETS, LENGTHS), max_size=8),
)
def test_c8_random_offsets_and_sizes(kept: Path, victim: Path, name: str, steps: list[tuple[str, int, int]]) -> None:
    """A page and an image answer every request as a file of their size would."""
    size = PAGES * PAGE if name == ".image" else PAGE
    model = bytearray(size)
    reset(victim)
    create(victim / name)
    with opened(victim / name) as fd:
        for serial, (what, offset, length) in enumerate(steps, 1):
            data = bytes([serial]) * length
            end = min(size, offset + length)
            if what == "truncate":
                assert outcome(lambda: os.ftruncate(fd, offset)) == (0 if offset <= size else EFBIG)  # noqa: B023
                model[offset:] = bytes(len(model[offset:]))
            elif offset + length >= 2**63:  # more than an offset can be
                assert outcome(lambda: os.pwrite(fd, data, offset)) == EINVAL  # noqa: B023
                assert outcome(lambda: os.pread(fd, length, offset)) == EINVAL  # noqa: B023
            elif what == "read":
                assert os.pread(fd, length, offset) == model[offset:end]
            elif length and offset >= size:
                assert outcome(lambda: os.pwrite(fd, data, offset)) == EFBIG  # noqa: B023
            else:
                assert os.pwrite(fd, data, offset) == max(0, end - offset)
                model[offset:end] = data[: max(0, end - offset)]
        assert os.pread(fd, size + 1, 0) == model
        assert os.fstat(fd).st_size == size
    assert content(kept) == INTACT


ATTRIBUTES = st.one_of(
    st.sampled_from([f"user.ttmfs.{name}".encode() for name in (*ROOT_ATTRIBUTES, *BACKUP_ATTRIBUTES)]),
    st.binary(min_size=1, max_size=260).filter(lambda name: 0 not in name),
    st.binary(min_size=1, max_size=20).filter(lambda name: 0 not in name).map(lambda name: b"user.ttmfs." + name),
)
VALUES = st.one_of(
    st.binary(max_size=100),
    st.text("0123456789-, kmgt%\n", max_size=12).map(str.encode),
    st.lists(st.tuples(st.integers(0, PAGES + 2), st.integers(0, PAGES + 2)), min_size=1, max_size=5).map(
        lambda pairs: ",".join(f"{first}-{last}" for first, last in pairs).encode()
    ),
)


@RANDOM
@given(where=st.sampled_from(["", "victim", "victim/1", "victim/.image", "victim/.shmem", ".stats"]), name=ATTRIBUTES,
       value=VALUES, flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]))  # fmt: skip
def test_random_attributes(kept: Path, victim: Path, where: str, name: bytes, value: bytes, flags: int) -> None:
    path = kept.parent / where
    reset(victim)
    create(victim / "1")
    outcome(lambda: os.setxattr(path, name, value, flags, follow_symlinks=False))
    outcome(lambda: os.getxattr(path, name, follow_symlinks=False))
    outcome(lambda: os.removexattr(path, name, follow_symlinks=False))
    assert os.listxattr(path, follow_symlinks=False) == []
    assert content(kept) == INTACT
    os.setxattr(kept.parent, "user.ttmfs.size", b"8m")


def test_a_page_cut_short_through_shmem_ends_there_and_then_disappears(backup: Path) -> None:
    """No read or write returns 0, which would make a program try forever."""
    with opened(backup / "1", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"x" * PAGE, 0)
        os.truncate(backup / ".shmem", 100)
        assert os.pread(fd, PAGE, 0) == b"x" * 100
        assert os.pwrite(fd, b"y" * PAGE, 50) == 50
        with raises_errno(errno.EFBIG):
            os.pwrite(fd, b"y", 100)
        assert (backup / ".shmem").stat().st_size == 100
        os.truncate(backup / ".shmem", 0)
        with raises_errno(errno.ESTALE):
            os.pread(fd, PAGE, 0)
        with raises_errno(errno.ESTALE):
            os.pwrite(fd, b"y", 0)
