"""One mount: the connection to the kernel, its first message, the reading loop, signals and the end.

libfuse does not mount. fusermount3 does, for root and users alike, and hands the connection over; libfuse is given one
end of a socket pair with the kernel's first message, FUSE_INIT, in it, and when it has read that, the connection is put
in the socket's place. So the same code serves a connection whose FUSE_INIT was read by another process.

That is how a daemon takes over from one that died: the keeper has the connection, the store and the state. Before it
reads, it has the kernel send every request again that was not answered (FUSE_NOTIFY_RESEND, Linux 6.9). Where the
kernel cannot, the connection is not kept: it ends with the daemon, and the next one mounts anew over the same store.

The daemon never touches the mount itself, nor holds a descriptor of it: it would wait for itself, unkillable. Above all
not one that takes over, whose mount is there and answers no one yet.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyfuse3
import trio

from ..errors import NotSupported, TtmfsError
from ..fuse.busy_poll import BusyPoll
from ..fuse.inodes import CONFIG, STATS
from ..fuse.kernel_cache import KernelCache
from ..fuse.metrics import Metrics
from ..fuse.operations import Operations
from ..fuse.requests import Requests
from ..fuse.tree import Tree
from ..linux import system_calls
from ..linux.memory import available
from ..linux.mountinfo import mounted_at, mounts
from ..model.pool import Pool
from ..options import ExitCode, Options, format_size
from ..recovery.keeper import CONNECTION, ENDING, RESTART, STATE, Keeper
from ..recovery.state import State
from ..stores import make_store, resume_store
from ..stores.blocking_io import SHARE
from ..stores.store import STORE
from ..version import __version__
from . import mounting
from .background import Process
from .connection import has_ended, was_cut_off
from .descriptor_socket import Handover
from .mounting import MountError, checked_mountpoint, device_at, is_dead

__all__ = ["serve"]

log = logging.getLogger(__name__)

FUSE_MIN_READ_BUFFER = 8192
INIT_FLAGS_OFFSET, ATOMIC_O_TRUNC = 40 + 12, 1 << 3
INIT_VERSION_OFFSET, RESEND_SINCE = 40, (7, 40)
NOTIFY_RESEND = struct.pack("<IiQ", 16, 7, 0)
"""fuse_out_header of the notification that makes the kernel send every unanswered request again. (Linux 6.9)"""

WAIT = "_wait_fuse_readable"
"""The function in which pyfuse3's loop waits for the next request, found anew at each. The one private thing that is
replaced, as pyfuse3's own asyncio support replaces others."""

MOST_WAITING = 10_000
"""So many requests may wait for swap or a disk at once before the next is not read."""

LEAST_WAITING, REQUEST_BYTES = 500, 12 << 10
"""So many may wait however little memory there is. What each takes, its data apart, in bytes."""

