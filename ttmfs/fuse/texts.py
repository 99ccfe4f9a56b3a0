"""The mount's own files, ``.stats`` and ``.config``: one text for each opening.

A text is made when its file is opened. A reader in pieces gets pieces of that text, and stat(2) tells its size from
then on. A daemon that takes over does not have the texts of the one before. There a read from the middle of a text
raises TextForgotten, and a read from the beginning gives a new text.

Concurrency: one thread. Only one text of a file is made at a time. Every reader that asked before that began gets it.
"""

import itertools
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

import trio

from ..errors import ReadOnlyEntry, TextForgotten
from .inodes import HANDLE_BITS, own_of, with_serial
from .node import Attributes, Node, Shared
from .permissions import Caller

__all__ = ["MOST_TEXTS", "Texts"]

MOST_TEXTS = 256
"""Most texts of open files that are kept. If there are more, the oldest of the user with the most is forgotten."""

TEXT_GROWTH = 1 << 16
"""Most bytes by which a text may be longer than the one before."""


class Texts(Node):
    """Both files, by inode number. `make` makes the text of an inode."""

    def __init__(self, shared: Shared, make: Mapping[int, Callable[[], Awaitable[bytes]]]) -> None:
        super().__init__(shared)
        self._make = make
        self._locks = {ino: trio.Lock() for ino in make}
        self._latest: dict[int, tuple[float, bytes]] = {}  # by inode: when its making began, and the text
        self._open: dict[int, tuple[int, bytes]] = {}  # by file handle: the user, and the text; the oldest first
        self._serial = itertools.count(secrets.randbits(HANDLE_BITS))  # an earlier daemon's files are still open

    def __contains__(self, ino: int) -> bool:
        return ino in self._make

    def attributes(self, ino: int) -> Attributes:
        """The size is the length of the text that was made last; 0 if none was."""
        size = len(self._latest[ino][1]) if ino in self._latest else 0
        attributes = Attributes.of_file(self.pool.files.stat(), size, 0)
        return attributes._replace(mode=stat.S_IFREG | 0o444, cacheable=False)

    def looked_up(self, ino: int) -> Attributes:
        """The attributes for the kernel before an open, which makes a text that may be longer than the last.

        sendfile(2) reads as far as the size that the kernel knows, or to a short read; stat(2) asks for it anew.
        """
        attributes = self.attributes(ino)
        return attributes._replace(size=attributes.size + TEXT_GROWTH)

    async def latest_attributes(self, ino: int) -> Attributes:
        """As :meth:`attributes`. If no text was made yet, one is made now."""
        if ino not in self._latest:
            await self._made(ino)
        return self.attributes(ino)

    async def open(self, ino: int, flags: int, caller: Caller) -> int:
        """A file handle for a text that is made now."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise ReadOnlyEntry("this file can only be read")
        text = await self._made(ino)
        fh = with_serial(ino, next(self._serial))
        self._keep(fh, caller.uid, text)
        return fh

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """Bytes of the text of a file handle. Raises TextForgotten."""
        if fh not in self._open:
            if offset:
                raise TextForgotten("the text whose beginning was read is lost; open the file again")
            self._keep(fh, 0, await self._made(own_of(fh)))
        return self._open[fh][1][offset : offset + size]

    def close(self, fh: int) -> None:
        self._open.pop(fh, None)

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
        self._open[fh] = uid, text
        if len(self._open) > MOST_TEXTS:
            ((most, _),) = Counter(owner for owner, _ in self._open.values()).most_common(1)
            self.close(next(fh for fh, (owner, _) in self._open.items() if owner == most))
