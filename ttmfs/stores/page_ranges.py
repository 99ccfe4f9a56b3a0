"""What fallocate(2) of a whole backup does: storing pages of zeros, and punching holes.

Concurrency: as :mod:`.page_file`. Other requests are served between two steps.
"""

from collections.abc import Callable

from ..errors import NoRoom, OutOfBounds
from .page_file import PageFile, finished

__all__ = ["fill", "punch"]


async def fill(file: PageFile, offset: int, length: int) -> None:
    """Store a page of zeros at each index of a range of bytes where there is none. If room ends, none is stored."""
    if offset + length > (size := file.size):
        raise OutOfBounds(f"the backup ends at byte {size}; ttmfs resize makes it longer")
    made, work = list[int](), file.slices.begin()
    try:
        for idx in range(offset // file.page_size, -(-(offset + length) // file.page_size)):
            async with file.locked():
                if not file.holds(idx):
                    await finished(file.create_page(idx))
                    made.append(idx)
            if work.slice_is_over():
                await work.rest()
    except NoRoom:
        for idx in made:
            async with file.locked():
                await finished(file.drop_range(idx, idx + 1))
            if work.slice_is_over():
                await work.rest()
        raise


async def punch(file: PageFile, offset: int, end: int, done: int, reached: Callable[[int], object]) -> tuple[int, int]:
    """Drop the whole pages of a range of bytes, and fill the parts of pages at its ends with zeros.

    Returns the first index that was dropped and the one past the last. `done` is the progress of an earlier try: the
    last index passed to `reached`.
    """
    page_size = file.page_size
    first, past = -(-offset // page_size), end // page_size
    ends = [(offset, end)] if first > past else [(offset, first * page_size), (past * page_size, end)]
    for start, stop in ends if not done else ():
        if start < stop:
            await file.bring_in(start, stop - start, to_write=True)
            async with file.locked():
                if file.holds(start // page_size):
                    await finished(file.overwrite(start, bytes(stop - start)))
    past = max(first, past)
    reached(first := max(first, done))
    await file.drop_run(first, past, reached)
    return first, past
