"""The compiled requests do what Python does, and refuse whatever is not plain.

The same requests, as the kernel packs them, go to both forms, each with a pool of its own. Answers, pages and notes
must be the same.
"""

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel import Caller, numbers, packed, split

from ttmfs.fuse.compiled import COMPILED, PYTHON, compiled_requests, loop_of
from ttmfs.fuse.in_flight import InFlight
from ttmfs.fuse.inodes import CONFIG, IMAGE, MAX_HANDLE, READER, ROOT, STATS, inode
from ttmfs.fuse.kernel_cache import KernelCache
from ttmfs.fuse.metrics import Metrics
from ttmfs.fuse.page_cache import PageCache
from ttmfs.fuse.page_requests import PageRequests
from ttmfs.fuse.requests import Failures, Requests
from ttmfs.fuse.tree import Tree
from ttmfs.linux import fuse_protocol as fuse
from ttmfs.linux.fuse_protocol import LARGEST_REQUEST, RESENT, Request
from ttmfs.linux.splice import Splice
from ttmfs.model.pool import Pool
from ttmfs.options import Options
from ttmfs.recovery.state import LATEST, Record, State
from ttmfs.stores import make_store

PAGE = 4096
PAGES = 8
"""The size of the backup, in pages. The first two are stored at the beginning."""

compiled = pytest.importorskip("ttmfs.fuse.compiled_requests")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes backups for other users")


