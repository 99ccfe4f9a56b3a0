"""The answer to a request for a listing. A directory fills it, as the kernel's filesystems fill a dir_context.

The records of neighbouring pages differ in a few bytes: the lower ones of numbers that count up, and the last digits of
the name. So the record of the first page is repeated, and then each of those bytes is set in all records at once.
"""

from ..linux.fuse_protocol import DIRENT, ENTRY
from . import replies
from .inodes import handle_of
from .node import Attributes

__all__ = ["MOST_TOLD", "Listing"]

MOST_BYTES = 1 << 17
"""Most bytes in one answer, even if the caller has room for more: 4,096 names, or 819 with attributes."""

MOST_TOLD = 100_000
"""The highest handle of a page whose attributes are told. The kernel makes an inode for each page that it is told of,
which takes longer than listing it, and most callers need names alone."""

MOST_PARTS = 128
"""Most entries and runs of pages in one answer, which others wait for."""

SHORT = 6
"""A run of pages up to this long is faster to pack one by one."""

BINARY = bytes(range(256)) * 256, bytes(number >> 8 for number in range(1 << 16))
"""The first and the second byte, in memory, of all numbers of 16 bits."""

DECIMAL = tuple(bytes(b"0123456789"[number // place % 10] for number in range(10_000)) for place in (1000, 100, 10, 1))
"""The digits of all numbers of four digits."""

NODE, INODE = 0, 40
"""Where fuse_entry_out has inode numbers."""


class Listing:
    """The records of one answer that has room for `size` bytes. `plus`: with attributes (READDIRPLUS)."""

    def __init__(self, size: int, page_size: int, *, plus: bool) -> None:
        self.plus = plus
        self._records = bytearray()
        self._size = min(size, MOST_BYTES)
        self._page_size = page_size
        self._parts = 0

    def __bytes__(self) -> bytes:
        return bytes(self._records)

    def add(self, name: bytes, ino: int, attributes: Attributes, next_offset: int) -> bool:
        """Add an entry. Returns whether there was room."""
        record = self._record(name, ino, attributes, next_offset)
        if self._parts == MOST_PARTS or len(self._records) + len(record) > self._size:
            return False
        self._parts += 1
        self._records += record
        return True

    def _record(self, name: bytes, ino: int, attributes: Attributes, next_offset: int) -> bytes:
        record = replies.directory_entry(name, ino, attributes.mode, next_offset)
        if not self.plus:
            return record
        if name in (b".", b"..") or handle_of(ino) > MOST_TOLD:
            return replies.NO_ENTRY + record
        return replies.entry(ino, attributes, self._page_size) + record

    def add_pages(self, directory: int, first: int, past: int, attributes: Attributes) -> int:
        """Add the pages of a range of handles, as far as there is room. Returns the handle to continue at.

        `directory` is the inode number of the backup. All its pages have the same attributes. The offset after a page
        is its handle + 2.
        """
        handle = first
        if past - first <= SHORT:
            while handle < past and self.add(b"%d" % handle, directory | handle, attributes, handle + 2):
                handle += 1
            return handle
        while handle < past and self._parts < MOST_PARTS:
            record = self._record(b"%d" % handle, directory | handle, attributes, handle + 2)
            end = min(past, _similar(handle), handle + (self._size - len(self._records)) // len(record))
            if end <= handle:
                break
            self._records += self._alike(record, handle, end)
            self._parts += 1
            handle = end
        return handle

    def _alike(self, record: bytes, first: int, past: int) -> bytearray:
        """The record of the first page, and those of the others up to `past`."""
        count, size = past - first, len(record)
        records = bytearray(record * count)
        dirent = ENTRY.size if self.plus else 0
        for at in (NODE, INODE, dirent) if self.plus and first <= MOST_TOLD else (dirent,):
            _count_up(records, at, size, BINARY, first % (1 << 16), count)
        _count_up(records, dirent + 8, size, BINARY, (first + 2) % (1 << 16), count)
        digits = len(b"%d" % first)
        changing = DECIMAL[-digits:]
        _count_up(records, dirent + DIRENT.size + digits - len(changing), size, changing, first % 10_000, count)
        return records


def _similar(handle: int) -> int:
    """The end of the handles from this one on whose records differ only in the bytes that are set."""
    ten = 10
    while ten <= handle:
        ten *= 10
    numbers = (handle | 0xFFFF) + 1, (handle + 2 | 0xFFFF) - 1  # the inode number's, and the offset's, lower 16 bits
    end = min(ten, handle - handle % 10_000 + 10_000, *numbers)
    return min(end, MOST_TOLD + 1) if handle <= MOST_TOLD else end


def _count_up(records: bytearray, at: int, size: int, columns: tuple[bytes, ...], first: int, count: int) -> None:
    """Set bytes of each record, from position `at` of a record on, to those of `count` successive numbers."""
    for place, column in enumerate(columns, at):
        records[place::size] = column[first : first + count]
