"""What a caller brings, checked: pages, indices, handles, destinations. Arithmetic alone, with clear refusals.

Both the pool's backups and the client's begin here, so that they refuse the same in the same words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..errors import InvalidArgument
from ..handles import IntOrArray, Uint64Array, handle_to_index, index_to_handle

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    PageBuffer = Buffer | NDArray[np.uint8]

__all__ = ["PageBuffer", "check_end", "destination", "flat", "handle_of", "index_of", "page", "pages", "rows", "runs"]


def page(buffer: PageBuffer, page_size: int) -> memoryview:
    """The bytes of one page."""
    data = flat(buffer)
    if data.nbytes != page_size:
        raise InvalidArgument(f"a page has {page_size} bytes, not {data.nbytes}")
    return data


def pages(array: NDArray[np.uint8], page_size: int) -> memoryview:
    """The bytes of an array of shape (n, page_size), dtype uint8."""
    import numpy as np  # a daemon does without it

    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != page_size:
        raise InvalidArgument(
            f"pages must be an array of uint8 of shape (n, {page_size}), not {array.dtype} of {array.shape}"
        )
    return flat(np.ascontiguousarray(array)) if len(array) else memoryview(b"")


def destination(buffer: PageBuffer, page_size: int) -> memoryview:
    """Where one page is to go."""
    data = flat(buffer)
    if data.nbytes != page_size or data.readonly:
        raise InvalidArgument(f"the destination must be writable and of {page_size} bytes")
    return data


def rows(array: NDArray[np.uint8], count: int, page_size: int) -> memoryview:
    """Where so many pages are to go: the rows of an array of shape (count, page_size), dtype uint8."""
    if array.dtype != "uint8" or array.shape != (count, page_size) or not array.flags.c_contiguous:
        raise InvalidArgument(f"the destination must be a contiguous array of uint8 of shape ({count}, {page_size})")
    if not array.flags.writeable:
        raise InvalidArgument("the destination must be writable")
    return flat(array) if count else memoryview(b"")


def handle_of(idx: int) -> int:
    """The handle of an index."""
    return _valid(index_to_handle, idx)


def index_of(handle: int) -> int:
    """The index of a handle."""
    return _valid(handle_to_index, handle)


def runs(handles: Uint64Array) -> list[tuple[int, int]]:
    """The runs of consecutive handles in an array, as (first index, index past the last)."""
    import numpy as np

    if not isinstance(handles, np.ndarray) or handles.ndim != 1:
        raise InvalidArgument("handles must be an array of uint64 of one dimension")
    indices = _valid(handle_to_index, handles)
    if not len(indices):
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1)
    firsts, lasts = indices[np.concatenate(([0], breaks + 1))], indices[np.concatenate((breaks, [-1]))]
    return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]


def check_end(past: int, limit: int) -> None:
    """Raise InvalidArgument if a range of indices that ends before `past` does not lie within `limit` pages."""
    if past > limit:
        raise InvalidArgument(f"index {past - 1} lies past the end of the backup, which has {limit} pages")


def flat(buffer: PageBuffer) -> memoryview:
    """The bytes of a contiguous buffer."""
    try:
        return memoryview(cast("Buffer", buffer)).cast("B")
    except TypeError as error:
        raise InvalidArgument(f"a contiguous buffer is needed: {error}") from None


def _valid(convert: Callable[[IntOrArray], IntOrArray], value: IntOrArray) -> IntOrArray:
    """What a function of ``handles`` makes of a value."""
    try:
        return convert(value)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
