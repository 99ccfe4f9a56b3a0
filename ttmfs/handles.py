"""Indices, handles, tagged pointers and page names: arithmetic, without I/O.

A caller of a TTM backup numbers its pages by *index*, from 0. The backup answers with a *handle*, index + 1, which is
never 0. While a page is backed up, its slot in the caller's page array holds the handle as a *tagged pointer*,
``handle << 1 | 1``. Addresses of pages are even, so bit 0 distinguishes the two. A tagged pointer with handle 0 means
"already restored". Source: ``include/drm/ttm/ttm_backup.h`` and ``drivers/gpu/drm/ttm/ttm_pool.c`` of Linux.

These functions take an int or a numpy array of dtype uint64, and return the same type. They raise ValueError for a
value that is out of range or of another type, and convert nothing silently.

This module imports numpy at the first array, so that the daemon, which uses no arrays, does not load it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Uint64Array: TypeAlias = "NDArray[np.uint64]"

IntOrArray = TypeVar("IntOrArray", int, "Uint64Array")

_UINT64_MAX = 2**64 - 1
_RANGE = re.compile(r"([1-9][0-9]{0,18})(?:-([1-9][0-9]{0,18}))?", re.ASCII)


def _checked(value: Any, what: str, low: int, high: int) -> Any:
    """Return `value` if it is an int or a uint64 array from `low` to `high`."""
    if type(value) is not int:
        import numpy as np

        if isinstance(value, np.ndarray):
            if value.dtype != np.uint64:
                raise ValueError(f"{what}: an array must be of dtype uint64, not {value.dtype}")
            if value.size and not (low <= int(value.min()) and int(value.max()) <= high):
                raise ValueError(f"{what}: every element must lie between {low} and {high}")
            return value
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            kind = type(value).__name__
            raise ValueError(f"{what}: must be an int or an array of uint64, not {kind}")
    if not low <= value <= high:
        raise ValueError(f"{what}: {value} does not lie between {low} and {high}")
    return int(value)


def index_to_handle(idx: IntOrArray) -> IntOrArray:
    """Return the handle of an index: ``idx + 1``, never 0."""
    handle: IntOrArray = _checked(idx, "index", 0, _UINT64_MAX - 1) + 1
    return handle


def handle_to_index(handle: IntOrArray) -> IntOrArray:
    """Return the index of a handle: ``handle - 1``."""
    idx: IntOrArray = _checked(handle, "handle", 1, _UINT64_MAX) - 1
    return idx


def handle_to_page_ptr(handle: IntOrArray) -> IntOrArray:
    """Return the tagged pointer of a handle: ``handle << 1 | 1``. Handle 0 means "already restored"."""
    ptr: IntOrArray = _checked(handle, "handle", 0, _UINT64_MAX >> 1) << 1 | 1
    return ptr


@overload
def page_ptr_is_handle(ptr: int) -> bool: ...
@overload
def page_ptr_is_handle(ptr: Uint64Array) -> NDArray[np.bool_]: ...
def page_ptr_is_handle(ptr: int | Uint64Array) -> bool | NDArray[np.bool_]:
    """Whether a slot of a page array holds a handle: bit 0 is set."""
    tagged: bool | NDArray[np.bool_] = _checked(ptr, "page pointer", 0, _UINT64_MAX) & 1 == 1
    return tagged


def page_ptr_to_handle(ptr: IntOrArray) -> IntOrArray:
    """Return the handle in a tagged pointer. Raises ValueError without the tag: the pointer is a page's address."""
    tagged = page_ptr_is_handle(ptr)
    if not (tagged if isinstance(tagged, bool) else tagged.all()):
        raise ValueError("page pointer: bit 0 is clear, so this is the address of a page, not a handle")
    handle: IntOrArray = _checked(ptr, "page pointer", 1, _UINT64_MAX) >> 1
    return handle


def page_name(handle: int) -> bytes:
    """Return the name of a page's file: its handle in decimal."""
    return b"%d" % handle


def parse_page_name(name: bytes) -> int | None:
    """Return the handle of a file name; None unless the name is canonical decimal (no sign, no leading zero)."""
    return int(name) if name.isdigit() and name[:1] != b"0" else None


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Return the (first, last) pairs of a text such as ``1-100,205``, in its order. Raises ValueError."""
    pairs = []
    for part in text.strip().split(","):
        if not (match := _RANGE.fullmatch(part.strip())):
            raise ValueError(f"{part.strip()!r} is neither a handle nor a range of handles such as 1-100")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part.strip()} runs backwards")
        pairs.append((first, last))
    return pairs


def format_ranges(pairs: list[tuple[int, int]]) -> str:
    """Return the text of (first, last) pairs, for :func:`parse_ranges`: ``1-100,205``."""
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in pairs)
