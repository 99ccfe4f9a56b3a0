"""The mount that a daemon serves: a new one, or the one that the previous daemon left with its keeper."""

import contextlib
import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotSupported, TtmfsError
from ..linux.mountinfo import mounted_at, mounts
from ..model.pool import Pool
from ..options import ExitCode, Options
from ..recovery.keeper_protocol import CONNECTION, STATE
from ..recovery.state import Record, State
from ..stores import make_store, resume_store
from ..stores.store import STORE, Store
from ..version import __version__
from . import mounting
from .mounting import MountError, checked_mountpoint, device_at, is_dead

__all__ = ["Mount", "start"]

log = logging.getLogger(__name__)

FUSE_MIN_READ_BUFFER = 8192


@dataclass
class Mount:
    """What a mount consists of."""

    mountpoint: str
    connection: int
    pool: Pool
    state: State
    taken_over: bool  # the previous daemon served this connection

    @property
    def is_visible(self) -> bool:
        """Whether it is the topmost mount at its mount point: nobody has unmounted it, or mounted over it."""
        return device_at(self.mountpoint) == self.state.record.device


def start(source: str, mountpoint: str, options: Options, held: dict[str, int]) -> Mount:
    """Mount, or take over the mount whose descriptors a keeper held. Raises MountError."""
    try:
        return _take_over(source, mountpoint, options, held) if STATE in held else _make(source, mountpoint, options)
    except TtmfsError as error:
        code = ExitCode.SYSTEM if isinstance(error, NotSupported) else ExitCode.FAILED
        raise MountError(str(error), code) from error


def _make(source: str, mountpoint: str, options: Options) -> Mount:
    """A new mount of a new pool."""
    mountpoint = checked_mountpoint(mountpoint)
    if options.store and _lies_in(mountpoint, options.store):  # the daemon would ask itself for the names there
        raise MountError(f"{mountpoint} lies within the store {options.store}; mount it elsewhere")
    with contextlib.ExitStack() as undo:
        store = make_store(options)
        undo.callback(store.close)
        pool = Pool(store, options)
        state = State.new(Record(__version__, pool.page_size, pool.backup_size, temporary=store.temporary))
        undo.callback(state.close)
        if not options.store or os.path.realpath(options.store) != mountpoint:
            mounting.warn_of_hiding(mountpoint)
        mounting.warn_of_options(options)
        connection = _connect(source, mountpoint, options, state)
        undo.pop_all()
    return Mount(mountpoint, connection, pool, state, taken_over=False)


def _take_over(source: str, mountpoint: str, options: Options, held: dict[str, int]) -> Mount:
    """The previous daemon's mount. Touches nothing below the mount point: there, nobody answers yet."""
    state = State(held[STATE])
    record = state.record
    if (size := record.page_size) != options.page_size:
        raise MountError(
            f"the running mount has pages of {size} bytes, not of {options.page_size}: give page_size={size}"
        )
    if record.size:
        options = dataclasses.replace(options, size=record.size)
    store: Store
    if STORE in held:
        store = resume_store(held, options, temporary=record.temporary, failed=record.unsynced)
    else:  # the daemon before lost it to another machine
        store = make_store(options)
    pool = Pool(store, options, record.backup_size)
    state.update(restarts=record.restarts + 1)
    if words := state.take_last_words():
        log.error("the daemon before died: %s", words)
    if CONNECTION in held:
        log.info("taking over %s: no page and no open file is lost", mountpoint)
        return Mount(mountpoint, held[CONNECTION], pool, state, taken_over=True)
    _clear_the_way(mountpoint, record.device)
    connection = _connect(source, mountpoint, options, state)
    log.warning("mounted %s anew over the pages that were kept: none is lost, files that were open are", mountpoint)
    return Mount(mountpoint, connection, pool, state, taken_over=False)


def _clear_the_way(mountpoint: str, device: str | None) -> None:
    """Unmount the dead mount of the previous daemon. Raises MountError if something is mounted over it."""
    if device_at(mountpoint) == device and is_dead(mountpoint):
        mounting.unmount(mountpoint)
    elif (over := mounted_at(mountpoint)) and (mountpoint, device) in [(m.path, m.device) for m in mounts()]:
        raise MountError(f"{over.type} is mounted over {mountpoint}, which is to be mounted anew: unmount that first")


def _connect(source: str, mountpoint: str, options: Options, state: State) -> int:
    """Mount, and note the kernel's first message in the state. The connection."""
    connection = mounting.mount(source, mountpoint, options)
    try:
        first = os.read(connection, FUSE_MIN_READ_BUFFER)
        state.begin_connection()
        state.update(init=first.hex(), device=device_at(mountpoint))
    except BaseException as error:
        mounting.unmount(mountpoint)
        os.close(connection)
        if isinstance(error, OSError):
            raise MountError(f"{mountpoint} was unmounted before it could answer") from error
        raise
    return connection


def _lies_in(path: str, directory: str) -> bool:
    """Whether a path lies below a directory, by whatever names and mounts."""
    with contextlib.suppress(OSError):
        store = os.stat(directory)
        return any(os.path.samestat(os.stat(parent), store) for parent in Path(path).parents)
    return False