ANSWER_SECONDS = 10.0
FIRST_RETRY_SECONDS, KEEPER_RETRY_SECONDS = 0.05, 5.0
LINGER_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""How late is noticed that the connection was cut, if requests are under way that keep the loop from its end."""

START_SECONDS, STATUS_SECONDS = 0.1, 5.0
"""How often a service manager is told the status: as soon as there is one, and then."""


@dataclass
class _Mount:
    """What a mount consists of."""

    mountpoint: str
    connection: int
    pool: Pool
    state: State
    begun: bool  # a daemon before this one has served this connection


def serve(source: str, mountpoint: str, options: Options, process: Process) -> ExitCode:
    """Serve a mount until it is unmounted or a signal asks for the end; on RESTART leave it to another daemon.

    The mount is a new one, or that of a daemon before, if its keeper has passed it to this process. Raises MountError.
    Gives OK when all pages are released, and LEFT if another daemon is to go on. Where no keeper would start that one,
    this process becomes the keeper, and the call does not return.
    """
    with _Ending() as ending:
        try:
            if resumed := STATE in process.held:
                mount = _take_over(source, mountpoint, options, process.held)
            else:
                mount = _make(source, mountpoint, options)
        except TtmfsError as error:
            code = ExitCode.SYSTEM if isinstance(error, NotSupported) else ExitCode.FAILED
            raise MountError(str(error), code) from error
        # What becomes of the pages:               of a new mount             of one taken over
        #   it ended, by unmounting or a signal    released                   released
        #   RESTART                                left to the next daemon    left
        #   its connection was cut, not unmounted  left                       left
        #   it failed before it served             released, and unmounted    left, for another try
        #   an exception when it served            left                       left
        leave, session = resumed, None
        try:
            session = _Session(mount, options, ending, process)
            session.run()
            leave = session.leaving or (resumed and session.failure is not None)
        except BaseException:
            leave = resumed or (session is not None and session.served and ending.asked not in ENDING)
            if leave and not process.keeper:
                log.exception("a fault in ttmfs; please report it. Another daemon takes over")
            raise
        finally:
            if leave and not process.keeper and session is not None:
                process.become_keeper(session.kept())
            if not leave and process.keeper:
                with contextlib.suppress(OSError):  # it lets go of the connection too: that cuts off who waits still
                    process.keeper.tell("STOPPING=1", "FDSTOREREMOVE=1", f"FDNAME={CONNECTION}")
            os.close(mount.connection)
            if not resumed and (session is None or (session.mounted and not session.served)):
                mounting.unmount(mount.mountpoint)  # a start that failed leaves no mount behind
            mount.pool.close(leave=leave)
            mount.state.close()
    if session.failure:
        raise session.failure
    if not session.served and not resumed:
        if ending.asked:
            raise KeyboardInterrupt
        raise MountError(f"{mount.mountpoint} was unmounted before it could answer")
    return ExitCode.LEFT if session.leaving else ExitCode.OK


def _make(source: str, mountpoint: str, options: Options) -> _Mount:
    """A new mount of a new pool."""
    mountpoint = checked_mountpoint(mountpoint)
    if options.store and _lies_in(mountpoint, options.store):  # it would ask itself for the names there
        raise MountError(f"{mountpoint} lies within the store {options.store}; mount it elsewhere")
    with contextlib.ExitStack() as undo:
        store = make_store(options)
        undo.callback(store.close)
        pool = Pool(store, options)
        state = State.new(
            version=__version__,
            page_size=pool.page_size,
            backup_size=pool.backup_size,
            grain=store.block_size,
            temporary=store.temporary,
        )
        undo.callback(state.close)
        if not options.store or os.path.realpath(options.store) != mountpoint:
            mounting.warn_of_hiding(mountpoint)
        connection = _connected(source, mountpoint, options, state)
        undo.pop_all()
    return _Mount(mountpoint, connection, pool, state, begun=False)


def _take_over(source: str, mountpoint: str, options: Options, held: dict[str, int]) -> _Mount:
    """The mount of a daemon before, from what its keeper holds. Touches nothing below the mount point."""
    state = State(held[STATE])
    if STORE not in held:
        raise MountError(
            "the keeper was killed when it had not got the pages yet, and the daemon with it: they are lost"
        )
    if (size := state.header["page_size"]) != options.page_size:
        raise MountError(
            f"the running mount has pages of {size} bytes, not of {options.page_size}: give page_size={size}"
        )
    if size := state.get("size"):  # of a directory it was changed since
        options = dataclasses.replace(options, size=size)
    failed = [int(id) for id in state.keys("unsynced")]
    store = resume_store(held, options, temporary=state.header["temporary"], failed=failed)
    pool = Pool(store, options, state.header["backup_size"])
    state.set("restarts", state.get("restarts") + 1)
    if words := state.take_last_words():
        log.error("the daemon before died: %s", words)
    if CONNECTION in held:
        log.info("taking over %s: no page and no open file is lost", mountpoint)
        return _Mount(mountpoint, held[CONNECTION], pool, state, begun=True)
    state.forget_unfinished()  # who waited for it got an error
    before = state.header["device"]
    if device_at(mountpoint) == before and is_dead(mountpoint):
        mounting.unmount(mountpoint)
    elif (over := mounted_at(mountpoint)) and before in (m.device for m in mounts() if m.path == mountpoint):
        raise MountError(f"{over.type} is mounted over {mountpoint}, which is to be mounted anew: unmount that first")
    connection = _connected(source, mountpoint, options, state)
    log.warning("mounted %s anew over the pages that were kept: none is lost, files that were open are", mountpoint)
    return _Mount(mountpoint, connection, pool, state, begun=False)


def _connected(source: str, mountpoint: str, options: Options, state: State) -> int:
    """Mount, and note in the state what the kernel says first. Gives the connection."""
    connection = mounting.mount(source, mountpoint, options)
    try:
        first = os.read(connection, FUSE_MIN_READ_BUFFER)
        state.update(init=first.hex(), device=device_at(mountpoint))
    except BaseException as error:
        mounting.unmount(mountpoint)
        os.close(connection)
        if isinstance(error, OSError):
            raise MountError(f"{mountpoint} was unmounted before it could answer") from error
        raise
    return connection


class _Ending:
    """Waits for the signals that ask for the end, or for a restart.

    They are noted from the beginning, not raised: an exception between mounting and serving could come when no one
    knows yet whether there is a mount, or within trio. The first counts, further ones change nothing, up to the
    process' end.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._wake: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        for number in (*ENDING, RESTART):
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (*ENDING, RESTART):
            signal.signal(number, signal.SIG_IGN)  # an interpreter that ends would give back the system's handlers

    def _note(self, number: int, _: object) -> None:
        if self.asked in (None, RESTART):
            self.asked = signal.Signals(number)
        with contextlib.suppress(trio.RunFinishedError):  # it has ended already
            self._wake()

    async def wait(self) -> signal.Signals:
        """The first of them, as soon as it has come."""
        came, token = trio.Event(), trio.lowlevel.current_trio_token()
        self._wake = functools.partial(token.run_sync_soon, came.set, idempotent=True)  # as a signal handler may
        while not self.asked:
            await came.wait()
        return self.asked