class Form:
    """A mount's requests in one form, over a pool with one backup, "a"."""

    def __init__(self, options: str = "size=1m", *, form: str) -> None:
        parsed = Options.parse(f"{options},backup_size={PAGES * PAGE}")
        self.pool = Pool(make_store(parsed), parsed)
        self.kernel, self.connection = socket.socketpair(type=socket.SOCK_SEQPACKET)
        for end in self.kernel, self.connection:
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        fd = self.connection.fileno()
        self.state, self.metrics = State.new(Record("1", PAGE, PAGE)), Metrics()
        self.cache = KernelCache(fd, (7, 38), self.pool.blocking_io.slices)
        self.tree = Tree(self.pool, {STATS: self._text, CONFIG: self._text}, self.cache, self.state.progress)
        self.shared = self.tree.shared
        self.handlers = PageRequests(self.tree, PageCache(fd, self.state.cached))
        failures = Failures(self.metrics, self.shared.refusals)
        self.splice = Splice(fd)
        self.requests = Requests(self.splice, self.handlers, InFlight(self.state), self.metrics, failures, None)
        self.buffer = memoryview(bytearray(LARGEST_REQUEST))
        self.compiled = None
        if form == COMPILED:
            self.compiled = compiled_requests(fd, self.state, self.handlers, self.metrics, self.buffer)
        self.refused = 0
        """How many requests were left to Python."""
        self.file = trio.run(self.pool.create, "a").file
        self.a = inode(self.file.id, 0)
        self.file.write(0, bytes(range(256)) * (2 * PAGE // 256))
        os.utime(self.file.descriptor, ns=(0, 0))

    async def _text(self) -> bytes:
        return b"{}"

    def close(self) -> None:
        if self.compiled:
            self.compiled.close()
        self.splice.close()
        self.kernel.close()
        self.connection.close()
        self.state.close()
        self.pool.close()

    def send(self, message: bytes) -> tuple[int, bytes] | None:
        """Have a request answered. Returns the errno and the body; None if there is no answer."""
        self.kernel.send(message)
        read = self.compiled.answer_plain if self.compiled else self._read
        length = read()
        if length:
            self.refused += 1
            trio.run(self._carry_out, self.buffer[:length])
        assert not any(self.state.notes[:LATEST])
        if not select.select([self.kernel], [], [], 0)[0]:
            return None
        ((error, unique, body),) = [one for one in split(self.kernel.recv(1 << 20)) if one[1]]
        assert unique == fuse.HEADER.unpack_from(message)[2]
        return -error, body

    def _read(self) -> int:
        return os.readv(self.connection.fileno(), [self.buffer])

    async def _carry_out(self, message: memoryview) -> None:
        request = Request._make(fuse.HEADER.unpack_from(message))
        if request.opcode in (fuse.FORGET, fuse.BATCH_FORGET):
            return
        async with trio.open_nursery() as nursery:
            self.requests.carry_out(message, self.handlers.kinds[request.opcode], request, nursery.start_soon)

    def pages(self) -> bytes:
        """What the backup holds, and where there is data."""
        there = bytes(self.file.holds(idx) for idx in range(PAGES))
        return there + self.file.read(0, PAGES * PAGE)

    def counts(self) -> dict[str, int]:
        """How often each operation was counted."""
        return {name: sum(counts[:-1]) for name, counts in self.metrics.durations.items() if any(counts)}


@contextmanager
def both(options: str = "size=1m") -> Iterator[tuple[Form, Form]]:
    forms = Form(options, form=COMPILED), Form(options, form=PYTHON)
    try:
        yield forms
    finally:
        for form in forms:
            form.close()


@pytest.fixture
def form() -> Iterator[Form]:
    made = Form(form=COMPILED)
    yield made
    made.close()


def create_in(name: bytes, flags: int = os.O_RDWR) -> bytes:
    return fuse.CREATE_IN.pack(flags, 0o644, 0, 0) + name + b"\0"


def read_in(fh: int, offset: int = 0, size: int = PAGE, flags: int = fuse.READ_LOCKOWNER) -> bytes:
    return fuse.READ_IN.pack(fh, offset, size, flags, 0, 0) + bytes(4)


def write_in(fh: int, data: bytes, offset: int = 0, flags: int = os.O_WRONLY, size: int | None = None) -> bytes:
    return fuse.WRITE_IN.pack(fh, offset, len(data) if size is None else size, 0, 0, flags, 0) + data


# --- any sequence ---

NAMES = st.sampled_from(["1", "2", "3", "8", "9", "0", "01", "", "x", "1x", "-1", ".image", "1 ", "9" * 11, "\u0661",
                         str(MAX_HANDLE), str(MAX_HANDLE + 1), str(2**64 + 1), "a" * 256]).map(str.encode)  # fmt: skip
HANDLES = st.sampled_from([1, 1, 2, 3, 8, 9, MAX_HANDLE])
OFFSETS = st.sampled_from([0, 0, 0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 2**63, 2**64 - 1])
SIZES = st.sampled_from([PAGE, PAGE, 0, 1, 100, PAGE - 1, PAGE + 1, 3 * PAGE])
CALLERS = st.sampled_from([Caller(), Caller(pid=7), Caller(uid=1, gid=1), Caller(uid=1000, gid=1000, pid=8)])
WRITE_FLAGS = st.sampled_from([os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND])
DATA = st.tuples(SIZES, st.sampled_from([b"\0", b"x"])).map(lambda found: found[0] * found[1])
Build = Callable[[int], bytes]
"""Makes a request, given the inode number of the backup, which differs between the pools."""


def request_of(opcode: int, handle: int | None, body: Callable[[int], bytes], caller: Any) -> Build:
    unique = next(numbers)

    def build(a: int) -> bytes:
        node = a | (handle or 0)
        return packed(opcode, node, body(node), caller, unique)

    return build


NAMED = {fuse.LOOKUP: b"", fuse.UNLINK: b"", fuse.CREATE: fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0)}


def named(opcode: int, name: bytes, caller: Any) -> Build:
    return request_of(opcode, None, lambda _: NAMED[opcode] + name + b"\0", caller)


REQUESTS = st.one_of(
    st.builds(named, st.sampled_from([*NAMED]), NAMES, CALLERS),
    st.builds(lambda h, c: request_of(fuse.GETATTR, h, lambda _: bytes(16), c), HANDLES, CALLERS),
    st.builds(lambda h, c: request_of(fuse.OPEN, h, lambda _: fuse.OPEN_IN.pack(os.O_RDWR, 0), c), HANDLES, CALLERS),
    st.builds(lambda h, o, s: request_of(fuse.READ, h, lambda fh: read_in(fh, o, s), None), HANDLES, OFFSETS, SIZES),
    st.builds(lambda h, d, o, f: request_of(fuse.WRITE, h, lambda fh: write_in(fh, d, o, f), Caller()),
              HANDLES, DATA, OFFSETS, WRITE_FLAGS),
    st.builds(lambda h: request_of(fuse.RELEASE, h, lambda fh: fuse.RELEASE_IN.pack(fh) + bytes(16), None), HANDLES),
    st.builds(lambda h: request_of(fuse.FORGET, h, lambda _: bytes(8), None), HANDLES),
)  # fmt: skip


def without_times_and_numbers(answer: tuple[int, bytes] | None, form: Form) -> Any:
    """An answer without what may differ between two pools: moments of changes, and the backup's id."""
    if answer is None:
        return None
    body = answer[1]
    for layout, at in (fuse.ENTRY, 5 + 1), (fuse.ATTR, 3):
        if len(body) in (layout.size, layout.size + fuse.OPENED.size) and layout is not fuse.OPENED:
            fields = list(layout.unpack_from(body))
            times = [at + 3, at + 4, at + 5, at + 6, at + 7, at + 8] if layout is fuse.ATTR else [*range(9, 15)]
            for field in times:
                fields[field] = bool(fields[field])
            return answer[0], strip(fields, form), body[layout.size + 8 :]
    if len(body) == fuse.OPENED.size:
        return answer[0], strip(list(fuse.OPENED.unpack(body)), form)
    return answer


def strip(fields: list[int], form: Form) -> list[int]:
    return [field ^ form.a if field >> 30 == form.a >> 30 else field for field in fields]


@settings(max_examples=150, deadline=None)
@given(st.lists(REQUESTS, max_size=20))
def test_both_forms_answer_the_same_and_store_the_same(sequence: list[Build]) -> None:
    with both() as (one, other):
        for build in sequence:
            answers = [form.send(build(form.a)) for form in (one, other)]
            assert without_times_and_numbers(answers[0], one) == without_times_and_numbers(answers[1], other)
            assert one.pages() == other.pages()
            noted, expected = (form.state.noted_answer() for form in (one, other))
            assert noted.keys() == expected.keys()
            assert [*map(len, noted.values())] == [*map(len, expected.values())]
        assert one.counts() == other.counts()
        assert {block ^ one.a >> 6 for block in one.cache._blocks} == {b ^ other.a >> 6 for b in other.cache._blocks}


def test_attributes_are_those_of_the_backups_file(form: Form) -> None:
    os.utime(form.file.descriptor, ns=(-1_500_000_000, 1_234_567_890_123_456_789))
    os.fchmod(form.file.descriptor, 0o751)
    error, body = form.send(packed(fuse.GETATTR, form.a | 1, bytes(16))) or (1, b"")
    assert not error
    assert not form.refused
    found = os.fstat(form.file.descriptor)
    (atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode) = fuse.ATTR.unpack(body)[6:13]
    assert (atime - 2**64) * 10**9 + atime_ns == found.st_atime_ns == -1_500_000_000
    assert mtime * 10**9 + mtime_ns == found.st_mtime_ns
    assert ctime * 10**9 + ctime_ns == found.st_ctime_ns
    assert mode == 0o100640


# --- what is plain ---


def plain_requests(a: int) -> dict[str, bytes]:
    page = a | 1
    return {
        "lookup": packed(fuse.LOOKUP, a, b"1\0"),
        "lookup of an absent page": packed(fuse.LOOKUP, a, b"5\0"),
        "getattr": packed(fuse.GETATTR, page, bytes(16)),
        "open": packed(fuse.OPEN, page, fuse.OPEN_IN.pack(os.O_RDWR, 0)),
        "create": packed(fuse.CREATE, a, create_in(b"5")),
        "create of a page that exists": packed(fuse.CREATE, a, create_in(b"1")),
        "read": packed(fuse.READ, page, read_in(page)),
        "write": packed(fuse.WRITE, page, write_in(page, b"x" * PAGE)),
        "release": packed(fuse.RELEASE, page, fuse.RELEASE_IN.pack(page) + bytes(16)),
        "unlink": packed(fuse.UNLINK, a, b"1\0"),
        "forget": packed(fuse.FORGET, page, bytes(8)),
    }


PLAIN = [*plain_requests(0)]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_requests_are_answered_without_python(form: Form, name: str) -> None:
    answer = form.send(plain_requests(form.a)[name])
    assert not form.refused
    assert answer is None if name == "forget" else answer and not answer[0]


def test_requests_are_answered_as_long_as_there_are_any(form: Form) -> None:
    assert form.compiled
    requests = plain_requests(form.a)
    for name in PLAIN:
        form.kernel.send(requests[name])
    form.kernel.send(odd := packed(fuse.LOOKUP, ROOT, b"a\0"))
    assert form.compiled.answer_plain() == len(odd)
    assert form.compiled.answer_plain() is None


def test_waiting_goes_on_until_something_else_is_to_be_done(form: Form) -> None:
    assert form.compiled
    with select.epoll() as epoll:
        epoll.register(form.connection, select.EPOLLIN)
        other, writer = os.pipe()
        epoll.register(other, select.EPOLLIN)
        requests = plain_requests(form.a)
        for name in PLAIN:
            form.kernel.send(requests[name])
        form.kernel.send(odd := packed(fuse.LOOKUP, ROOT, b"a\0"))
        assert form.compiled.wait(epoll.fileno(), 5.0) == len(odd)
        assert form.compiled.wait(epoll.fileno(), 0.01) is None, "nothing came"
        os.close(writer)
        form.kernel.send(requests["lookup"])
        assert form.compiled.wait(epoll.fileno(), 5.0) is None, "the other file is ready"
        assert form.compiled.answer_plain() == 0
        os.close(other)


# --- what is not ---

CHANGES = {"create", "create of a page that exists", "write", "unlink"}


def test_a_request_that_was_sent_again_is_left_to_python(form: Form) -> None:
    for name, message in plain_requests(form.a).items():
        again = bytearray(message)
        struct.pack_into("=Q", again, 8, struct.unpack_from("=Q", again, 8)[0] | RESENT)
        before = form.refused
        form.send(bytes(again))
        assert form.refused == before + (name != "forget"), name


def test_changes_are_left_to_python_while_the_kernel_may_have_bytes_cached(form: Form) -> None:
    form.handlers.page_cache.note(inode(77, IMAGE))  # of another backup, so that nothing is to be forgotten
    for name, message in plain_requests(form.a).items():
        before = form.refused
        form.send(message)
        assert form.refused == before + (name in CHANGES), name


def test_calls_by_a_thread_that_may_retry_are_left_to_python(form: Form) -> None:
    form.shared.retries.forgives(form.a | 7, Caller().pid, 0)
    for name, message in plain_requests(form.a).items():
        before = form.refused
        form.send(message)
        assert form.refused <= before + name.startswith(("lookup", "create", "unlink")), name
    assert form.refused


def use_up_the_reserve(form: Form) -> None:
    reserve = form.pool.store._reserve
    assert reserve
    reserve.size, reserve._left = 1 << 60, 0


@pytest.mark.parametrize(
    ("name", "unusual"),
    [
        ("unlink", lambda form: form.shared.bulk_drops.note(form.file.id)),
        ("unlink", lambda form: form.shared.runs.__setitem__(form.a, (0, 2, 1e9))),
        ("open", lambda form: form.shared.mode_changes.note()),
        ("create", use_up_the_reserve),
        ("create", lambda form: os.ftruncate(form.file.descriptor, PAGE)),
        ("read", lambda form: os.ftruncate(form.file.descriptor, 100)),
        ("write", lambda form: os.ftruncate(form.file.descriptor, 100)),
        ("getattr", lambda form: form.file.drop_range(0, 1)),
        ("open", lambda form: form.file.drop_range(0, 1)),
        ("read", lambda form: form.file.drop_range(0, 1)),
        ("write", lambda form: form.file.drop_range(0, 1)),
        *((name, lambda form: form.pool.files.remove(form.file.id)) for name in {*PLAIN} - {"forget", "release"}),
    ],
)  # fmt: skip
def test_an_unusual_state_is_left_to_python(form: Form, name: str, unusual: Callable[[Form], Any]) -> None:
    unusual(form)
    form.send(plain_requests(form.a)[name])
    assert form.refused == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda a: packed(fuse.READ, a | 1, read_in(a | 1, flags=0)),  # for the page cache
        lambda a: packed(fuse.READ, a | 1, read_in(a | 1 | READER)),
        lambda a: packed(fuse.READ, a | 1, read_in(a | 2)),
        lambda a: packed(fuse.READ, a | 1, read_in(a | 1, size=0)),
        lambda a: packed(fuse.READ, a | IMAGE, read_in(a | IMAGE)),
        lambda a: packed(fuse.WRITE, a | 1, write_in(a | 1, b"x", flags=os.O_WRONLY | os.O_DSYNC)),
        lambda a: packed(fuse.WRITE, a | 1, write_in(a | 1, b"x", flags=os.O_WRONLY | os.O_APPEND)),
        lambda a: packed(fuse.WRITE, a | 1, write_in(a | 1, b"")),
        lambda a: packed(fuse.WRITE, a | 1, write_in(a | 1, b"x" * PAGE, offset=1)),
        lambda a: packed(fuse.WRITE, a | IMAGE, write_in(a | IMAGE, b"x")),
        lambda a: packed(fuse.LOOKUP, a, b"01\0"),
        lambda a: packed(fuse.LOOKUP, a, b".image\0"),
        lambda _: packed(fuse.LOOKUP, ROOT, b"1\0"),
        lambda a: packed(fuse.GETATTR, a, bytes(16)),
        lambda _: packed(fuse.GETATTR, ROOT, bytes(16)),
        lambda a: packed(fuse.GETATTR, a | IMAGE, bytes(16)),
        lambda a: packed(fuse.CREATE, a, create_in(b"9")),  # past the end
        lambda a: packed(fuse.CREATE, a, create_in(b"x")),
        lambda a: packed(fuse.RELEASE, a | IMAGE, fuse.RELEASE_IN.pack(a | IMAGE) + bytes(16)),
        lambda _: packed(fuse.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o755, 0) + b"b\0"),
    ],
)
def test_an_unusual_request_is_left_to_python(form: Form, build: Build) -> None:
    form.send(build(form.a))
    assert form.refused == 1


