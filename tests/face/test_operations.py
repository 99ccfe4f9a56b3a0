"""All handlers without a kernel: how they translate the model's answers and errors.

Requests are sent as the kernel packs them, to handlers on a real pool. pyfuse3's handlers are called as it calls them.
"""

import errno
import inspect
import logging
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pyfuse3
import pytest
import trio
from kernel import Caller, Kernel, Refused, invalidated

from ttmfs import errors
from ttmfs.fuse import texts
from ttmfs.fuse.in_flight import InFlight
from ttmfs.fuse.inodes import CONFIG, IMAGE, ROOT, SHMEM, STATS, handle_of, inode
from ttmfs.fuse.kernel_cache import BLOCK_BITS, KernelCache
from ttmfs.fuse.metrics import Metrics
from ttmfs.fuse.operations import Operations
from ttmfs.fuse.page_cache import PageCache
from ttmfs.fuse.page_requests import PageRequests
from ttmfs.fuse.requests import Failures, Requests
from ttmfs.fuse.tree import Tree
from ttmfs.linux.fuse_protocol import ENTRY, FOPEN_DIRECT_IO, NOTIFY_INVAL_INODE
from ttmfs.model.pool import Pool
from ttmfs.options import Options
from ttmfs.recovery.state import Record, State
from ttmfs.stores import blocking_io, make_store

PAGE = os.sysconf("SC_PAGE_SIZE")


CTX = Caller()

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups for other users")


