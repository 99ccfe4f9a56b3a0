"""Answers to requests for listings, byte by byte."""

import pytest

from ttmfs.fuse import replies
from ttmfs.fuse.inodes import MAX_HANDLE, inode
from ttmfs.fuse.listing import MOST_TOLD, Listing
from ttmfs.fuse.node import Attributes

PAGE, BACKUP, ROOM = 4096, inode(1 << 10, 0), 32 << 10
ATTRIBUTES = Attributes(0o100640, 1, PAGE, 8, 1, 2, 3, 4, 5)


def expected(handle: int, plus: bool) -> bytes:
    dirent = replies.directory_entry(b"%d" % handle, BACKUP | handle, ATTRIBUTES.mode, handle + 2)
    if not plus:
        return dirent
    told = handle <= MOST_TOLD
    return (replies.entry(BACKUP | handle, ATTRIBUTES, PAGE) if told else replies.NO_ENTRY) + dirent


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("middle", [12, 1000, 10_000, 1 << 16, MOST_TOLD, 10**6, 1 << 20, 10**8, MAX_HANDLE - 400])
def test_pages_packed_at_once_have_the_bytes_of_pages_packed_one_by_one(middle: int, plus: bool) -> None:
    """Around each number at which the length of a name, or a byte that is not set for each page, changes."""
    handle, past = max(1, middle - 300), middle + 300
    while handle < past:
        listing = Listing(ROOM, PAGE, plus=plus)
        following = listing.add_pages(BACKUP, handle, past, ATTRIBUTES)
        assert following > handle
        assert len(bytes(listing)) <= ROOM
        assert bytes(listing) == b"".join(expected(number, plus) for number in range(handle, following))
        handle = following
