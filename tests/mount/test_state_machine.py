"""Random operations on a dict, the model layer and a real mount.

After each, all three must agree. Holds C1 to C3, C6, C8, C10 to C14 and C16 for sequences that hypothesis chooses, with
a small budget, for pages of one base page and of sixteen, on every kind of store. Most examples run on the tmpfs. The
other stores get enough examples to find what differs there.
"""

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from stores import Site
from ttmfs.errors import TtmfsError, errno_of
from ttmfs.model.pool import Pool
from ttmfs.stores.page_file import finished

PAGES = 16  # a backup's size
BUDGET = 24  # what all backups together may hold
NAMES = st.sampled_from(["a", "b", "c"])
INDICES = st.integers(0, PAGES + 2)

Outcome = Any  # what an operation gave, or a word for why it was refused


class Refused(Exception):
    """An operation that the dict refuses, with the reason."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Dict:
    """A filesystem of backups, as simple as possible."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.backups: dict[str, dict[int, bytes]] = {}

    @property
    def stored(self) -> int:
        return sum(map(len, self.backups.values()))

    def get(self, name: str) -> dict[int, bytes]:
        if name not in self.backups:
            raise Refused("no backup")
        return self.backups[name]

    def create(self, name: str) -> None:
        if name in self.backups:
            raise Refused("exists")
        self.backups[name] = {}

    def remove(self, name: str) -> None:
        if self.get(name):
            raise Refused("not empty")
        del self.backups[name]

    def fini(self, name: str) -> None:
        self.get(name)
        del self.backups[name]

    def rename(self, old: str, new: str) -> None:
        self.get(old)
        if old != new and self.backups.get(new):
            raise Refused("not empty")
        self.backups[new] = self.backups.pop(old)

    def backup_page(self, name: str, idx: int, page: bytes) -> int:
        backup = self.get(name)
        if idx >= PAGES:
            raise Refused("index past the end")
        if idx not in backup and self.stored >= BUDGET:
            raise Refused("no room")
        backup[idx] = page
        return idx + 1

    def write(self, name: str, offset: int, data: bytes) -> int:
        backup, done = self.get(name), 0
        data = data[: max(0, PAGES * self.page_size - offset)]
        if not data:
            raise Refused("past the end")
        while done < len(data):
            idx, start = divmod(offset + done, self.page_size)
            part = data[done : done + self.page_size - start]
            if idx not in backup and self.stored >= BUDGET:
                if not done:
                    raise Refused("no room")
                break
            old = backup.get(idx, bytes(self.page_size))
            backup[idx] = old[:start] + part + old[start + len(part) :]
            done += len(part)
        return done

    def copy_page(self, name: str, idx: int) -> bytes:
        backup = self.get(name)
        if idx not in backup:
            raise Refused("absent" if idx < PAGES else "no such handle")
        return backup[idx]

    def read(self, name: str, offset: int, size: int) -> bytes:
        backup = self.get(name)
        whole = b"".join(backup.get(idx, bytes(self.page_size)) for idx in range(PAGES))
        return whole[offset : offset + size]

    def drop(self, name: str, idx: int) -> None:
        if idx not in self.get(name):
            raise Refused("hole" if idx < PAGES else "no such handle")
        del self.backups[name][idx]

    def drop_pages(self, name: str, first: int, last: int) -> None:
        backup = self.get(name)
        if last >= PAGES:
            raise Refused("range past the end")
        for idx in range(first, last + 1):
            backup.pop(idx, None)

    def truncate(self, name: str, size: int) -> None:
        backup = self.get(name)
        if size > PAGES * self.page_size:
            raise Refused("past the end")
        for idx in list(backup):
            keep = min(self.page_size, max(0, size - idx * self.page_size))
            if keep:
                backup[idx] = backup[idx][:keep].ljust(self.page_size, b"\0")
            else:
                del backup[idx]

    def listing(self) -> dict[str, list[int]]:
        return {name: sorted(idx + 1 for idx in pages) for name, pages in self.backups.items()}


