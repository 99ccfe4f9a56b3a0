"""One mount from its start to its end: the kernel's first message, the loop that serves, signals, and the end.

libfuse does not mount. fusermount3 does, for root and users alike, and passes the connection to us. The daemon reads it
itself (ttmfs.fuse.reading_loop). libfuse is given one end of a socket pair, which holds the kernel's first message,
FUSE_INIT, and later the few requests that are left to pyfuse3. So the same code serves a connection whose FUSE_INIT
another process read.

That is how a daemon takes over: the keeper has the connection, the store and the state of the previous one. Before the
daemon reads, it has the kernel send all unanswered requests again (FUSE_NOTIFY_RESEND, Linux 6.9). Where the kernel
cannot, the keeper does not hold the connection: it ends with the daemon, and the next one mounts anew over the same
store.

The daemon never touches the mount itself, nor holds a descriptor of it: it would wait for itself, unkillable.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
from functools import partial

import trio

from ..fuse.backing_files import BackingFiles
from ..fuse.busy_poll import BusyPoll
from ..fuse.compiled import COMPILED, PYTHON, compiled_requests, loop_of
from ..fuse.in_flight import InFlight
from ..fuse.inodes import CONFIG, STATS
from ..fuse.kernel_cache import KernelCache
from ..fuse.metrics import Metrics
from ..fuse.operations import Operations
from ..fuse.page_cache import PageCache
from ..fuse.page_requests import PageRequests
from ..fuse.reading_loop import ReadingLoop
from ..fuse.requests import Failures, Requests
from ..fuse.through_pyfuse3 import ThroughPyfuse3
from ..fuse.tree import Tree
from ..linux import system_calls
from ..linux.fuse_protocol import NOTIFY_RESEND
from ..linux.memory import available
from ..linux.splice import Splice
from ..options import ExitCode, Options
from ..recovery.keeper_client import extended
from ..recovery.keeper_protocol import CONNECTION, ENDING, STATE
from ..stores.blocking_io import SHARE
from . import mounting
from .background import Process
from .connection import has_ended, was_cut_off
from .inherited import lock_memory
from .keeping import INIT_VERSION, Keeping
from .mounting import MountError
from .start import Mount, start

__all__ = ["serve"]

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""The most requests that may wait for swap or a disk at once before the loop reads no more."""

LEAST_WAITING, REQUEST_BYTES = 500, 12 << 10
"""How many may wait however little memory there is, and how many bytes each takes besides its data."""

ANSWER_SECONDS = 10.0
LINGER_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""How late the end of the connection is noticed if requests in flight keep the loop from ending."""


def serve(source: str, mountpoint: str, options: Options, process: Process) -> ExitCode:
    """Serve a mount until it is unmounted or a signal asks for the end.

    The mount is a new one, or the previous daemon's if its keeper passed it to this process. Gives OK when all pages
    are released, and LEFT if another daemon is to continue. Without a keeper that would start it, this process becomes
    the keeper, and the call does not return. Raises MountError.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the session waits for them: is there a mount yet?
    for number in ENDING:
        signal.signal(number, lambda *_: None)  # the first counts; later ones change nothing
    resumed = STATE in process.held
    with extended(process.keeper if options.store else None):
        mount = start(source, mountpoint, options, process.held)
    leave, session = resumed, None
    try:
        session = _Session(mount, options, process)
        session.run()
        leave = session.leaving or (resumed and session.failure is not None)
    except BaseException:
        leave = resumed or (session is not None and session.served and not session.signal)
        if leave and not process.keeper:
            log.exception("a fault in ttmfs; please report it. Another daemon takes over")
        raise
    finally:
        _end(mount, process, session, leave=leave, resumed=resumed)
    if session.failure:
        raise session.failure
    if not session.served and not resumed:
        if session.signal:
            raise KeyboardInterrupt
        raise MountError(f"{mount.mountpoint} was unmounted before it could answer")
    return ExitCode.LEFT if session.leaving else ExitCode.OK


def _end(mount: Mount, process: Process, session: "_Session | None", *, leave: bool, resumed: bool) -> None:
    """Leave the pages to another daemon, or release them.

    ==========================================  ==========================  ===================
    how the session ended                       a new mount                 one taken over
    ==========================================  ==========================  ===================
    unmounted, or by a signal                   released                    released
    the connection was cut, but not unmounted   left                        left
    it failed before it served                  released, and unmounted     left, to try again
    an exception while it served                left                        left
    ==========================================  ==========================  ===================
    """
    if session and leave and not process.keeper:
        process.become_keeper(session.keeping.descriptors())
    if session and not leave:
        session.keeping.end()
    os.close(mount.connection)
    if not resumed and (session is None or (mount.is_visible and not session.served)):
        mounting.unmount(mount.mountpoint)  # a start that failed leaves no mount behind
    mount.pool.close(leave=leave)
    mount.state.close()


