"""A small Ceph for tests: one server of each kind with one filesystem, and clients that mount it with ceph-fuse.

The servers have a network namespace of their own, so tests that run at once do not meet. A mount is in the mount
namespace of the caller, so a test uses it as an ordinary directory. It needs root and the programs in PROGRAMS.
"""

import contextlib
import itertools
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from harness import mounts_below, run, wait_until

PROGRAMS = (
    "ceph",
    "ceph-fuse",
    "ceph-mds",
    "ceph-mgr",
    "ceph-mon",
    "ceph-osd",
    "ip",
    "monmaptool",
    "nsenter",
    "setpriv",
)
COMMAND_SECONDS, START_SECONDS, END_SECONDS = 60.0, 60.0, 10.0

ADDRESS, CLIENT_ADDRESS = "10.77.0.1", "10.77.1.{}"
"""Of the servers, and of a client with a host of its own. Nothing outside of the namespaces sees them."""

CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:{address}:3300]
public addr = {address}
ms bind msgr1 = false
auth cluster required = none
auth service required = none
auth client required = none
keyring = /dev/null

mon data = {directory}/mon
osd data = {directory}/osd
mgr data = {directory}/mgr
run dir = {directory}
crash dir = {directory}
# The servers' command lines say otherwise: "ceph tell" waits for ever for a server without this socket.
admin socket =
log to file = false
log to stderr = true
debug rocksdb = 0

# There is one OSD.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
# After a kill an OSD waits until the lease of its predecessor to serve reads has ended: 5 s, by default 16. (With 1 s,
# an OSD on a busy machine once let its own lease end, and served nothing from then on.) Clients and the MDS ask for the
# new OSD after 1 s without an answer, by default 10.
osd pool default read lease ratio = 0.25
objecter timeout = 1
objecter tick interval = 0.5
# A new MDS waits this many seconds for killed clients to come back.
mds reconnect timeout = 5
# The manager tells statfs(2) how much is free. It needs none of its modules for that, which take seconds to start.
mgr module path = {directory}/no-modules
# The defaults of 1 to 5 s delay each change of the cluster, of the MDS's state, and of the free space. A client that
# unmounts waits for a tick of the MDS.
paxos propose interval = 0.05
paxos min wait = 0.01
mds beacon interval = 0.5
mds tick interval = 0.5
mgr stats period = 1
mon mgr digest period = 1
# The monitor ends if less of the disk is free, in percent.
mon data avail warn = 1
mon data avail crit = 1

osd objectstore = {objectstore}
memstore device bytes = 1073741824
# memstore writes its objects to a file when the OSD shuts down, but not when it shuts down fast.
osd fast shutdown = false
bluestore block size = 2147483648
bluestore cache autotune = false
bluestore cache size = 67108864
"""


def missing_programs() -> list[str]:
    """The programs that this module needs and that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name)]