class Face(Kernel):
    """The handlers, called and waited for."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.state = State.new(Record("1", 4096, 4096))
        self.metrics = Metrics()
        self.cache = KernelCache(self.connection, (7, 38), pool.blocking_io.slices)
        self.tree = Tree(
            pool,
            {STATS: self.stats, CONFIG: self.config},
            self.cache,
            self.state.progress,
        )
        failures = Failures(self.metrics, self.tree.shared.refusals)
        self.operations = Operations(self.tree, self.metrics, failures)
        self.handlers = PageRequests(self.tree, PageCache(self.connection, self.state.cached))
        self.requests = Requests(self.splice, self.handlers, InFlight(self.state), self.metrics, failures, None)

    async def stats(self) -> bytes:
        return await self.metrics.text(self.operations.pool)

    async def config(self) -> bytes:
        return b"{}"

    def forgotten(self) -> list[int]:
        """The inodes whose attributes the kernel was told to forget since it was last asked."""
        self.said()
        found, self.notified = invalidated(self.notified, NOTIFY_INVAL_INODE), []
        return [ino for ino, _ in found]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        handler = getattr(self.operations, name)

        async def call(arguments: tuple[Any, ...]) -> Any:
            return await handler(*arguments)

        return lambda *arguments: trio.run(call, arguments)


@pytest.fixture
def face() -> Iterator[Face]:
    options = Options.parse("size=1m,backup_size=64k")
    pool = Pool(make_store(options), options)
    face = Face(pool)
    yield face
    face.close()
    face.state.close()
    pool.close()


@pytest.fixture
def a(face: Face) -> int:
    """The inode of a backup with a page at handle 1."""
    made: int = face.mkdir(ROOT, b"a", 0o755, CTX).st_ino
    face.create(made, b"1", 0o644, os.O_RDWR, CTX)
    return made


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """The name of the errno that a handler answers."""
    with pytest.raises((pyfuse3.FUSEError, Refused)) as caught:
        call(*arguments)
    return errno.errorcode[caught.value.errno]  # type: ignore[attr-defined]


LEFT_TO_PYFUSE3 = ["access", "readlink", "symlink", "link", "flush", "statfs", "listxattr", "removexattr"]


@pytest.mark.parametrize("name", LEFT_TO_PYFUSE3)
def test_every_handler_of_pyfuse3_goes_through_the_wrapper(name: str) -> None:
    assert hasattr(vars(Operations)[name], "__wrapped__")


def test_every_possible_request_has_a_handler(face: Face) -> None:
    """For other requests pyfuse3 answers ENOSYS, and the kernel then handles them itself."""
    asked = {name for name, f in vars(pyfuse3.Operations).items() if inspect.iscoroutinefunction(f)}
    own = {kind.name for kind in face.handlers.kinds.values()}
    assert asked - own - set(LEFT_TO_PYFUSE3) == {"poll", "forget"}
    assert not own & set(LEFT_TO_PYFUSE3)


ASKING = [
    "lookup", "getattr", "setattr", "mkdir", "rmdir", "unlink", "mknod", "create", "rename", "open", "read", "write",
    "lseek", "fallocate", "fsync", "release", "opendir", "readdir", "releasedir", "fsyncdir", "getxattr", "setxattr",
    "access", "readlink", "statfs", "removexattr",
]  # fmt: skip
"""The handlers that ask the model."""


@pytest.mark.parametrize("name", ASKING)
def test_every_model_error_is_answered_with_its_errno(face: Face, a: int, name: str) -> None:
    for kind in set(errors.ERRNO) - {errors.StoreFailed}:

        def refuse(*_: Any, kind: type[errors.TtmfsError] = kind, **__: Any) -> Any:
            raise kind("refused")

        before = face.metrics.errors[name, errors.ERRNO[kind]]
        assert run_with_broken_model(face, a, name, refuse) == errno.errorcode[errors.ERRNO[kind]]
        assert face.metrics.errors[name, errors.ERRNO[kind]] == before + 1


def run_with_broken_model(face: Face, a: int, name: str, broken: Callable[..., Any]) -> str:
    """Call a handler whose model is replaced. Returns the name of the errno that it answers."""
    for finder in "node", "directory", "file":
        setattr(face.tree, finder, broken)
    face.operations.pool = BrokenPool(broken)  # type: ignore[assignment]
    arguments: dict[str, tuple[Any, ...]] = {
        "lookup": (a, b"1"),
        "access": (a, os.X_OK, CTX),
        "mkdir": (ROOT, b"b", 0o755),
        "rmdir": (ROOT, b"a"),
        "unlink": (a, b"1"),
        "mknod": (a, b"2", stat.S_IFREG, 0),
        "create": (a, b"2", 0o644, 0),
        "rename": (ROOT, b"a", ROOT, b"b", 0),
        "read": (a + 1, 0, 10),
        "write": (a + 1, 0, b"x"),
        "open": (a + 1, 0),
        "lseek": (a + 1, 0, os.SEEK_DATA),
        "fallocate": (a + 1, 0, 0, 10),
        "readdir": (a, 0),
        "statfs": (CTX,),
        "readlink": (a, CTX),
        "getxattr": (a, b"user.x"),
        "setxattr": (a, b"user.x", b"1"),
        "removexattr": (a, b"user.x", CTX),
    }
    return refusal(getattr(face, name), *arguments.get(name, (a,)))


class BrokenPool:
    page_size = PAGE

    def __init__(self, broken: Callable[..., Any]) -> None:
        self.room = broken


@pytest.mark.parametrize("name", ASKING)
def test_an_unforeseen_exception_is_eio_and_logs_a_traceback(
    face: Face, a: int, name: str, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("failed unforeseen")

    def burst(*_: Any, **__: Any) -> Any:
        raise RuntimeError("nobody foresaw this")

    for _ in range(3):
        assert run_with_broken_model(face, a, name, burst) == "EIO"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "nobody foresaw this" in caplog.text
    assert "Traceback" in caplog.text


def test_the_log_shows_no_page_content(
    face: Face, a: int, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("failed unforeseen")
    face.tree.file = lambda _: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    assert refusal(face.write, a + 1, 0, b"secret") == "EIO"
    assert "write(" in caplog.text
    assert "secret" not in caplog.text


def test_a_failing_store_is_logged_once(
    face: Face, a: int, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("get EIO")

    def fail(*_: Any, **__: Any) -> Any:
        raise errors.from_os_error(OSError(errno.EIO, os.strerror(errno.EIO)), "storing pages")

    for _ in range(3):
        assert run_with_broken_model(face, a, "write", fail) == "EIO"
    assert [r.getMessage() for r in caplog.records] == [
        "storing pages: Input/output error; callers of write get EIO (logged once)"
    ]
    assert face.metrics.errors["write", errno.EIO] == 3


def test_forget_never_raises(face: Face) -> None:
    face.forget([(1, 1), (2**64 - 1, 5), (0, 0)])


def test_flush_is_answered_so_that_the_kernel_stops_sending_it(face: Face, a: int) -> None:
    assert refusal(face.flush, a + 1) == "ENOSYS"
    assert not face.metrics.errors


def test_only_existing_names_and_attributes_have_a_cache_lifetime(face: Face, a: int) -> None:
    entry = face.lookup(a, b"1", CTX)
    assert (entry.entry_timeout, entry.attr_timeout) == (1.0, 1.0)
    absent = face.lookup(a, b"2", CTX)
    assert (absent.st_ino, absent.entry_timeout, absent.attr_timeout) == (0, 0.0, 0.0), "inode 0: there is none"


def test_every_open_file_has_direct_io(face: Face, a: int) -> None:
    for ino in a + 1, inode(a >> 30, IMAGE), STATS, CONFIG:
        info = face.open(ino, os.O_RDONLY, CTX)
        assert info.flags == FOPEN_DIRECT_IO


@needs_root
def test_attributes_of_every_kind_of_entry(face: Face) -> None:
    b = face.mkdir(ROOT, b"b", 0o2750, Caller(uid=12, gid=34)).st_ino
    face.mknod(b, b"1", stat.S_IFREG | 0o777, 0, CTX)
    link = len(face.readlink(b + SHMEM, CTX))
    for ino, mode, owner, size, blocks in (
        (ROOT, stat.S_IFDIR | 0o755, 0, 0, 0),
        (CONFIG, stat.S_IFREG | 0o444, 0, len("{}"), 0),
        (b, stat.S_IFDIR | 0o2750, 12, 0, 0),
        (b + 1, stat.S_IFREG | 0o640, 12, PAGE, PAGE // 512),
        (b + IMAGE, stat.S_IFREG | 0o640, 12, 64 << 10, PAGE // 512),
        (b + SHMEM, stat.S_IFLNK | 0o777, 12, link, 0),
    ):
        entry = face.getattr(ino, CTX)
        found = (entry.st_ino, entry.st_mode, entry.st_uid, entry.st_size, entry.st_blocks)
        assert found == (ino, mode, owner, size, blocks)
        assert entry.st_blksize == PAGE


@pytest.mark.parametrize("plus", [False, True])
def test_a_listing_continues_where_the_kernel_stopped(face: Face, a: int, plus: bool) -> None:
    """The kernel asks again with the offset of the last entry that fitted.

    Pages may be stored and dropped in between.
    """
    for handle in range(2, 11):
        face.create(a, b"%d" % handle, 0o644, 0)
    seen: list[bytes] = []
    found: list[tuple[bytes, int, int]] = []
    fh, offset, room = face.opendir(a), 0, 3 * (ENTRY.size * plus + 32)
    for call in range(8):
        found = face.readdir(fh, offset, room, plus=plus)
        for name, ino, offset in found:  # noqa: B007 # the last one is needed
            assert ino == {b".": a, b"..": ROOT}.get(name, a + int(name.strip(b".") or 0))
            seen.append(name)
        if call == 1:  # it has come to 4
            face.unlink(a, b"2")
            face.unlink(a, b"8")
            face.create(a, b"12", 0o644, 0)
            face.setxattr(a, b"user.ttmfs.drop", b"6-7")
    assert not found, "the last calls find nothing more"
    face.releasedir(fh)
    assert seen == [b".", b"..", b"1", b"2", b"3", b"4", b"5", b"9", b"10", b"12"]


def test_a_listing_is_complete_for_any_reply_size(face: Face, a: int) -> None:
    for handle in range(2, 17):
        face.create(a, b"%d" % handle, 0o644, os.O_RDWR)
    for room in 32, 64, 1000, 1 << 16:
        fh, offset, taken = face.opendir(a), 0, []
        while found := face.readdir(fh, offset, room):
            taken += [name for name, _, _ in found]
            offset = found[-1][2]
        assert taken == [b".", b"..", *(b"%d" % handle for handle in range(1, 17))]
        face.releasedir(fh)


def test_a_map_is_made_in_slices_and_continues_after_each(face: Face, a: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttmfs.stores.time_slices.SLICE_SECONDS", -1.0)
    for handle in (3, 4, 7):
        face.create(a, b"%d" % handle, 0o644, os.O_RDWR, CTX)
    assert face.getxattr(a, b"user.ttmfs.map", CTX) == b"1,3-4,7"
    assert face.getxattr(a, b"user.ttmfs.resident", CTX) == b"4"
    assert face.getxattr(a, b"user.ttmfs.swapped", CTX) == b"0"


@needs_root
def test_a_repeated_request_succeeds_like_the_first(face: Face, a: int) -> None:
    """A request that is carried out a second time succeeds: its first answer may have died with a daemon."""
    again = face.mkdir(ROOT, b"a", 0o700, Caller(uid=5))
    assert (again.st_ino, again.attr.st_mode & 0o7777, again.attr.st_uid) == (a, 0o755, 0)
    face.write(a + 1, 0, b"written")
    info, entry = face.create(a, b"1", 0o644, os.O_RDWR | os.O_TRUNC, CTX)
    assert entry.st_ino == a + 1
    assert face.read(info.fh, 0, 7) == b"written", "create never changes a page that is there"
    for _ in range(2):
        face.unlink(a, b"1", CTX)
    for _ in range(2):
        face.rename(ROOT, b"a", ROOT, b"b", 0, CTX)
    for _ in range(2):
        face.rmdir(ROOT, b"b", CTX)
    assert refusal(face.rename, ROOT, b"a", ROOT, b"c", 0, CTX) == "ENOENT"


def test_the_kernel_is_notified_only_of_pages_that_it_knows(face: Face, a: int) -> None:
    """A page that another request changes or drops is notified if any answer gave the kernel its attributes."""

    def told(*handles: int) -> None:
        """Check that the kernel forgets these pages, and otherwise only pages of the same blocks."""
        inodes = {ino for ino in face.forgotten() if handle_of(ino)}
        assert inodes >= {a + handle for handle in handles}
        assert {ino >> BLOCK_BITS for ino in inodes} == {a + handle >> BLOCK_BITS for handle in handles}

    b = face.mkdir(ROOT, b"b", 0o755, CTX).st_ino
    for handle in 1, 15:
        face.create(b, b"%d" % handle, 0o644, 0, CTX)
    face.unlink(a, b"1", CTX)
    assert face.forgotten() == [], "of what it asked for itself it knows"
    face.setxattr(a, b"user.ttmfs.drop", b"1-3", CTX)
    assert set(face.forgotten()) == {a, a + 1, a + 2, a + 3}
    for tell in (
        lambda: face.lookup(a, b"1", CTX),
        lambda: face.getattr(a + 1, CTX),
        lambda: face.readdir(face.opendir(a, CTX), 0, plus=True),
        lambda: face.mknod(a, b"1", stat.S_IFREG, 0, CTX),
    ):
        face.mknod(a, b"1", stat.S_IFREG, 0, CTX)
        trio.run(face.cache.expire_pages, a >> 30)  # what it knew before
        face.forgotten()
        tell()
        face.setattr(a, mode=0o755)
        trio.run(face.cache.expire_pages, a >> 30)
        told(1)
    tell()
    face.setattr(inode(a >> 30, IMAGE), size=0)
    told(1)
    face.setattr(inode(a >> 30, IMAGE), size=0)
    assert face.forgotten() == [a], "the directory's times; of the pages it was told already"
    face.setattr(ROOT, mode=0o700)
    assert set(face.forgotten()) == {STATS, CONFIG}, "which belong to whom the root belongs to"


def test_attributes_that_change_without_the_kernel_are_not_cached(face: Face, a: int) -> None:
    """Storing and dropping pages changes .image, and a write changes the backup. The kernel does not notice either."""
    for name in b".image", b".shmem":
        entry = face.lookup(a, name, CTX)
        assert (entry.entry_timeout, entry.attr_timeout) == (0, 0)
    face.opendir(a, CTX)
    assert face.forgotten() == [a]


@pytest.mark.parametrize("handle", [1, 2, 15])
def test_reading_past_a_page_finds_its_end(face: Face, a: int, handle: int) -> None:
    face.create(a, b"%d" % handle, 0o644, 0, CTX)
    for offset in PAGE, PAGE + 1, 2**62, 2**63 - 2, 2**63 - 1:
        assert face.read(a + handle, offset, 10) == b""
    assert refusal(face.write, a + handle, 2**63 - 2, b"x") == "EFBIG"


def test_reads_of_an_open_text_return_one_version(face: Face, a: int) -> None:
    """The counters change while a reader is half way through."""
    fh = face.open(STATS, os.O_RDONLY, CTX).fh
    text = face.read(fh, 0, 1000)
    for _ in range(200):
        face.getattr(a, CTX)
    while chunk := face.read(fh, len(text), 100):
        text += chunk
    assert b'ttmfs_operation_duration_seconds_count{operation="getattr"} 200' not in text
    assert text.endswith(b"\n")
    assert face.read(fh, 0, 100_000) == text
    assert face.getattr(STATS, CTX).st_size == len(text)
    assert refusal(face.open, STATS, os.O_RDWR, CTX) == "EACCES"
    again = face.open(STATS, os.O_RDONLY, CTX).fh
    assert face.read(again, 0, 100_000) != text
    face.release(fh)
    face.release(again)
    assert not face.tree.texts._open


def test_reading_on_in_a_lost_text_is_refused(face: Face) -> None:
    """After a restart the file is still open, but the new daemon does not have its text."""
    fh = face.open(STATS, os.O_RDONLY, CTX).fh
    text = face.read(fh, 0, 100_000)
    face.release(fh)
    assert refusal(face.read, fh, 100, 100) == "ESTALE"
    assert refusal(face.read, fh, len(text), 100) == "ESTALE"
    assert face.read(fh, 0, 100)
    assert face.read(fh, 100, 100_000).startswith(face.read(fh, 100, 10))
    assert face.read(fh, 0, 100_000).endswith(b"\n")
    face.release(fh)


def test_open_texts_of_one_user_do_not_evict_those_of_another(face: Face) -> None:
    other: Any = Caller(uid=1)
    kept = face.open(CONFIG, os.O_RDONLY, other).fh
    opened = [face.open(STATS, os.O_RDONLY, CTX).fh for _ in range(texts.MOST_TEXTS + 10)]
    assert len(face.tree.texts._open) == texts.MOST_TEXTS
    assert face.read(kept, 1, 10) == b"}"
    assert face.read(opened[-1], 1, 10)
    assert refusal(face.read, opened[0], 1, 10) == "ESTALE"


def test_the_memory_for_open_files_is_bounded(face: Face, a: int) -> None:
    """A million opendirs must not make the daemon grow."""
    for _ in range(300):
        fh = face.open(STATS, os.O_RDONLY, CTX).fh
        face.read(fh, 0, 10)
        face.readdir(face.opendir(a, CTX), 0)
    assert len(face.tree.texts._open) == texts.MOST_TEXTS
    assert len(face.tree.shared.runs) == 64


@pytest.mark.usefixtures("a")
def test_statfs_counts_in_pages(face: Face) -> None:
    answer = face.statfs(CTX)
    assert (answer.f_bsize, answer.f_frsize, answer.f_blocks) == (PAGE, PAGE, (1 << 20) // PAGE)
    assert answer.f_bfree == answer.f_bavail == answer.f_blocks - 1
    assert answer.f_files - answer.f_ffree == 2


def test_metrics_count_operations_and_errors(face: Face, a: int) -> None:
    face.lookup(a, b"7", CTX)
    refusal(face.getattr, a + 7, CTX)
    text = trio.run(face.stats).decode()
    assert 'ttmfs_operation_duration_seconds_count{operation="lookup"} 1\n' in text
    assert 'ttmfs_operation_errors_total{operation="getattr",errno="ESTALE"} 1\n' in text
    assert 'operation="lookup",errno' not in text, "to find no page is no error"
    assert 'ttmfs_pages{state="resident"} 1\n' in text


def test_a_write_that_waits_for_writeback_counts_for_its_owner(
    face: Face, a: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is stored."""
    fh = face.open(a | IMAGE, os.O_RDWR | os.O_SYNC).fh
    assert face.write(fh, 0, b"old", os.O_SYNC) == 3
    monkeypatch.setattr(blocking_io, "MAX_PENDING", 4)
    assert refusal(face.write, fh, 0, b"new", os.O_SYNC) == "ENOMEM"
    assert face.read(fh, 0, 3) == b"old"
    assert face.write(fh, 0, b"ne", os.O_SYNC) == 2


def test_no_owner_can_occupy_all_threads_of_a_kind() -> None:
    async def first_to_work() -> list[int]:
        limit, order = blocking_io.LimitPerOwner(3, 10), list[int]()

        async def work(owner: int) -> None:
            async with limit.turn(owner):
                order.append(owner)
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            for owner in (1,) * 20 + (2,):
                nursery.start_soon(work, owner)
        return order

    assert 2 in trio.run(first_to_work)[:4]
