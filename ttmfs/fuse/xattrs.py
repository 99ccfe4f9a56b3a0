"""The extended attributes ``user.ttmfs.*``: one table for the root, one for backups. Other files have none.

CONTRIBUTING.md says how to add one ("How to add").

Concurrency: one thread. A getter or setter that takes long does its work in slices, between which others are served.
"""

import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from ..errors import AttributeExists, InvalidArgument, NoSuchAttribute, NotPermitted, NotSupported, TooLong
from ..handles import format_ranges, parse_ranges
from ..linux.system_calls import XATTR_SIZE_MAX
from ..model.pool import bytes_avail
from ..options import parse_size
from .directories import BackupDirectory, Root
from .inodes import HANDLE_BITS, MAX_HANDLE
from .node import Node
from .permissions import Caller

__all__ = ["XATTRS", "Xattr", "get_xattr", "remove_xattr", "set_xattr"]

RANGES_AT_ONCE = 256
"""Ranges that are parsed before others are served. A list can have 32,768."""

RANGE_BYTES = 64
"""Memory that a list of handles takes for each of its characters."""


class Xattr(NamedTuple):
    """An extended attribute. `get` takes the node, and returns the value or a coroutine.

    `set` is a coroutine function of the node, the value as text, and the caller. Only root and the user who mounted may
    read a `private` attribute.
    """

    get: Callable[[Any], object] | None = None
    set: Callable[[Any, str, Caller], Awaitable[None]] | None = None
    private: bool = False


def get_xattr(node: Node, name: bytes, caller: Caller) -> Coroutine[Any, Any, bytes]:
    """getxattr(2). Raises NoSuchAttribute also for an attribute that can only be set.

    It raises without waiting: `ls -l` asks each page for attributes that no page has, and the kernel asks for
    security.capability before the first write to a ``.shmem`` after its open(2).
    """
    if not (attribute := _table(node).get(name)) or not attribute.get:
        raise NoSuchAttribute(f"there is no attribute {os.fsdecode(name)!r} here")
    if attribute.private:
        _check_is_mounter(caller, f"read {os.fsdecode(name)}")
    return _value(attribute.get, node, caller)


async def _value(get: Callable[[Any], object], node: Any, caller: Caller) -> bytes:
    limit = node.pool.blocking_io.xattrs
    async with limit.turn(caller.uid), limit.limiter:
        value = get(node)
        return str(await value if inspect.isawaitable(value) else value).encode()


async def set_xattr(node: Node, name: bytes, value: bytes, flags: int, caller: Caller) -> None:
    """setxattr(2), of the few attributes that can be set."""
    attribute = _table(node).get(name)
    if flags & os.XATTR_REPLACE and not (attribute and attribute.get):
        raise NoSuchAttribute(f"there is no attribute {os.fsdecode(name)!r} here")
    if not attribute:
        raise NotSupported(f"there is no attribute {os.fsdecode(name)!r} here, and none can be added")
    if flags & os.XATTR_CREATE and attribute.get:
        raise AttributeExists(f"{os.fsdecode(name)} exists already")
    if not attribute.set:
        raise NotPermitted(f"{os.fsdecode(name)} can only be read")
    try:
        await attribute.set(node, value.decode("ascii").strip(), caller)
    except ValueError as error:  # not a text, a size or a list of handles
        raise InvalidArgument(f"{os.fsdecode(name)}: {error}") from None


def remove_xattr(node: Node, name: bytes) -> None:
    """removexattr(2): refused."""
    if name not in _table(node):
        raise NoSuchAttribute(f"there is no attribute {os.fsdecode(name)!r} here")
    raise NotPermitted(f"{os.fsdecode(name)} cannot be removed")


def _table(node: Node) -> Mapping[bytes, Xattr]:
    return XATTRS.get(type(node), {})


def _check_is_mounter(caller: Caller, what: str) -> None:
    """Raise NotPermitted unless the caller is root or the user who mounted. Write permission is not enough."""
    if caller.uid not in (0, os.geteuid()):
        raise NotPermitted(f"only root and the user who mounted may {what}")


async def _set_budget(root: Root, value: str, caller: Caller) -> None:
    """Change what all backups together may hold."""
    _check_is_mounter(caller, "change the budget")
    root.pool.resize(parse_size(value))


async def _set_log_level(root: Root, value: str, caller: Caller) -> None:
    """Change which lines are logged."""
    _check_is_mounter(caller, "change the level of the log")
    root.shared.log_level.change(value)