def _lies_in(path: str, directory: str) -> bool:
    """Whether a path lies below a directory, by whatever names and mounts."""
    with contextlib.suppress(OSError):
        store = os.stat(directory)
        return any(os.path.samestat(os.stat(parent), store) for parent in Path(path).parents)
    return False


class _Session:
    """The serving of one connection. There is one a process: pyfuse3 keeps its session in globals."""

    def __init__(self, mount: _Mount, options: Options, ending: _Ending, process: Process) -> None:
        self._mount, self._process, self._ending = mount, process, ending
        self._connection, self._mountpoint, pool, state = mount.connection, mount.mountpoint, mount.pool, mount.state
        self._initialized = trio.Event()
        self.served = self.leaving = False  # whether requests were answered; whether another daemon is to go on
        self._resumed = STATE in process.held
        self._stopped, self._cut_off = trio.Event(), False  # the loop reads no more; the connection is of no use
        self.failure: MountError | None = None
        self._init = bytes.fromhex(state.header["init"])
        version = struct.unpack_from("<II", self._init, INIT_VERSION_OFFSET)
        self._resends = options.resend and version >= RESEND_SINCE
        self._session_fd = -1
        self._longest_poll = options.busy_poll * 1000
        self._busy_poll: BusyPoll | None = None
        metrics = self._metrics = Metrics(state)
        pool.blocking_io.done = metrics.count_page_in
        self._handover = self._offer_descriptors(options)

        async def stats() -> bytes:
            return await metrics.text(pool)

        async def config() -> bytes:
            return _config(options, pool, process, self._handover)

        texts = {STATS: stats, CONFIG: config}
        cache = KernelCache(mount.connection, version, pool.blocking_io.slices, resumed=mount.begun)
        tree = Tree(pool, texts, cache, state.progress)
        if mount.begun:
            tree.shared.mode_changes.note()  # the daemon before knew of which backups
        locks = None if pool.in_memory else pool.blocking_io.files
        requests = self._requests = Requests(state, metrics, tree.shared.refusals, locks, debug=options.debug)
        self._operations = Operations(tree, requests, init=self._connect)
        pool.store.remember = state.set
        if process.held and process.keeper and process.keeper.pid:
            pool.files.lead_paths_through(process.keeper.pid)

    def _offer_descriptors(self, options: Options) -> Handover | None:
        """A socket that gives out backups' descriptors, if there can be one and the store is fit for it."""
        store, runtime = self._mount.pool.store, "/run" if not os.geteuid() else os.environ.get("XDG_RUNTIME_DIR")
        if options.ro or not store.shares_files or not runtime:
            return None
        path = os.path.join(runtime, "ttmfs", f"{self._mount.state.header['device']}.socket")
        try:
            return Handover(
                self._mount.pool, path,
                owner=os.geteuid(), open_to_others=options.allow_other, count=self._metrics.count_handover,
            )  # fmt: skip
        except OSError as error:
            log.info("no descriptors are given to programs, which use .image instead: %s: %s", path, error.strerror)
            return None

    def run(self) -> None:
        """Serve until unmounted."""
        # With it libfuse gets a pipe large enough to splice(2) every request through: two system calls in place of one,
        # 2.6 of 17 us of a page operation. What that spares is one of three copies of a write by 1 MiB.
        system_calls.renounce(system_calls.CAP_SYS_RESOURCE)
        system_calls.touch_heap()
        first = _without_atomic_o_trunc(self._init)
        if self._process.keeper:
            self._mount.state.keep_last_words()
        if self._mount.begun:  # before anything is read: else a request could be carried out by two at once
            with contextlib.suppress(OSError):  # unmounted meanwhile, which the first read tells as well
                os.write(self._connection, NOTIFY_RESEND)
        feeder, session_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._session_fd = session_end.detach()
        with feeder:
            feeder.send(first)
            pyfuse3.init(self._operations, f"/dev/fd/{self._session_fd}", set())
            try:
                trio.run(self._main)
            finally:
                pyfuse3.close(unmount=False)
                if self._handover and (self._cut_off or not self.leaving):
                    self._handover.close()

    def _connect(self) -> None:
        """Called by libfuse when it has read FUSE_INIT, before it answers: from here on it talks to the kernel."""
        os.dup2(self._connection, self._session_fd, inheritable=False)
        self._initialized.set()
        if self._mount.begun:  # before a request is carried out again: to die of that is no failure to start
            self._begin_serving()

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_on_signal, nursery.cancel_scope)
            nursery.start_soon(self._say_ready, nursery.cancel_scope)
            nursery.start_soon(self._end_with_connection, nursery.cancel_scope)
            nursery.start_soon(self._report)
            if self._handover:
                nursery.start_soon(self._handover.serve)
            try:
                with self._busy_polling():
                    await pyfuse3.main(max_tasks=_most_waiting())
            except* ConnectionAbortedError:  # it ended just as a request was being read: fuse_dev_do_read()
                log.debug("the connection ended amid a request")
            self._stopped.set()

    async def _end_with_connection(self, serving: trio.CancelScope) -> None:
        """End when the loop does. Leave the pages to another daemon if the connection was cut and not unmounted.

        A loop whose connection was cut still waits for its requests, which may wait for a device.
        """
        while not self._stopped.is_set() and not has_ended(self._connection):
            with trio.move_on_after(LOOK_SECONDS):
                await self._stopped.wait()
        if (
            (self.served or self._resumed)
            and await was_cut_off(self._connection, self._mount.state.header["device"])
            and self._ending.asked not in ENDING
        ):
            self._cut_off = True
            log.warning(
                "the connection of %s was cut off, but it was not unmounted (an umount -f refused as busy, an abort "
                "or a time limit): no page is lost, and another daemon mounts it anew", self._mountpoint,
            )  # fmt: skip
            await self._drop_connection()
            self.leaving = True
            pyfuse3.terminate()
        else:
            await self._stopped.wait()
        serving.cancel()

    async def _drop_connection(self) -> None:
        """Have the keeper let the connection go, so that the next daemon mounts anew. Wait until it has heard."""
        pause, forget = FIRST_RETRY_SECONDS, f"FDSTOREREMOVE=1\nFDNAME={CONNECTION}"
        while (keeper := self._process.keeper) and not self._is_heard(keeper, forget):
            log.error("the keeper does not answer: the pages are safe as long as this process, %d, lives", os.getpid())
            await trio.sleep(pause)
            pause = min(2 * pause, KEEPER_RETRY_SECONDS)

    @contextlib.contextmanager
    def _busy_polling(self) -> Iterator[None]:
        """Have pyfuse3's loop wait for requests by polling, if that is asked for and this pyfuse3 lets us."""
        asleep = getattr(pyfuse3, WAIT, None)
        if not self._longest_poll:
            yield
        elif not inspect.iscoroutinefunction(asleep) or inspect.signature(asleep).parameters:
            log.warning("pyfuse3 %s has no %s() as it is known here: no busy polling", pyfuse3.__version__, WAIT)
            yield
        else:
            self._busy_poll = BusyPoll(
                self._session_fd, asleep, self._longest_poll,
                lambda: self._requests.waiting or self._ending.asked,
                self._metrics.values, self._metrics.place("busy poll hits"), self._metrics.place("busy poll misses"),
            )  # fmt: skip
            before = signal.signal(signal.SIGALRM, self._busy_poll.alarm)
            setattr(pyfuse3, WAIT, self._busy_poll.wait)
            try:
                yield
            finally:
                setattr(pyfuse3, WAIT, asleep)
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    async def _say_ready(self, serving: trio.CancelScope) -> None:
        await self._initialized.wait()
        if self._busy_poll and not self._busy_poll.called:
            log.warning("pyfuse3 %s does not call its %s(): no busy polling", pyfuse3.__version__, WAIT)
        if self._ending.asked:
            return
        _lock_memory()
        if not self._mount.begun:
            self.failure = await self._unanswered() or self._unkept()
            if self._ending.asked:
                return
            if self.failure:
                serving.cancel()
                return
            self._begin_serving()
        if self._process.keeper:
            await self._watch_keeper()

    async def _report(self) -> None:
        """Tell the keeper that this loop turns, which is the one that serves, and a service manager what is stored."""
        said = ""
        while keeper := self._process.keeper:
            if self.served:
                status = ""
                if keeper.pid is None:
                    room = self._mount.pool.room()
                    stored, size = format_size(room.stored), format_size(room.size)
                    status = f"STATUS=backups: {room.backups}, stored: {stored} of {size}"
                with contextlib.suppress(OSError):  # it is being restarted, or hangs itself: nobody may wait for that
                    keeper.tell("WATCHDOG=1", *[status] * (status != said), seconds=0)
                    said = status
            await trio.sleep(min(STATUS_SECONDS, keeper.watchdog or STATUS_SECONDS) if self.served else START_SECONDS)

    def _begin_serving(self) -> None:
        """Requests are answered from here on."""
        self.served = True
        if self._process.keeper:
            self._give_to_keeper(self._process.keeper, besides=self._process.held)
        log.info("serving %s", self._mountpoint)  # known to all: a signal from here on is no interrupted start
        self._process.ready()

    async def _unanswered(self) -> MountError | None:
        """Have another process open a file of the mount and close it; what is wrong, if anything.

        The close matters too: it tells the kernel that there is nothing to flush, and that no later close need ask.
        Else closing a file would wait for a daemon that is dead.
        """
        command, why = ["head", "-c", "0", "--", os.path.join(self._mountpoint, ".stats")], "no answer"
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                done = await trio.run_process(
                    command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False,
                    env={**os.environ, "LC_ALL": "C"}, cwd="/",
                )  # fmt: skip
            except FileNotFoundError:
                return MountError("head is not installed; install the package coreutils", ExitCode.SYSTEM)
            except (OSError, RuntimeError) as error:  # no process, or no thread to start it in
                return MountError(f"no process can be started: {error}; ulimit -u may limit them", ExitCode.SYSTEM)
            if not done.returncode or b"Permission denied" in done.stderr:  # an answer as well
                return None
            why = done.stderr.decode(errors="replace").strip().rpartition(": ")[2]
        return MountError(f"{self._mountpoint} was mounted, but cannot be used: {why}")

    def _unkept(self) -> MountError | None:
        """What is wrong if our keeper died before the mount was there: whoever asked for the mount was told so."""
        keeper = self._process.keeper
        if not keeper or keeper.pid is None or self._process.held or self._is_heard(keeper):
            return None
        return MountError("the keeper was killed before the mount answered; mount again")

    def kept(self) -> dict[str, int]:
        """What the next daemon needs, by the keeper's names.

        The state first: who finds it without the rest knows that that is lost, and makes no empty mount in its place.
        """
        kept = {STATE: self._mount.state.fd, **self._mount.pool.store.descriptors()}
        if self._resends and not self._cut_off:
            kept[CONNECTION] = self._connection
        return kept

    def _give_to_keeper(self, keeper: Keeper, besides: dict[str, int]) -> bool:
        """Have a keeper hold what the next daemon needs, but for what it holds, and know that this one serves."""
        kept = self.kept()
        try:
            keeper.keep({name: fd for name, fd in kept.items() if besides.get(name) != fd}, "READY=1\nWATCHDOG=1")
            if keeper.pid and not besides:
                self._mount.pool.files.lead_paths_through(keeper.pid)
        except OSError as error:
            log.warning("the keeper does not hear: %s", error)
            return False
        return True

    def _is_heard(self, keeper: Keeper, *lines: str) -> bool:
        """Whether a keeper lives, and has heard all that it was told, and now these lines."""
        try:
            keeper.keep({}, *lines)
        except OSError:
            return False
        return True

    async def _watch_keeper(self) -> None:
        """Have another keeper in place of one of our own that dies."""
        keeper, pause = self._process.keeper, 0.0
        while keeper and keeper.death is not None:
            if keeper.death >= 0:
                await trio.lowlevel.wait_readable(keeper.death)
            keeper.close()
            try:
                keeper = self._process.keeper = self._process.another_keeper()
            except OSError as error:
                log.error("no keeper: the pages are lost if this process dies now: %s", error.strerror)
                await trio.sleep(KEEPER_RETRY_SECONDS)
                continue
            log.warning("the keeper was killed: %s is another", keeper.pid)
            heard = self._give_to_keeper(keeper, besides={})
            pause = 0.0 if heard else min(KEEPER_RETRY_SECONDS, 2 * pause or FIRST_RETRY_SECONDS)
            await trio.sleep(pause)  # one that cannot even start is not to be started without end

    @property
    def mounted(self) -> bool:
        """Whether it is what is seen at the mountpoint: no one has unmounted it, or mounted over it."""
        device: str | None = self._mount.state.header["device"]
        return device_at(self._mountpoint) == device

    async def _end_on_signal(self, serving: trio.CancelScope) -> None:
        number = await self._ending.wait()
        while number == RESTART:
            if self._process.keeper and self.served and self._is_heard(self._process.keeper):
                log.info("%s: leaving %s to another daemon", number.name, self._mountpoint)
                self.leaving = True
                pyfuse3.terminate()
                serving.cancel()
                return
            log.warning("%s: there is no keeper to start another daemon just now", number.name)
            self._ending.asked = None
            number = await self._ending.wait()
        if self._process.keeper:
            with contextlib.suppress(OSError):
                self._process.keeper.tell("STOPPING=1")
        log.info("%s: unmounting %s", number.name, self._mountpoint)
        if self.mounted:
            await trio.to_thread.run_sync(mounting.unmount, self._mountpoint, limiter=trio.CapacityLimiter(1))
        await trio.sleep(LINGER_SECONDS)  # the loop ends by itself unless a client still has files open
        pyfuse3.terminate()
        serving.cancel()  # those who wait for swap or a disk


