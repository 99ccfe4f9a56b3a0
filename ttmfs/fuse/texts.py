"""The mount's own files: texts, one for each opening.

A text is made when its file is opened. Whoever reads it in pieces gets pieces of that text, up to its end. It has the
size that stat(2) says from then on. A daemon that takes over does not have the texts of the one before: reading on is
TextForgotten then, and reading from the beginning gives another text.

A file handle has the text's length in it, so that its end is known when the text is not. Of the 28 bits that the
layout of :mod:`ttmfs.fuse.inodes` leaves, 17 are the length, and the rest a serial number.

Concurrency: one thread. A text is made by one at a time; whoever asked before it was begun gets it too.
"""

import itertools
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping

import trio

from ..errors import TextForgotten
from .inodes import own_of, serial_of, with_serial

__all__ = ["KEPT_EACH", "KEPT_IN_ALL", "Texts"]

KEPT_EACH, KEPT_IN_ALL = 128, 256
"""Texts of open files that are kept for one user, and for all. The oldest goes first."""

LENGTH_BITS, SERIAL_BITS = 17, 11


class Texts:
    """What the mount's own files hold. `make` makes the text of an inode."""

    def __init__(self, make: Mapping[int, Callable[[], Awaitable[bytes]]]) -> None:
        self._make = make
        self._locks = {ino: trio.Lock() for ino in make}
        self._latest: dict[int, tuple[float, bytes]] = {}  # by inode: when its making began, and the text
        self._open: OrderedDict[int, tuple[int, bytes]] = OrderedDict()  # by file handle: whose it is, and the text
        self._counts: Counter[int] = Counter()
        # Files that a daemon before opened are open still.
        self._serial = itertools.count(secrets.randbits(SERIAL_BITS))

    def __contains__(self, ino: int) -> bool:
        return ino in self._make

    def size(self, ino: int) -> int:
        """The length of the text that was made last; 0 if none was."""
        return len(self._latest[ino][1]) if ino in self._latest else 0

    async def have(self, ino: int) -> None:
        """See that there is a text whose length can be told."""
        if ino not in self._latest:
            await self._made(ino)

    async def open(self, ino: int, uid: int) -> int:
        """A file handle for a text of now."""
        text = await self._made(ino)
        length = min(len(text), (1 << LENGTH_BITS) - 1)
        serials = (number % (1 << SERIAL_BITS) << LENGTH_BITS | length for number in self._serial)
        fh = next(fh for fh in (with_serial(ino, serial) for serial in serials) if fh not in self._open)
        self._keep(fh, uid, text)
        return fh

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """Bytes of the text of a file handle. Raises TextForgotten."""
        if fh not in self._open:
            if offset >= serial_of(fh) % (1 << LENGTH_BITS):
                return b""
            if offset:
                raise TextForgotten("the text is gone of which the beginning was read; open the file again")
            self._keep(fh, 0, await self._made(own_of(fh)))
        return self._open[fh][1][offset : offset + size]

    def close(self, fh: int) -> None:
        """Forget the text of a file handle."""
        if found := self._open.pop(fh, None):
            self._counts -= Counter([found[0]])

    async def _made(self, ino: int) -> bytes:
        asked = time.monotonic()
        async with self._locks[ino]:
            begun, text = self._latest.get(ino, (0.0, b""))
            if begun < asked:
                begun = time.monotonic()
                text = await self._make[ino]()
                self._latest[ino] = begun, text
            return text

    def _keep(self, fh: int, uid: int, text: bytes) -> None:
        self.close(fh)
        self._open[fh] = uid, text
        self._counts[uid] += 1
        if self._counts[uid] > KEPT_EACH:
            self._forget_oldest_of(uid)
        elif len(self._open) > KEPT_IN_ALL:
            self._forget_oldest_of(self._counts.most_common(1)[0][0])

    def _forget_oldest_of(self, uid: int) -> None:
        self.close(next(fh for fh, (owner, _) in self._open.items() if owner == uid))