class Layer:
    """The model layer: a pool on a store of its own, called as a trio program calls it."""

    ERRNO: ClassVar = {
        "no backup": errno.ENOENT,
        "exists": errno.EEXIST,
        "not empty": errno.ENOTEMPTY,
        "no room": errno.ENOSPC,
        "absent": errno.ENOENT,
        "hole": None,
        "no such handle": errno.EINVAL,
        "index past the end": errno.EINVAL,
        "range past the end": errno.EINVAL,
        "past the end": errno.EFBIG,
    }

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.acting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def do(self, function: Callable[..., Awaitable[Outcome]], *arguments: Any) -> Outcome:
        async def call() -> Outcome:
            return await function(*arguments)

        try:
            return trio.run(call)
        except TtmfsError as error:
            raise OSError(errno_of(error), str(error)) from error

    def create(self, name: str) -> None:
        self.do(self.pool.create, name)

    def remove(self, name: str) -> None:
        self.do(self.pool.remove, name)

    def fini(self, name: str) -> None:
        self.do(self.do(self.pool.open, name).fini)

    def rename(self, old: str, new: str) -> None:
        async def rename() -> None:
            await self.pool.rename(old, new, replace=True)

        self.do(rename)

    def backup_page(self, name: str, idx: int, page: bytes) -> int:
        handle: int = self.do(self.do(self.pool.open, name).backup_page, page, idx)
        return handle

    def write(self, name: str, offset: int, data: bytes) -> int:
        async def write() -> int:
            return await finished((await self.pool.open(name)).file.write(offset, data))

        written: int = self.do(write)
        return written

    def copy_page(self, name: str, idx: int) -> bytes:
        page = np.zeros(self.pool.page_size, np.uint8)
        self.do(self.do(self.pool.open, name).copy_page, page, idx + 1)
        return page.tobytes()

    def read(self, name: str, offset: int, size: int) -> bytes:
        async def read() -> bytes:
            return (await self.pool.open(name)).file.read(offset, size)

        got: bytes = self.do(read)
        return got

    def drop(self, name: str, idx: int) -> None:
        self.do(self.do(self.pool.open, name).drop, idx + 1)

    def drop_pages(self, name: str, first: int, last: int) -> None:
        handles = np.arange(first + 1, last + 2, dtype=np.uint64)
        self.do(self.do(self.pool.open, name).drop_pages, handles)

    def truncate(self, name: str, size: int) -> None:
        async def truncate() -> None:
            await (await self.pool.open(name)).file.truncate(size)

        self.do(truncate)

    def listing(self) -> dict[str, list[int]]:
        async def listing() -> dict[str, list[int]]:
            backups = [await self.pool.open(name) for name in await self.pool.names()]
            return {b.name: [idx + 1 for run in b.file.extents() for idx in range(*run)] for b in backups}

        found: dict[str, list[int]] = self.do(listing)
        return found

    def stored(self) -> int:
        return self.pool.room().stored // self.pool.page_size


