"""What a daemon does so that it can die: it gives its keeper what the next daemon needs, and replaces a dead keeper."""

import contextlib
import logging
import os
import struct

import trio

from ..options import format_size
from ..recovery.keeper_client import Keeper
from ..recovery.keeper_protocol import CONNECTION, STATE
from .background import Process
from .start import Mount

__all__ = ["INIT_VERSION", "Keeping"]

log = logging.getLogger(__name__)

INIT_VERSION = struct.Struct("<40xII")  # of fuse_init_in, behind its fuse_in_header
RESEND_SINCE = (7, 40)
"""The protocol version of Linux 6.9, which can send unanswered requests again (FUSE_NOTIFY_RESEND)."""

FIRST_RETRY_SECONDS, RETRY_SECONDS = 0.05, 5.0

REPORT_SECONDS = 5.0
"""The interval of signs of life and of what a service manager shows, at most."""

LEAST_REPORTS = 6
"""How many signs of life the daemon gives at least before the keeper's patience ends."""


class Keeping:
    """The keeper's part in one session. `process.keeper` is None without a keeper."""

    def __init__(self, mount: Mount, process: Process) -> None:
        self._mount, self._process = mount, process
        self.store_is_lost = False
        """Whether another machine may have the store: the next daemon gets no descriptor of it."""
        self._keeps_connection = INIT_VERSION.unpack_from(bytes.fromhex(mount.state.record.init)) >= RESEND_SINCE

    def descriptors(self) -> dict[str, int]:
        """What the next daemon needs, by the keeper's names. The state comes last: what has it has all."""
        found = {} if self.store_is_lost else self._mount.pool.store.descriptors()
        if self._keeps_connection:
            found[CONNECTION] = self._mount.connection
        return found | {STATE: self._mount.state.fd}

    def begin_serving(self) -> None:
        """Give the keeper what it does not hold yet, and say that this daemon serves."""
        if self._process.keeper:
            self._hand_over(self._process.keeper, self._process.held)

    def _hand_over(self, keeper: Keeper, held: dict[str, int]) -> bool:
        """Give a keeper what the next daemon needs beyond what it holds. False if it does not answer."""
        new = {name: fd for name, fd in self.descriptors().items() if held.get(name) != fd}
        try:
            keeper.keep(new, "READY=1\nWATCHDOG=1" + "\nSTANDBY=1" * self._process.has_standby)
        except OSError as error:
            log.warning("the keeper does not hear: %s", error)
            return False
        return True

    async def drop(self, *names: str) -> None:
        """Have the keeper close descriptors, the connection among them, so that the next daemon mounts anew.

        Wait until it has.
        """
        self._keeps_connection, pause = False, FIRST_RETRY_SECONDS
        while self._process.keeper:  # it may be replaced meanwhile
            with contextlib.suppress(OSError):
                self._process.keeper.keep({}, *(f"FDSTOREREMOVE=1\nFDNAME={name}" for name in names))
                return
            log.error("the keeper does not answer: the pages are safe as long as this process, %d, lives", os.getpid())
            await trio.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS)

    def stop(self) -> None:
        """Say that this daemon ends on purpose."""
        self._tell("STOPPING=1")

    def end(self) -> None:
        """Say so, and have the connection closed: that cuts off clients that still wait."""
        self._tell("STOPPING=1", "FDSTOREREMOVE=1", f"FDNAME={CONNECTION}")

    def _tell(self, *lines: str) -> None:
        if self._process.keeper:
            with contextlib.suppress(OSError):
                self._process.keeper.tell(*lines)

    async def report(self) -> None:
        """Send signs of life, from the loop that serves; and to a service manager what is stored."""
        said = ""
        while keeper := self._process.keeper:
            status = self._status() if keeper.is_managed else ""
            with contextlib.suppress(OSError):  # it is restarted, or hangs itself: nothing may wait for it
                keeper.tell("WATCHDOG=1", *[status] * (status != said), seconds=0)
                said = status
            await trio.sleep(min(REPORT_SECONDS, keeper.patience / LEAST_REPORTS))

    def _status(self) -> str:
        room = self._mount.pool.room()
        stored, size = format_size(room.stored), format_size(room.size)
        return f"STATUS=backups: {room.backups}, stored: {stored} of {size}"

    async def replace_dead_keepers(self) -> None:
        """Start another keeper when one dies."""
        keeper, pause = self._process.keeper, 0.0
        while keeper:
            if keeper.death >= 0:
                await trio.lowlevel.wait_readable(keeper.death)
            keeper.close()
            try:
                keeper = self._process.keeper = self._process.start_keeper()
            except OSError as error:
                log.error("no keeper: the pages are lost if this process dies now: %s", error.strerror)
                await trio.sleep(RETRY_SECONDS)
                continue
            log.warning("the keeper was killed: %s is another", keeper.pid)
            answers = self._hand_over(keeper, {})
            pause = 0.0 if answers else min(RETRY_SECONDS, 2 * pause or FIRST_RETRY_SECONDS)
            await trio.sleep(pause)  # one that cannot even start is not to be started without end