async def _set_backup_size(directory: BackupDirectory, value: str, _: Caller) -> None:
    """Change the bytes that a backup spans."""
    size = directory.pool.whole_pages(parse_size(value))
    if size > MAX_HANDLE * directory.pool.page_size:
        raise InvalidArgument(f"a backup has at most {MAX_HANDLE} pages")
    async with directory.backup.locked():
        directory.backup.resize(size)
    directory.shared.cache.expire_directory(directory.id)  # its times
    await directory.shared.cache.grow_image(directory.id, size)


async def _move(directory: BackupDirectory, value: str, caller: Caller) -> None:
    """Give the backup to another store."""
    _check_is_mounter(caller, "move a backup to another store")
    if not value.startswith("/"):
        raise InvalidArgument("the path of another store begins with /")
    async with directory.backup.locked():
        await directory.pool.store.move(directory.id, value)


async def _recent(root: Root) -> str:
    return await root.shared.recent_requests.text(root.pool.blocking_io.slices, root.pool.files.name_of)


async def _resident(directory: BackupDirectory) -> int:
    swapped = await directory.backup.count_swapped()
    return max(0, await directory.backup.count_pages() - swapped)


async def _map(directory: BackupDirectory) -> str:
    """The handles of a backup's pages, as ranges. Pages can come and go while it is made."""
    work, text, reached = directory.pool.blocking_io.slices.begin(), bytearray(), 0
    while True:
        async with directory.backup.locked():
            for first, past in directory.backup.extents(reached):
                text += format_ranges([(first + 1, past)]).encode() + b","
                reached = past
                if len(text) > XATTR_SIZE_MAX + 1:
                    raise TooLong(
                        f"the map has more than {XATTR_SIZE_MAX} bytes; use SEEK_DATA and SEEK_HOLE on .shmem"
                    )
                if work.slice_is_over():
                    break
            else:
                return text[:-1].decode()
        await work.rest()


async def _drop(directory: BackupDirectory, value: str, caller: Caller) -> None:
    """Drop the pages of ranges of handles."""
    id, backup, shared = directory.id, directory.backup, directory.shared
    waiting = shared.pool.blocking_io
    work, parts, ranges = waiting.slices.begin(), value.split(","), list[tuple[int, int]]()
    for n in range(0, len(parts), RANGES_AT_ONCE):
        ranges += parse_ranges(",".join(parts[n : n + RANGES_AT_ONCE]))
        if work.slice_is_over():
            await work.rest()
    lowest, highest = min(ranges)[0], max(last for _, last in ranges)
    if highest > (limit := backup.size // shared.pool.page_size):
        raise InvalidArgument(f"the backup's last handle is {limit}")
    held = waiting.pending_write(backup.stat().st_uid, RANGE_BYTES * len(value))
    with held, shared.progress(caller.unique) as progress:
        begun, index = divmod(progress.done, 1 << HANDLE_BITS)  # where an earlier daemon was: the range, and the index

        def reached(end: int) -> None:
            progress.reach((progress.done >> HANDLE_BITS << HANDLE_BITS) + end)

        for number, (first, last) in enumerate(ranges[begun:], begun + 1):
            await backup.drop_run(max(first - 1, index), last, reached)
            index = 0
            shared.runs.forget_dropped(id, first - 1, last)
            progress.reach(number << HANDLE_BITS)
            if work.slice_is_over():
                await work.rest()
        await shared.expire_dropped(id, lowest, highest, directory_locked=True)


XATTRS: dict[type[Node], dict[bytes, Xattr]] = {
    Root: {
        b"user.ttmfs.bytes_avail": Xattr(lambda _: bytes_avail()),
        b"user.ttmfs.log_level": Xattr(lambda root: root.shared.log_level.level, _set_log_level),
        b"user.ttmfs.page_size": Xattr(lambda root: root.pool.page_size),
        b"user.ttmfs.recent": Xattr(_recent, private=True),
        b"user.ttmfs.refusals": Xattr(lambda root: root.shared.refusals.text(), private=True),
        b"user.ttmfs.size": Xattr(lambda root: root.pool.room().size, _set_budget),
    },
    BackupDirectory: {
        b"user.ttmfs.size": Xattr(lambda directory: directory.backup.size, _set_backup_size),
        b"user.ttmfs.pages": Xattr(lambda directory: directory.backup.count_pages()),
        b"user.ttmfs.resident": Xattr(_resident),
        b"user.ttmfs.swapped": Xattr(lambda directory: directory.backup.count_swapped()),
        b"user.ttmfs.map": Xattr(_map),
        b"user.ttmfs.shmem_open": Xattr(lambda directory: int(directory.backup.is_open_elsewhere())),
        b"user.ttmfs.drop": Xattr(set=_drop),
        b"user.ttmfs.move": Xattr(set=_move),
    },
}
