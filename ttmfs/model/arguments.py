"""Checks of the arguments that callers pass, and arithmetic on them. Synchronous and without I/O.

The pool and the client both use these checks, so that both refuse the same arguments with the same messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..errors import InvalidArgument
from ..handles import IntOrArray, Uint64Array, handle_to_index, index_to_handle

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    PageBuffer = Buffer | NDArray[np.uint8]


def page(buffer: PageBuffer, page_size: int) -> memoryview:
    """Return the bytes of one page from any contiguous buffer of page_size bytes."""
    data = flat(buffer)
    if data.nbytes != page_size:
        raise InvalidArgument(f"a page has {page_size} bytes, not {data.nbytes}")
    return data


def pages(array: NDArray[np.uint8], page_size: int) -> memoryview:
    """Return the bytes of an array of shape (n, page_size), dtype uint8. Copies the array if it is not contiguous."""
    import numpy as np  # not at the top: the daemon does not load numpy

    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != page_size:
        raise InvalidArgument(
            f"pages must be an array of uint8 of shape (n, {page_size}), not {array.dtype} of {array.shape}"
        )
    return flat(np.ascontiguousarray(array)) if len(array) else memoryview(b"")


def destination(buffer: PageBuffer, page_size: int) -> memoryview:
    """Return the bytes of the buffer for one page: contiguous, writable, of page_size bytes."""
    data = flat(buffer)
    if data.nbytes != page_size or data.readonly:
        raise InvalidArgument(f"the destination must be writable and of {page_size} bytes")
    return data


def rows(array: NDArray[np.uint8], count: int, page_size: int) -> memoryview:
    """Return the bytes of the array for `count` pages: contiguous, writable, shape (count, page_size), dtype uint8."""
    if array.dtype != "uint8" or array.shape != (count, page_size) or not array.flags.c_contiguous:
        raise InvalidArgument(f"the destination must be a contiguous array of uint8 of shape ({count}, {page_size})")
    if not array.flags.writeable:
        raise InvalidArgument("the destination must be writable")
    return flat(array) if count else memoryview(b"")


def handle_of(idx: int) -> int:
    """Return the handle of an index."""
    return _valid(index_to_handle, idx)


def index_of(handle: int) -> int:
    """Return the index of a handle."""
    return _valid(handle_to_index, handle)


def runs(handles: Uint64Array) -> list[tuple[int, int]]:
    """Return the runs of consecutive handles in an array, in its order, as (first index, index past the last)."""
    import numpy as np

    if not isinstance(handles, np.ndarray) or handles.ndim != 1:
        raise InvalidArgument("handles must be a one-dimensional array of uint64")
    return consecutive(_valid(handle_to_index, handles))


def consecutive(numbers: NDArray[np.integer[Any]]) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers in an array, in its order, as (first, past the last)."""
    import numpy as np

    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts, lasts = numbers[np.concatenate(([0], breaks + 1))], numbers[np.concatenate((breaks, [-1]))]
    return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]


def check_end(past: int, limit: int) -> None:
    """Raise InvalidArgument if the range of indices before `past` does not lie within `limit` pages."""
    if past > limit:
        raise InvalidArgument(f"index {past - 1} lies past the end of the backup, which has {limit} pages")


def flat(buffer: PageBuffer) -> memoryview:
    """Return the bytes of a contiguous buffer."""
    try:
        return memoryview(cast("Buffer", buffer)).cast("B")
    except TypeError as error:
        raise InvalidArgument(f"the buffer must be contiguous: {error}") from None


def _valid(convert: Callable[[IntOrArray], IntOrArray], value: IntOrArray) -> IntOrArray:
    """Convert with a function of ``handles``; its ValueError becomes InvalidArgument."""
    try:
        return convert(value)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