def _most_waiting() -> int:
    """How many requests may wait at once: fewer than MOST_WAITING if memory is scarce."""
    return max(LEAST_WAITING, min(MOST_WAITING, available() // SHARE // REQUEST_BYTES))


def _lock_memory() -> None:
    """Keep the daemon out of swap: it serves memory that others wait to be freed. As far as RLIMIT_MEMLOCK goes."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    try:
        system_calls.lock_memory(most)
    except OSError as error:
        log.debug("this process may be swapped out under pressure (RLIMIT_MEMLOCK is %d): %s", most, error.strerror)


def _without_atomic_o_trunc(init: bytes) -> bytes:
    """The kernel's FUSE_INIT as if it could not combine open and truncation.

    Of a file opened so it takes the size to be 0 until it asks again, but for a page that is never true: tar would
    store an empty page. As two requests, the second is answered with the size. (FUSE_ATOMIC_O_TRUNC in fuse_init_in)
    """
    message = bytearray(init)
    (flags,) = struct.unpack_from("<I", message, INIT_FLAGS_OFFSET)
    struct.pack_into("<I", message, INIT_FLAGS_OFFSET, flags & ~ATOMIC_O_TRUNC)
    return bytes(message)


def _config(options: Options, pool: Pool, process: Process, handover: Handover | None) -> bytes:
    """The options in force, as JSON, who serves, and where. The budget can have been changed since."""
    room = pool.room()
    now = {"size": room.size, "backup_size": pool.backup_size, "nr_inodes": room.files, "store": pool.store.directory}
    who = {"daemon_pid": os.getpid(), "keeper_pid": process.keeper.pid if process.keeper else None}
    where = {"descriptors": handover.path if handover else None}
    return json.dumps(options.as_dict() | now | who | where, indent=2).encode() + b"\n"
