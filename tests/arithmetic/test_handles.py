"""C1: handles and tagged pointers, for ints and for arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ttmfs import handles

UINT64_MAX = 2**64 - 1
indices = st.integers(0, UINT64_MAX - 1)
taggable = st.integers(0, 2**63 - 1)


def arrays(elements: st.SearchStrategy[int]) -> st.SearchStrategy[handles.Uint64Array]:
    return npst.arrays(np.uint64, st.integers(0, 20), elements=elements)


@given(indices)
def test_c1_a_handle_is_the_index_plus_1_and_never_0(idx: int) -> None:
    assert handles.index_to_handle(idx) == idx + 1 > 0
    assert handles.handle_to_index(handles.index_to_handle(idx)) == idx


@given(taggable)
def test_c1_a_handle_survives_encoding_as_a_tagged_pointer(handle: int) -> None:
    pointer = handles.handle_to_page_ptr(handle)
    assert pointer == handle << 1 | 1 <= UINT64_MAX
    assert handles.page_ptr_is_handle(pointer) is True
    assert handles.page_ptr_to_handle(pointer) == handle


@given(st.integers(0, 2**63 - 1))
def test_c1_an_untagged_address_is_refused(half: int) -> None:
    assert handles.page_ptr_is_handle(half * 2) is False
    with pytest.raises(ValueError, match="address of a page"):
        handles.page_ptr_to_handle(half * 2)


@given(arrays(indices))
def test_c1_an_array_of_indices_gives_an_array_of_handles(idx: handles.Uint64Array) -> None:
    made = handles.index_to_handle(idx)
    assert made.dtype == np.uint64
    assert made.tolist() == [handles.index_to_handle(i) for i in idx.tolist()]
    assert handles.handle_to_index(made).tolist() == idx.tolist()


@given(arrays(taggable))
def test_c1_an_array_of_handles_gives_an_array(given_handles: handles.Uint64Array) -> None:
    pointers = handles.handle_to_page_ptr(given_handles)
    assert pointers.dtype == np.uint64
    assert pointers.tolist() == [handles.handle_to_page_ptr(h) for h in given_handles.tolist()]
    assert handles.page_ptr_is_handle(pointers).all()
    assert handles.page_ptr_to_handle(pointers).tolist() == given_handles.tolist()


def test_c1_tagged_handles_are_told_from_addresses_in_an_array() -> None:
    slots = np.array([0, 0x7F00_0000_1000, 7 << 1 | 1, 1], dtype=np.uint64)
    assert handles.page_ptr_is_handle(slots).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="address of a page"):
        handles.page_ptr_to_handle(slots)
    assert handles.page_ptr_to_handle(slots[2:]).tolist() == [7, 0], "handle 0 in a slot: already restored"


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (handles.index_to_handle, -1),
        (handles.index_to_handle, UINT64_MAX),
        (handles.index_to_handle, True),
        (handles.index_to_handle, 1.0),
        (handles.index_to_handle, "1"),
        (handles.index_to_handle, np.array([1, 2])),  # int64
        (handles.handle_to_index, 0),
        (handles.handle_to_index, np.array([1, 0], dtype=np.uint64)),
        (handles.handle_to_index, UINT64_MAX + 1),
        (handles.handle_to_page_ptr, 2**63),
        (handles.handle_to_page_ptr, -1),
        (handles.page_ptr_is_handle, -1),
        (handles.page_ptr_to_handle, UINT64_MAX + 2),
    ],
)
def test_c1_impossible_indices_and_handles_are_refused(function: object, value: object) -> None:
    with pytest.raises(ValueError, match=r"must|lie"):
        function(value)  # type: ignore[operator]


def test_numpy_scalars_are_accepted_as_ints() -> None:
    made: object = handles.index_to_handle(np.uint64(4))  # type: ignore[type-var]
    assert type(made) is int


@given(st.integers(1, 10**30))
def test_a_handle_survives_conversion_to_a_page_name(handle: int) -> None:
    assert handles.parse_page_name(handles.page_name(handle)) == handle


@pytest.mark.parametrize(
    "name", [b"", b"0", b"01", b"+1", b"-1", b" 1", b"1 ", b"1\n", b"1_0", b"0x1", b"1.0", b"\xd9\xa1"]
)
def test_a_name_that_is_not_canonical_is_not_a_page_name(name: bytes) -> None:
    assert handles.parse_page_name(name) is None


@given(st.binary(max_size=20))
def test_only_canonical_decimals_are_page_names(name: bytes) -> None:
    handle = handles.parse_page_name(name)
    assert handle is None or (handle > 0 and handles.page_name(handle) == name)


pairs = st.tuples(st.integers(1, 10**18), st.integers(0, 10**6)).map(lambda p: (p[0], p[0] + p[1]))


@given(st.lists(pairs, min_size=1))
def test_ranges_survive_being_written_and_parsed(ranges: list[tuple[int, int]]) -> None:
    assert handles.parse_ranges(handles.format_ranges(ranges)) == ranges


def test_ranges_may_be_written_loosely() -> None:
    assert handles.parse_ranges("1-100, 205 ,7-7\n") == [(1, 100), (205, 205), (7, 7)]


@pytest.mark.parametrize("text", ["", ",", "1,", "0", "0-3", "3-1", "1-2-3", "a", "1;2", "-", "1-", "9" * 5000])
def test_text_that_is_not_a_list_of_ranges_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"range"):
        handles.parse_ranges(text)