def has_ended(pid: int) -> bool:
    """Whether a process has ended. Its parent may not have reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Host:
    """A network namespace with a host name, and the processes in it, for the time of a ``with``.

    Its shell is the parent of the processes: a process that one test starts for others is then no child that it leaves.
    The kernel kills them if the shell ends, and the shell ends if this process does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._running: set[int] = set()

    def __enter__(self) -> Self:
        self._shell = subprocess.Popen(
            ["unshare", "--net", "--uts", "sh"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # an interrupt of the tests must not end it before the mounts
        )
        try:
            self.pid = int(self._ask("echo $$"))
            self.run("hostname", self.name)
            self.run(*"ip link set lo up".split())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for pid in list(self._running):
                self.end(pid)
        finally:
            with self._shell:
                self._shell.kill()

    def _ask(self, command: str) -> str:
        """Have the shell run a command that writes one line."""
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.write(f"{command}\n".encode())
        assert select.select([self._shell.stdout], [], [], COMMAND_SECONDS)[0], f"no answer to {command}"
        return self._shell.stdout.readline().decode()

    def start(self, words: Iterable[object], log: Path) -> int:
        """Start a process in the background. It adds its output to a file. Returns its process id."""
        command = shlex.join(["setpriv", "--pdeathsig", "KILL", *map(str, words)])
        pid = int(self._ask(f"{command} >>{shlex.quote(str(log))} 2>&1 </dev/null & echo $!"))
        self._running.add(pid)
        return pid

    def end(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process that was started there, and wait for its end."""
        if pid in self._running:
            self._running.remove(pid)
            self._ask(f"kill -{number.value} {pid}; wait {pid} 2>/dev/null; echo")

    def words(self, *words: object) -> list[str]:
        """The command line that runs a program there, in the caller's mount namespace."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", f"--uts=/proc/{self.pid}/ns/uts", *map(str, words)]

    def run(self, *words: object, code: int = 0, **more: Any) -> str:
        """Run a program there, which must end with a status. Returns both output streams."""
        return run(shlex.join(self.words(*words)), code=code, **more)


class Ceph:
    """A running Ceph with an empty filesystem, for the time of a ``with``.

    memstore keeps objects in memory, and in a file only from an orderly end of the OSD to its next start. bluestore
    outlasts a kill, in a sparse file, but takes some seconds longer to start.

    `settings` are lines of ceph.conf, such as {"mds reconnect timeout": 5}.
    """

    def __init__(
        self,
        objectstore: Literal["memstore", "bluestore"] = "memstore",
        *,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.objectstore = objectstore
        self.host = Host("servers")
        self._settings = settings or {}
        self._pids: dict[str, int] = {}
        self._active_mds = 0
        self.numbers = itertools.count(1)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self.directory = Path(tempfile.mkdtemp(prefix="ttmfs-ceph-", dir="/var/tmp"))
            undo.callback(shutil.rmtree, self.directory)
            undo.enter_context(self.host)
            self._set_up()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _set_up(self) -> None:
        fsid, osd = uuid.uuid4(), uuid.uuid4()
        text = CONFIGURATION.format(fsid=fsid, address=ADDRESS, directory=self.directory, objectstore=self.objectstore)
        text += "[global]\n" + "".join(f"{name} = {value}\n" for name, value in self._settings.items())
        self.configuration.write_text(text)
        self.host.run(*f"ip address add {ADDRESS} dev lo".split())
        for name in "mon", "mgr", "osd", "no-modules":
            (self.directory / name).mkdir()
        monmap = self.directory / "monmap"
        run(f"monmaptool --create --fsid {fsid} --addv m [v2:{ADDRESS}:3300] {monmap}")
        self.host.run("ceph-mon", "-c", self.configuration, "--mkfs", "-i", "m", "--monmap", monmap)
        self._start("mon", "m")
        self._start("mgr", "x")
        self.command(f"osd new {osd} 0")
        self.host.run("ceph-osd", "-c", self.configuration, "--mkfs", "-i", 0, "--osd-uuid", osd)
        self.start_osd()
        self.command("osd pool create metadata 1")
        self.command("osd pool create data 4")
        self.command("fs new fs metadata data")
        self.start_mds()

        def has_space() -> bool:
            return bool(json.loads(self.command("df --format json"))["stats"]["total_avail_bytes"])

        wait_until(has_space, "the manager to know the free space", START_SECONDS)

    @property
    def configuration(self) -> Path:
        return self.directory / "ceph.conf"

    def pid(self, kind: Literal["mon", "mgr", "osd", "mds"]) -> int:
        """The process id of a server."""
        return self._pids[kind]

    def command(self, words: str) -> str:
        """Run a command of ceph(8), and return its output."""
        command = ["ceph", "-c", self.configuration, "--connect-timeout", 20, *shlex.split(words)]
        done = subprocess.run(
            self.host.words(*command), capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
        assert not done.returncode, f"ceph {words}: {done.stderr}\n{self._ended()}"
        return done.stdout

    def _start(self, kind: str, name: str) -> None:
        socket = f"--admin-socket={self.directory}/{kind}.socket"
        words = [f"ceph-{kind}", "-c", self.configuration, "-f", "-i", name, socket]
        self._pids[kind] = self.host.start(words, self.directory / f"{kind}.log")

    def _ended(self) -> str:
        """The ends of the logs of servers that have ended."""
        logs = {kind: self.directory / f"{kind}.log" for kind, pid in self._pids.items() if has_ended(pid)}
        return "\n".join(f"{kind} has ended: {log.read_text()[-2000:]}" for kind, log in logs.items())

    def stop_osd(self) -> None:
        """Stop the OSD: reads and writes of objects wait."""
        os.kill(self.pid("osd"), signal.SIGSTOP)

    @property
    def osd_is_stopped(self) -> bool:
        return "\nState:\tT" in Path(f"/proc/{self.pid('osd')}/status").read_text()

    def continue_osd(self) -> None:
        os.kill(self.pid("osd"), signal.SIGCONT)

    def kill_osd(self) -> None:
        """Kill the OSD. memstore would lose all objects."""
        assert self.objectstore != "memstore"
        self.host.end(self._pids.pop("osd"))

    def end_osd(self) -> None:
        """End the OSD in an orderly way, as a restart of its machine does."""
        self.host.end(self._pids.pop("osd"), signal.SIGTERM)

    def start_osd(self) -> None:
        self._start("osd", "0")

    def kill_mds(self) -> None:
        self.host.end(self._pids.pop("mds"))

    def start_mds(self) -> None:
        """Start the MDS, and wait until it serves the filesystem. The monitor still lists one that was killed."""
        self._start("mds", "a")
        before = self._active_mds

        def active() -> bool:
            assert not self._ended(), self._ended()
            filesystem = json.loads(self.command("mds stat --format json"))["fsmap"]["filesystems"][0]
            states = {info["gid"]: info["state"] for info in filesystem["mdsmap"]["info"].values()}
            self._active_mds = next((id for id, state in states.items() if state == "up:active"), 0)
            return self._active_mds not in (0, before)

        wait_until(active, "the MDS to be active", START_SECONDS)

    def sessions(self) -> list[dict[str, Any]]:
        """What the MDS knows of its clients."""
        found: list[dict[str, Any]] = json.loads(self.command("tell mds.a session ls"))
        return found

    def evict(self, client: "Client") -> None:
        """Have the MDS end a client's session, and have all servers refuse the client from now on."""
        self.command(f"tell mds.a session evict id={client.id}")


class Client:
    """A mount of a Ceph on a directory, which is made, for the time of a ``with``.

    `host` is the host name of a client with a network of its own, which :meth:`cut` can cut. Without it, the client
    runs where the servers run. `options` are options of ceph-fuse, such as {"client_oc": "false"}.
    """

    def __init__(
        self, ceph: Ceph, directory: Path, *, host: str | None = None, options: Mapping[str, object] | None = None
    ) -> None:
        self.ceph, self.path = ceph, directory
        self.host = Host(host) if host else ceph.host
        self._options = options or {}
        self._undo = contextlib.ExitStack()
        self._link, self._is_cut = "", False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            if self.host is not self.ceph.host:
                undo.enter_context(self.host)
                self._connect()
            self.path.mkdir()
            undo.callback(self.path.rmdir)
            self._mount()
            undo.callback(self._unmount)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _connect(self) -> None:
        number = next(self.ceph.numbers)
        self._link, address = f"client{number}", CLIENT_ADDRESS.format(number)
        servers, ends = self.ceph.host, (ADDRESS, address)
        servers.run("ip", "link", "add", self._link, "type", "veth", "peer", "eth0", "netns", self.host.pid)
        for host, link, (own, peer) in (servers, self._link, ends), (self.host, "eth0", ends[::-1]):
            host.run("ip", "address", "add", own, "peer", peer, "dev", link)
            host.run("ip", "link", "set", link, "up")

    def _mount(self) -> None:
        options = [f"--{name}={value}" for name, value in self._options.items()]
        words = ["ceph-fuse", "-c", self.ceph.configuration, "-f", *options, self.path]
        self._log = self.ceph.directory / f"client-{next(self.ceph.numbers)}.log"
        self.pid = self.host.start(words, self._log)

        def mounted() -> bool:
            assert not has_ended(self.pid), f"ceph-fuse has ended: {self._log.read_text()}"
            return self._is_mounted()

        try:
            wait_until(mounted, "ceph-fuse", START_SECONDS)
        except BaseException:
            self._unmount()
            raise

    def _is_mounted(self) -> bool:
        return str(self.path) in mounts_below(self.path)

    def _unmount(self) -> None:
        """Unmount it. If ceph-fuse does not end, it is killed, and only a client that is cut off may not end."""
        # It is in use for a moment after the mount: ceph-fuse then tries whether it can remount.
        path = shlex.quote(str(self.path))
        patient = f"for i in $(seq 50); do umount {path} && exit; sleep 0.1; done; exit 1"
        with subprocess.Popen(["sh", "-c", patient], stderr=subprocess.DEVNULL) as process:
            with contextlib.suppress(AssertionError):
                wait_until(lambda: has_ended(self.pid) or process.poll(), "ceph-fuse to end", END_SECONDS)
            ended = has_ended(self.pid)
            if self._is_mounted():  # only force ends the connection, and so the requests that wait for ceph-fuse
                subprocess.run(["umount", "-f", "-l", self.path], capture_output=True, check=False)
            process.kill()
        self.host.end(self.pid)
        assert ended or self._is_cut, f"{self.path} was in use, or ceph-fuse did not end: {self._log.read_text()}"

    @property
    def id(self) -> int:
        """The number by which the servers know it."""
        sessions = self.ceph.sessions()
        return next(int(s["id"]) for s in sessions if s["client_metadata"]["mount_point"] == str(self.path))

    def kill(self) -> None:
        """Kill ceph-fuse. What the MDS granted it, it keeps until the MDS evicts it, by default after 60 s."""
        self.host.end(self.pid)

    def cut(self) -> None:
        """Cut its network: what it sends and what is sent to it is lost."""
        self._is_cut = True
        self.ceph.host.run("ip", "link", "set", self._link, "down")

    def join(self) -> None:
        """Join its network again."""
        self._is_cut = False
        self.ceph.host.run("ip", "link", "set", self._link, "up")

    def run(self, words: Iterable[object], *, code: int = 0) -> str:
        """Run a command there, in its directory. It must end with a status. Returns both output streams."""
        return self.host.run(*words, code=code, cwd=self.path)

    def popen(self, words: Iterable[object], **more: Any) -> "subprocess.Popen[Any]":
        """Start a command there, in its directory."""
        return subprocess.Popen(self.host.words(*words), cwd=self.path, **more)