class _Session:
    """Serves one connection. A process has one session: pyfuse3 keeps it in globals."""

    def __init__(self, mount: Mount, options: Options, process: Process) -> None:
        self._mount, self._process = mount, process
        self.keeping = Keeping(mount, process)
        self.served = self.leaving = False  # whether requests were answered; whether another daemon is to continue
        self.failure: MountError | None = None
        self.signal = 0  # that asked for the end
        self._stopped = trio.Event()  # the loop reads no more
        self._cut_off = False  # the connection is of no use any more
        self._metrics = Metrics(mount.state.record.restarts, loop_of(mount.pool))
        mount.pool.blocking_io.on_page_in = self._metrics.count_page_in
        self._backing: BackingFiles | None = None
        self._make_loop(options)
        self._follow_log_level(options)
        mount.pool.store.remember = mount.state.update

    def _make_loop(self, options: Options) -> None:
        """The parts that read and answer requests."""
        pool, state, taken_over = self._mount.pool, self._mount.state, self._mount.taken_over
        connection, metrics, init = self._mount.connection, self._metrics, bytes.fromhex(state.record.init)

        async def stats() -> bytes:
            return await self._metrics.text(pool)

        async def config() -> bytes:
            return self._config(options)

        cache = KernelCache(connection, INIT_VERSION.unpack_from(init), pool.blocking_io.slices, resumed=taken_over)
        offers_shmem = options.shmem and not options.uid_size and pool.store.hands_out_files
        if passthrough := offers_shmem and pool.store.shares_files:
            self._backing = BackingFiles(connection, state, pool.files)
            pool.store.ended = self._backing.close
        texts = {STATS: stats, CONFIG: config}
        tree = Tree(pool, texts, cache, state.progress, backing=self._backing, offers_shmem=offers_shmem)
        if taken_over:
            tree.shared.mode_changes.note()  # the previous daemon did not record which backups changed
        self._log_level = tree.shared.log_level
        in_flight, failures = InFlight(state), Failures(metrics, tree.shared.refusals)
        handlers = PageRequests(tree, PageCache(connection, state.cached))
        self._splice = Splice(connection)
        requests = Requests(self._splice, handlers, in_flight, metrics, failures, pool.store.file_locks)
        self._others = ThroughPyfuse3(connection, in_flight, init, taken_over=taken_over, passthrough=passthrough)
        self._others.begin(Operations(tree, metrics, failures))
        busy_poll, compiled = BusyPoll(options.busy_poll * 1000, metrics.busy_poll), None
        if metrics.loop == COMPILED:
            compiled = partial(compiled_requests, connection, state, handlers, metrics)
        self._loop = ReadingLoop(connection, requests, self._others, busy_poll, _most_waiting(), compiled)
        self._failures = failures

    def _follow_log_level(self, options: Options) -> None:
        """Begin with the level that the daemon before had, or the option's. Python alone logs each request."""

        def follow(level: str) -> None:
            self._failures.debug = level == "debug"
            self._metrics.loop = COMPILED if self._loop.use_compiled(level != "debug") else PYTHON

        state = self._mount.state
        self._log_level.followers.append(follow)
        self._log_level.change(state.record.log_level or options.log_level)
        self._log_level.followers.append(lambda level: state.update(log_level=level))

    def _config(self, options: Options) -> bytes:
        """The options in force, and the processes that serve, as JSON."""
        pool, keeper = self._mount.pool, self._process.keeper
        room = pool.room()  # the budget may have changed since the start
        sizes = {"size": room.size, "backup_size": pool.backup_size, "nr_inodes": room.files}
        where = {"store": pool.store.directory, **pool.store.holder}
        who = {"daemon_pid": os.getpid(), "keeper_pid": keeper.pid if keeper else None, "loop": self._metrics.loop}
        logs = {"log_to": self._process.log_to, "log_level": self._log_level.level}
        standby = {"standby": "on" if self._process.has_standby else "off"}
        return json.dumps(options.as_dict() | sizes | where | who | standby | logs, indent=2).encode() + b"\n"

    def run(self) -> None:
        """Serve until the end."""
        # With it programs could use what a full filesystem keeps for root (see ttmfs.fuse.backing_files). And libfuse
        # would get a pipe large enough to splice(2) every request through.
        system_calls.renounce(system_calls.CAP_SYS_RESOURCE)
        system_calls.touch_heap()
        if self._process.keeper:
            self._mount.state.keep_last_words()
        if self._mount.taken_over:  # before anything is read: else two could carry out the same request
            if self._backing:
                self._backing.work()
            with contextlib.suppress(OSError):  # it was unmounted, which the first read finds out as well
                os.write(self._mount.connection, NOTIFY_RESEND)
        try:
            trio.run(self._main)
        finally:
            for number in ENDING:
                signal.signal(number, signal.SIG_IGN)  # else the end of the interpreter restores the defaults
            self._others.close()
            self._splice.close()

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_on_signal, nursery.cancel_scope)
            nursery.start_soon(self._end_with_connection, nursery.cancel_scope)
            nursery.start_soon(self._begin, nursery)
            if self._mount.taken_over:  # before a request is carried out again: to die of that is no failure to start
                self._begin_serving()
            await self._loop.serve()
            self._stopped.set()

    async def _begin(self, nursery: trio.Nursery) -> None:
        """Say that the mount answers, once it does; then keep a keeper."""
        await self._others.initialized.wait()
        lock_memory()
        if not self._mount.taken_over:
            failure = await self._unanswered()
            if self.signal:
                return
            if failure:
                self.failure = failure
                nursery.cancel_scope.cancel()
                return
            self._begin_serving()
        nursery.start_soon(self.keeping.report)
        nursery.start_soon(self._leave_lost_store, nursery.cancel_scope)
        nursery.start_soon(self.keeping.replace_dead_keepers)

    def _begin_serving(self) -> None:
        """Requests are answered from here on."""
        self.served = True
        self.keeping.begin_serving()
        self._process.ready()
        log.info("serving %s", self._mount.mountpoint)  # known to all: a signal from here on is no interrupted start

    async def _unanswered(self) -> MountError | None:
        """Have another process open and close a file of the mount; what is wrong, if anything.

        The close tells the kernel that there is nothing to flush, so that no later close asks. Else closing a file
        would wait for a daemon that is dead.
        """
        command, why = ["head", "-c", "0", "--", os.path.join(self._mount.mountpoint, ".stats")], "no answer"
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                done = await trio.run_process(
                    command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False,
                    env={**os.environ, "LC_ALL": "C"}, cwd="/",
                )  # fmt: skip
            except (OSError, RuntimeError) as error:  # no process, or no thread to start it in
                return MountError(f"no process can be started: {error}; ulimit -u may limit them", ExitCode.SYSTEM)
            if not done.returncode or b"Permission denied" in done.stderr:  # an answer as well
                return None
            why = done.stderr.decode(errors="replace").strip().rpartition(": ")[2]
        return MountError(f"{self._mount.mountpoint} was mounted, but cannot be used: {why}")

    async def _end_with_connection(self, serving: trio.CancelScope) -> None:
        """End when the loop does. Leave the pages to another daemon if the connection was cut and not unmounted.

        A loop whose connection was cut still waits for its requests, which may wait for a device.
        """
        connection = self._mount.connection
        while not self._stopped.is_set() and not has_ended(connection):
            with trio.move_on_after(LOOK_SECONDS):
                await self._stopped.wait()
        may_have_pages = self.served or STATE in self._process.held
        was_cut = may_have_pages and await was_cut_off(connection, self._mount.state.record.device)
        if was_cut and not self.signal:
            self._cut_off = True
            log.warning(
                "the connection of %s was cut off, but it was not unmounted (an umount -f refused as busy, an abort "
                "or a time limit): no page is lost, and another daemon mounts it anew", self._mount.mountpoint,
            )  # fmt: skip
            await self.keeping.drop(CONNECTION)
            self.leaving = True
            self._loop.end()
        else:
            await self._stopped.wait()
        serving.cancel()

    async def _leave_lost_store(self, serving: trio.CancelScope) -> None:
        """End at once when another machine has the store. The next daemon gets none of this one's descriptors of it."""
        store = self._mount.pool.store
        await store.wait_until_lost()
        log.error(
            "the store %s is lost: another machine may have taken it. %s is mounted anew once the store can be had",
            store.directory, self._mount.mountpoint,
        )  # fmt: skip
        self.keeping.store_is_lost = True
        await self.keeping.drop(CONNECTION, *store.descriptors())
        self.leaving = True
        self._loop.end()
        serving.cancel()

    async def _end_on_signal(self, serving: trio.CancelScope) -> None:
        with trio.open_signal_receiver(*ENDING) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            self.signal = await anext(signals)
        self.keeping.stop()
        log.info("%s: unmounting %s", signal.Signals(self.signal).name, self._mount.mountpoint)
        if self._mount.is_visible:
            await trio.to_thread.run_sync(mounting.unmount, self._mount.mountpoint, limiter=trio.CapacityLimiter(1))
        await trio.sleep(LINGER_SECONDS)  # the loop ends by itself unless a client still has files open
        self._loop.end()
        serving.cancel()  # requests that wait for swap or a disk


def _most_waiting() -> int:
    """How many requests may wait at once: fewer than MOST_WAITING if memory is scarce."""
    return max(LEAST_WAITING, min(MOST_WAITING, available() // SHARE // REQUEST_BYTES))