@needs_root
@pytest.mark.parametrize(("uid", "mode", "plain"), [(1000, 0o600, True), (1000, 0o400, False), (1001, 0o666, False)])
def test_create_is_plain_for_root_and_for_the_owner(form: Form, uid: int, mode: int, plain: bool) -> None:
    os.fchown(form.file.descriptor, 1000, 1000)
    os.fchmod(form.file.descriptor, mode)
    form.send(packed(fuse.CREATE, form.a, create_in(b"5"), Caller(uid=uid, gid=1)))
    assert form.refused == (not plain)


@pytest.mark.parametrize(
    "options", ["size=1m,page_size=64k,backup_size=64k", "size=1m,uid_size=512k", "store={store},size=1m"]
)
def test_other_pools_are_served_by_python(options: str, tmp_path: Any) -> None:
    parsed = Options.parse(options.format(store=tmp_path))
    pool = Pool(make_store(parsed), parsed)
    try:
        assert loop_of(pool) == PYTHON
    finally:
        pool.close()


def test_the_environment_chooses_python(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TTMFS_LOOP", raising=False)
    assert loop_of(form.pool) == COMPILED
    monkeypatch.setenv("TTMFS_LOOP", "python")
    assert loop_of(form.pool) == PYTHON


def test_the_buffers_are_given_back(form: Form) -> None:
    assert form.compiled
    form.compiled.close()
    form.compiled.close()
    form.state.close()