class Mounted:
    """The same through a real mount, by system calls of the user that `acting` makes of this thread."""

    ERRNO: ClassVar = Layer.ERRNO | {
        "hole": errno.ENOENT,
        "no such handle": errno.ENOENT,
        "index past the end": errno.EFBIG,
    }

    def __init__(self, root: Path, page_size: int, acting: Callable[[], AbstractContextManager[None]]) -> None:
        self.root = root
        self.page_size = page_size
        self.acting = acting

    def create(self, name: str) -> None:
        (self.root / name).mkdir()

    def remove(self, name: str) -> None:
        (self.root / name).rmdir()

    def fini(self, name: str) -> None:
        os.truncate(self.root / name / ".image", 0)
        self.remove(name)

    def rename(self, old: str, new: str) -> None:
        os.rename(self.root / old, self.root / new)

    def backup_page(self, name: str, idx: int, page: bytes) -> int:
        path = self.root / name / str(idx + 1)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            assert os.write(fd, page) == self.page_size
        finally:
            os.close(fd)
        return int(path.name)

    def write(self, name: str, offset: int, data: bytes) -> int:
        fd = os.open(self.root / name / ".image", os.O_WRONLY)
        try:
            return os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def copy_page(self, name: str, idx: int) -> bytes:
        return (self.root / name / str(idx + 1)).read_bytes()

    def read(self, name: str, offset: int, size: int) -> bytes:
        fd = os.open(self.root / name / ".image", os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def drop(self, name: str, idx: int) -> None:
        (self.root / name / str(idx + 1)).unlink()

    def drop_pages(self, name: str, first: int, last: int) -> None:
        os.setxattr(self.root / name, "user.ttmfs.drop", f"{first + 1}-{last + 1}".encode())

    def truncate(self, name: str, size: int) -> None:
        os.truncate(self.root / name / ".image", size)

    def listing(self) -> dict[str, list[int]]:
        return {b.name: [int(page.name) for page in os.scandir(b)] for b in os.scandir(self.root)}

    def stored(self) -> int:
        room = os.statvfs(self.root)
        return room.f_blocks - room.f_bfree


class Agreement(RuleBasedStateMachine):
    """Carries each operation out three times and compares the outcomes."""

    page_size: int
    targets: tuple[Layer | Mounted, ...]

    def __init__(self) -> None:
        super().__init__()
        self.dict = Dict(self.page_size)
        self.seed = 0

    def teardown(self) -> None:
        for name in list(self.dict.backups):
            self.all("fini", name)

    def all(self, operation: str, *arguments: Any) -> None:
        try:
            expected: Outcome = getattr(self.dict, operation)(*arguments)
            refused = None
        except Refused as error:
            expected, refused = None, error.why
        for target in self.targets:
            number = target.ERRNO[refused] if refused else None
            try:
                with target.acting():
                    outcome, found = getattr(target, operation)(*arguments), None
            except OSError as error:
                outcome, found = None, error.errno
            assert (outcome, found) == (expected, number), f"{type(target).__name__}: {operation}, {refused}"

    def bytes(self, size: int) -> bytes:
        self.seed += 1
        return np.random.default_rng(self.seed).bytes(size)

    @rule(name=NAMES)
    def create(self, name: str) -> None:
        self.all("create", name)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.all("remove", name)

    @precondition(lambda self: self.dict.stored > BUDGET // 2)
    @rule(name=NAMES)
    def fini(self, name: str) -> None:
        self.all("fini", name)

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.all("rename", old, new)

    @rule(name=NAMES, idx=INDICES)
    def backup_page(self, name: str, idx: int) -> None:
        self.all("backup_page", name, idx, self.bytes(self.page_size))

    @rule(name=NAMES, at=st.floats(0, PAGES + 1), pages=st.floats(0.001, 6))
    def write(self, name: str, at: float, pages: float) -> None:
        self.all("write", name, int(at * self.page_size), self.bytes(1 + int(pages * self.page_size)))

    @rule(name=NAMES, idx=INDICES)
    def copy_page(self, name: str, idx: int) -> None:
        self.all("copy_page", name, idx)

    @rule(name=NAMES, at=st.floats(0, PAGES + 1), pages=st.floats(0.001, 6))
    def read(self, name: str, at: float, pages: float) -> None:
        self.all("read", name, int(at * self.page_size), 1 + int(pages * self.page_size))

    @rule(name=NAMES, idx=INDICES)
    def drop(self, name: str, idx: int) -> None:
        self.all("drop", name, idx)

    @rule(name=NAMES, first=INDICES, count=st.integers(1, PAGES))
    def drop_pages(self, name: str, first: int, count: int) -> None:
        self.all("drop_pages", name, first, first + count - 1)

    @rule(name=NAMES, at=st.one_of(st.floats(0, PAGES + 1), st.integers(0, PAGES)))
    def truncate(self, name: str, at: float) -> None:
        self.all("truncate", name, int(at * self.page_size))

    @invariant()
    def all_list_the_same(self) -> None:
        self.all("listing")

    @invariant()
    def all_hold_as_much(self) -> None:
        for target in self.targets:
            with target.acting():
                assert target.stored() == self.dict.stored


@contextlib.contextmanager
def targets_at(site: Site, page_size: int) -> Iterator[tuple[Layer | Mounted, ...]]:
    """A mount and, unless it is a user's, the model layer on a store of its own."""
    text = f"size={BUDGET * page_size},backup_size={PAGES * page_size},page_size={page_size}"
    with contextlib.ExitStack() as stack:
        mounted = Mounted(stack.enter_context(site.mount(text)).path, page_size, site.acting)
        if site.uid != os.geteuid():
            yield (mounted,)
        else:
            pool = Pool(*stack.enter_context(site.store(text)))
            yield Layer(pool), mounted


@pytest.mark.parametrize("size", [4096, 65536], ids=["4k", "64k"])
def test_random_operations_agree_between_dict_model_and_mount(site: Site, size: int) -> None:
    with targets_at(site, size) as found:

        class Machine(Agreement):
            page_size = size
            targets = found

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=10 if site.kind == "tmpfs" else 4,
                stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
