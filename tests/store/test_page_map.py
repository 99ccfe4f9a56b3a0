"""The map of a backup's pages, beside a set of indices, in memory and in its file. Which filesystems need maps."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmfs.errors import InvalidArgument, NotSupported
from ttmfs.linux.mountinfo import Mounted
from ttmfs.options import Options
from ttmfs.stores import filesystems, make_store, page_map
from ttmfs.stores.page_map import GROUP, PageMap

MOST = 3 * GROUP

changes = st.lists(
    st.tuples(
        st.integers(0, MOST - 1),
        st.one_of(st.integers(1, 20), st.sampled_from([7, 8, 9, GROUP - 1, GROUP, GROUP + 1, MOST, 2**40])),
        st.booleans(),
    ),
    max_size=30,
)


@given(changes)
def test_a_map_equals_a_set_of_indices_in_memory_and_in_its_file(steps: list[tuple[int, int, bool]]) -> None:
    pages, expected = PageMap(), set[int]()
    with tempfile.TemporaryFile() as file:
        for first, length, present in steps:
            past = min(first + length, MOST) if present else first + length
            page_map.write(file.fileno(), pages.changed(first, past, present=present))
            pages.set(first, past, present=present)
            expected = expected | {*range(first, past)} if present else {i for i in expected if not first <= i < past}
        for found in pages, PageMap(page_map.read(file.fileno())):
            assert [i for start, end in found.runs(0, 2 * MOST) for i in range(start, end)] == sorted(expected)
            assert found.count == len(expected)
            for idx in (0, 1, GROUP - 1, GROUP, MOST - 1, 2 * MOST):
                assert (idx in found) == (idx in expected)
                assert found.next(idx) == min((i for i in expected if i >= idx), default=None)
                past = idx + GROUP
                assert found.first_absent(idx, past) == next((i for i in range(idx, past) if i not in expected), None)
                assert found.counted(idx, past) == sum(idx <= i < past for i in expected)


def test_what_is_there_already_is_not_written_again() -> None:
    pages = PageMap()
    pages.set(10, 20, present=True)
    assert pages.changed(12, 18, present=True) == []
    assert pages.changed(30, 2**60, present=False) == []
    (change,) = pages.changed(15, 16, present=False)
    assert (change.offset, len(change.data)) == (1, 1)


def test_a_page_at_the_highest_index_takes_little_memory() -> None:
    pages = PageMap()
    pages.set(2**30 - 4, 2**30 - 3, present=True)
    assert len(pages._groups) == 1
    pages.set(0, 2**40, present=False)
    assert not pages._groups


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def mounted(kind: str, *options: str) -> Mounted:
    return Mounted("/mnt", "/", kind, "source", "0:1", frozenset(options))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (mounted("ceph"), True),
        (mounted("fuse.ceph-fuse"), True),
        (mounted("nfs4", "rw", "vers=4.2"), True),
        (mounted("nfs4", "rw", "vers=4.1"), "only NFS 4.2"),
        (mounted("nfs", "rw", "vers=3"), "only NFS 4.2"),
        (mounted("fuse.glusterfs"), "after a heal"),
        (mounted("fuse.mfs"), "cannot punch holes"),
        (mounted("ext4"), False),
        (mounted("tmpfs"), False),
        (None, False),
    ],
)
def test_the_type_of_the_filesystem_decides(
    monkeypatch: pytest.MonkeyPatch, directory: int, found: Mounted | None, expected: bool | str
) -> None:
    monkeypatch.setattr(filesystems, "filesystem_of", lambda _: found)
    if isinstance(expected, str):
        with pytest.raises(NotSupported, match=expected):
            filesystems.is_distributed(directory)
    else:
        assert filesystems.is_distributed(directory) is expected


@pytest.mark.parametrize("store", [False, True])
def test_durable_writes_are_refused_where_no_store_gives_them(tmp_path: Path, store: bool) -> None:
    options = f"durable=write,size=1m{f',store={tmp_path}' if store else ''}"
    with pytest.raises(InvalidArgument, match="durable=write is for a store=DIR on a distributed filesystem"):
        make_store(Options.parse(options))
