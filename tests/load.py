"""A mixed load on a mount by several processes.

Each knows the right content, and fails at the first difference::

    with Load(mountpoint, clients=8, seed=1) as load:
        ...                       # kill daemons, wait; load.steps() grows as long as clients are answered
        load.check()              # raises AssertionError at once if a client has failed
    print(load.result)            # what was done; leaving the ``with`` verified it all, and removed it from the mount

or, for a time, ``run_load(mountpoint, seconds)``. The mount needs room for 12 MiB (or 200 larger pages) and five files
for each client. Nothing else may use backups of the names used here: ``c0``, ``d0``, ``e0``, ``l0`` ... and ``races``,
``r0`` ....

A client makes the calls that programs make, and knows the right outcome of each, errors included: pages by name, in
``.image`` and through ``.shmem``, descriptors held open, directories, listings in many steps, and races of all clients
for one name, each with exactly one winner. The end reads every answered write again. No call may fail unexpectedly,
whatever happens to the daemon.

Run by its path, this file is a client.
"""

import contextlib
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EEXIST, ENOENT, ENOTEMPTY, ESTALE
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Load", "Result", "run_load"]

STOP, FIRST_CLIENT, NUMBERS = 0, 1, 2
"""On the board, memory that all share: whether to stop; then of each client its steps and its races."""

RACE_NAMES = 50
RACE_PATIENCE = 0.1
FINISH_SECONDS = 60.0
LISTED_BYTES, OWN_BYTES = 10 << 20, 1 << 20
MOST_LISTED, MOST_OWN = 2500, 256
MOST_HELD = 8


@dataclass
class Result:
    """What all clients did together."""

    seed: int
    steps: Counter[str] = field(default_factory=Counter)  # by kind
    pages: int = 0  # read again at the end
    listings: int = 0  # finished
    races: int = 0
    slowest: float = 0.0  # of all steps, in s


class Load:
    """Clients that load a mount for the time of a ``with``. The end raises AssertionError if anything was wrong."""

    def __init__(self, mountpoint: Path, *, clients: int = 8, seed: int = 0, shmem: bool = True, **popen: Any) -> None:
        """`shmem`: whether the clients may open that. `popen` is for subprocess, to let them be other users."""
        self.result = Result(seed)
        self._mountpoint, self._count, self._shmem, self._popen = mountpoint, clients, shmem, popen
        self._clients: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        (self._mountpoint / "races").mkdir()
        with contextlib.ExitStack() as undo:
            fd = os.memfd_create("load")
            undo.callback(os.close, fd)
            size = 8 * (FIRST_CLIENT + NUMBERS * self._count)
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
            self._board = memoryview(self._map).cast("Q")
            for number in range(self._count):
                words = (fd, number, self._count, self.result.seed, int(self._shmem), self._mountpoint)
                command = [sys.executable, "-I", __file__, *map(str, words)]
                self._clients.append(
                    subprocess.Popen(
                        command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True, **self._popen,
                    )
                )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board[STOP] = 1
        end = time.monotonic() + (FINISH_SECONDS if kind is None else 5)
        said, failed = [], []
        for number, client in enumerate(self._clients):
            try:
                out, err = client.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                failed.append(f"client {number} hangs:\n{_where(client.pid)}")
                client.kill()
                continue  # communicate() would wait for one that the kill does not reach
            if client.returncode:
                failed.append(f"client {number}: exit status {client.returncode}\n{out}{err}")
            else:
                said.append(json.loads(out))
        for client in self._clients:
            if client.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    client.communicate(timeout=5)
        self._board.release()
        self._map.close()
        if failed:
            raise AssertionError(f"seed {self.result.seed}:\n" + "\n".join(failed)) from error
        if kind is None:
            self._add_up(said)
            self._remove()

    def steps(self) -> int:
        """How many steps all clients have done."""
        return sum(self._board[FIRST_CLIENT::NUMBERS])

    def check(self) -> None:
        """Raise AssertionError if a client has ended."""
        ended = [number for number, client in enumerate(self._clients) if client.poll() is not None]
        assert not ended, f"clients {ended} have ended"

    def wait_for_steps(self, more: int = 1, seconds: float = 20.0) -> None:
        """Wait until clients have been answered again, or one has failed."""
        before, end = self.steps(), time.monotonic() + seconds
        while self.steps() < before + more:
            self.check()
            assert time.monotonic() < end, f"no client was answered for {seconds} s"
            time.sleep(0.002)

    def _remove(self) -> None:
        """Remove what the last race left: not all clients took part in it."""
        for page in (self._mountpoint / "races").iterdir():
            page.unlink()
        for directory in self._mountpoint.iterdir():
            if re.fullmatch(r"r[0-9]+|races", directory.name):
                directory.rmdir()

    def _add_up(self, said: list[dict[str, Any]]) -> None:
        winners = Counter[int]()
        for client in said:
            self.result.steps.update(client["steps"])
            self.result.pages += client["pages"]
            self.result.listings += client["listings"]
            self.result.races = max(self.result.races, client["races"])
            self.result.slowest = max(self.result.slowest, client["slowest"])
            winners.update(client["won"])
        wrong = {race: winners[race] for race in range(self.result.races) if winners[race] != 1}
        assert not wrong, f"seed {self.result.seed}: races, and how many won them: {wrong}"


def run_load(mountpoint: Path, seconds: float, *, clients: int = 8, seed: int = 0, **more: Any) -> Result:
    """Load a mount for a time. Returns what was done. Raises AssertionError if anything was wrong."""
    with Load(mountpoint, clients=clients, seed=seed, **more) as load:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load.check()
            time.sleep(0.05)
    return load.result


def _where(pid: int) -> str:
    """Where in the kernel a process is."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stack").read_text()
    return "unknown"


# --- a client ---


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """Expect an error."""
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise
    else:
        raise AssertionError(f"no error instead of {os.strerror(number)}")


class Listing:
    """A listing of pages in progress. Some pages are stored and dropped meanwhile."""

    def __init__(self, directory: str, present: set[int]) -> None:
        self.entries = os.scandir(directory)
        self.seen: list[int] = []
        self.lasting, self.possible = set(present), set(present)

    def take(self, most: int) -> bool:
        """Take some entries; False at the end."""
        for _ in range(most):
            if (entry := next(self.entries, None)) is None:
                self.entries.close()
                assert self.seen == sorted(set(self.seen)), "a page was listed twice, or out of order"
                assert self.lasting <= set(self.seen), f"not listed: {sorted(self.lasting - set(self.seen))[:9]}"
                assert set(self.seen) <= self.possible, f"listed: {sorted(set(self.seen) - self.possible)[:9]}"
                return False
            self.seen.append(int(entry.name))
        return True


class Client:
    """One process of the load. It knows pages by index, and their content by the writes that were answered."""

    def __init__(self, board: "memoryview[int]", number: int, count: int, seed: int, shmem: bool, mnt: str) -> None:
        self.board, self.number, self.count, self.mnt = board, number, count, mnt
        self.random = random.Random(f"{seed} {number}")
        self.page_size = int(os.getxattr(mnt, "user.ttmfs.page_size"))
        self.span = min(MOST_OWN, OWN_BYTES // self.page_size)
        self.listed = min(MOST_LISTED, LISTED_BYTES // self.page_size)
        self.pages: dict[int, bytearray] = {}
        self.held: list[tuple[int, int]] = []  # descriptor, index
        self.won: list[int] = []
        self.done, self.listings, self.slowest, self.verified = Counter[str](), 0, 0.0, 0
        self.name, self.other = f"{mnt}/c{number}", f"{mnt}/d{number}"
        self.long = f"{mnt}/l{number}"
        self.table: list[tuple[int, Callable[[], None]]] = [
            (6, self.create), (4, self.create_again), (10, self.write), (8, self.read), (3, self.unlink),
            (2, self.truncate), (6, self.image_write), (6, self.image_read), (1, self.drop), (8, self.hold),
            (8, self.held_write), (8, self.held_read), (6, self.directories), (3, self.rename), (10, self.list_on),
            (3, self.list_root), (3, self.attributes), (8, self.race), *[(8, self.shmem)] * shmem,
        ]  # fmt: skip
        for path, pages in (self.name, self.span), (self.long, self.listed):
            os.mkdir(path)
            os.setxattr(path, "user.ttmfs.size", b"%d" % (pages * self.page_size))
        with self.opened(f"{self.long}/.image") as image:
            data = self.random.randbytes(self.page_size) * self.listed
            assert os.pwrite(image, data, 0) == len(data)
        self.present = set(range(1, self.listed + 1))  # handles of the long one
        self.listing: Listing | None = None

    def run(self) -> None:
        """Do steps until told to stop. Then check everything that must exist, and remove it."""
        weights, steps = zip(*self.table, strict=True)
        while not self.board[STOP]:
            (step,) = self.random.choices(steps, weights)
            self.timed(step)
            self.board[FIRST_CLIENT + NUMBERS * self.number] += 1
        self.verify()
        self.remove()

    def timed(self, step: Callable[[], None]) -> None:
        start = time.monotonic()
        try:
            step()
        except BaseException as error:
            error.add_note(f"in step {step.__name__}, {sum(self.done.values())} steps done")
            raise
        self.done[step.__name__] += 1
        if step != self.race:  # which waits for others
            self.slowest = max(self.slowest, time.monotonic() - start)

    def report(self) -> dict[str, Any]:
        return {
            "steps": self.done, "won": self.won, "races": self.races, "pages": self.verified,
            "listings": self.listings, "slowest": self.slowest,
        }  # fmt: skip

    # --- what is used by several steps ---

    @contextlib.contextmanager
    def opened(self, path: str, flags: int = os.O_RDWR) -> Iterator[int]:
        fd = os.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def opened_memory(self) -> Iterator[int]:
        """A descriptor of the memory itself. Where it is a link, that leads nowhere once its daemon was killed."""
        try:
            fd = os.open(f"{self.name}/.shmem", os.O_RDWR)
        except FileNotFoundError:
            assert os.path.islink(f"{self.name}/.shmem")
            fd = os.open(f"{self.name}/.shmem", os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)

    def path(self, index: int) -> str:
        return f"{self.name}/{index + 1}"

    def stored(self) -> int | None:
        return self.random.choice(list(self.pages)) if self.pages else None

    def absent(self) -> int | None:
        index = self.random.randrange(self.span)
        return None if index in self.pages else index

    def part(self) -> tuple[int, bytes]:
        """An offset in a page, and data to write there: all of it, or some."""
        if self.random.random() < 0.5:
            return 0, self.random.randbytes(self.page_size)
        offset = self.random.randrange(self.page_size)
        return offset, self.random.randbytes(self.random.randint(1, self.page_size - offset))

    def know(self, index: int, offset: int, data: bytes) -> None:
        """Remember that data was stored at an offset from a page's beginning. It may go past the page's end."""
        position, end = index * self.page_size + offset, index * self.page_size + offset + len(data)
        while position < end:
            page, at = divmod(position, self.page_size)
            length = min(self.page_size - at, end - position)
            start = len(data) - (end - position)
            self.pages.setdefault(page, bytearray(self.page_size))[at : at + length] = data[start : start + length]
            position += length

    def known(self, offset: int, length: int) -> bytes:
        """The expected content of a range of the image."""
        first, last = offset // self.page_size, -(-(offset + length) // self.page_size)
        zeros = bytes(self.page_size)
        whole = b"".join(self.pages.get(index, zeros) for index in range(first, last))
        return whole[offset - first * self.page_size :][:length]

    def extent(self) -> tuple[int, int]:
        """A random offset in the image, and a length."""
        end = self.span * self.page_size
        offset = self.random.randrange(end)
        length = self.random.choice((self.page_size, 5 * self.page_size, 64 * self.page_size))
        return offset, self.random.randint(1, min(length, end - offset))

    def check(self, index: int, found: bytes, offset: int = 0) -> None:
        expected = self.pages[index][offset : offset + len(found)]
        assert found == expected, f"page {index} at {offset}: {found[:16]!r}... instead of {bytes(expected[:16])!r}..."

    # --- pages ---

    def create(self) -> None:
        if (index := self.absent()) is None:
            return
        fd = os.open(self.path(index), os.O_CREAT | os.O_EXCL | os.O_RDWR)
        self.pages[index] = bytearray(self.page_size)
        try:
            assert os.pread(fd, self.page_size + 1, 0) == bytes(self.page_size)
            offset, data = self.part()
            assert os.pwrite(fd, data, offset) == len(data)
            self.know(index, offset, data)
        finally:
            os.close(fd)

    def create_again(self) -> None:
        if (index := self.stored()) is None:
            return
        with refused(EEXIST):
            os.close(os.open(self.path(index), os.O_CREAT | os.O_EXCL | os.O_RDWR))
        with self.opened(self.path(index), os.O_CREAT | os.O_RDWR) as fd:
            self.check(index, os.pread(fd, self.page_size, 0))

    def write(self) -> None:
        if (index := self.stored()) is None:
            return
        offset, data = self.part()
        with self.opened(self.path(index), os.O_WRONLY | self.random.choice((0, 0, os.O_SYNC))) as fd:
            assert os.pwrite(fd, data, offset) == len(data)
            self.know(index, offset, data)
            if self.random.random() < 0.2:
                os.fsync(fd)

    def read(self) -> None:
        if (index := self.stored()) is None:
            return
        with self.opened(self.path(index), os.O_RDONLY) as fd:
            self.check(index, os.read(fd, self.page_size))
            assert os.fstat(fd).st_size == self.page_size

    def unlink(self) -> None:
        if (index := self.stored()) is None:
            return
        os.unlink(self.path(index))
        del self.pages[index]
        with refused(ENOENT):
            os.stat(self.path(index))
        with refused(ENOENT):
            os.unlink(self.path(index))

    def truncate(self) -> None:
        if (index := self.stored()) is None:
            return
        size = self.random.randrange(self.page_size)
        os.truncate(self.path(index), size)
        self.pages[index][size:] = bytes(self.page_size - size)

    def hold(self) -> None:
        """Open one more page and keep it open; close another."""
        if (index := self.stored()) is None:
            return
        self.held.append((os.open(self.path(index), os.O_RDWR), index))
        if len(self.held) > MOST_HELD:
            os.close(self.held.pop(self.random.randrange(MOST_HELD))[0])

    def held_write(self) -> None:
        if not self.held:
            return
        fd, index = self.random.choice(self.held)
        offset, data = self.part()
        if index not in self.pages:
            with refused(ESTALE):
                os.pwrite(fd, data, offset)
        else:
            assert os.pwrite(fd, data, offset) == len(data)
            self.know(index, offset, data)

    def held_read(self) -> None:
        if not self.held:
            return
        fd, index = self.random.choice(self.held)
        if index not in self.pages:
            with refused(ESTALE):
                os.pread(fd, self.page_size, 0)
        else:
            self.check(index, os.pread(fd, self.page_size, 0))

    # --- the whole backup ---

    def image_write(self) -> None:
        offset, length = self.extent()
        data = self.random.randbytes(length)
        with self.opened(f"{self.name}/.image", os.O_WRONLY) as fd:
            assert os.pwrite(fd, data, offset) == length
        self.know(0, offset, data)

    def image_read(self) -> None:
        offset, length = self.extent()
        with self.opened(f"{self.name}/.image", os.O_RDONLY) as fd:
            assert os.pread(fd, length, offset) == self.known(offset, length), f"image at {offset}, {length} bytes"

    def drop(self) -> None:
        """Drop a range of pages in one call, or all pages from one on."""
        first = self.random.randrange(self.span)
        if self.random.random() < 0.5:
            past = min(self.span, first + self.random.randint(1, 40))
            os.setxattr(self.name, "user.ttmfs.drop", b"%d-%d" % (first + 1, past))
        else:
            past = self.span
            os.truncate(f"{self.name}/.image", first * self.page_size)
        for index in range(first, past):
            self.pages.pop(index, None)

    def shmem(self) -> None:
        """Write through .shmem, only to stored pages: new pages would get names that clients learn late."""
        if (index := self.stored()) is None:
            return
        offset, data = self.part()
        with self.opened_memory() as fd:
            assert os.pwrite(fd, data, index * self.page_size + offset) == len(data)
            self.know(index, offset, data)
            self.check(index, os.pread(fd, self.page_size, index * self.page_size))
        with self.opened(self.path(index), os.O_RDONLY) as fd:
            self.check(index, os.pread(fd, self.page_size, 0))

    def attributes(self) -> None:
        assert int(os.getxattr(self.name, "user.ttmfs.pages")) == len(self.pages)
        assert os.stat(f"{self.name}/.image").st_size == self.span * self.page_size
        assert os.statvfs(self.mnt).f_namemax == 255

    # --- directories ---

    def directories(self) -> None:
        a, b = self.other, f"{self.mnt}/e{self.number}"
        os.mkdir(a)
        with refused(EEXIST):
            os.mkdir(a)
        if self.random.random() < 0.5:
            os.mkdir(b)
        os.rename(a, b)
        with refused(ENOENT):
            os.rename(a, b)
        with refused(ENOENT):
            os.rmdir(a)
        os.close(os.open(f"{b}/1", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        with refused(ENOTEMPTY):
            os.rmdir(b)
        os.unlink(f"{b}/1")
        os.rmdir(b)

    def rename(self) -> None:
        """Rename the backup with the pages. Its descriptors continue to work."""
        new = f"{self.mnt}/c{self.number}.{self.random.randrange(1000)}"
        if new != self.name:
            os.rename(self.name, new)
            self.name = new

    def list_on(self) -> None:
        """Read a part of a long listing, with changes between the parts."""
        if self.listing is None:
            self.listing = Listing(self.long, self.present)
        if not self.listing.take(self.random.randint(1, 600)):
            self.listing, self.listings = None, self.listings + 1
            return
        handle = self.random.randint(1, self.listed)
        if handle in self.present:
            self.present.remove(handle)
            self.listing.lasting.discard(handle)
            os.unlink(f"{self.long}/{handle}")
        else:
            self.present.add(handle)
            self.listing.possible.add(handle)
            os.close(os.open(f"{self.long}/{handle}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    def list_root(self) -> None:
        """Check that the client's own backups are listed once.

        (Others change: two that shared a name may both be listed.)
        """
        names = Counter(os.listdir(self.mnt))
        for path, times in (self.name, 1), (self.long, 1), (self.other, 0):
            assert names[os.path.basename(path)] == times, f"{path} was listed {names[os.path.basename(path)]} times"

    # --- races ---

    @property
    def races(self) -> int:
        return self.board[FIRST_CLIENT + NUMBERS * self.number + 1]

    def race(self) -> None:
        """All clients try at once to make, or remove, one name, once all have finished the last race. One wins."""
        race, end = self.races, time.monotonic() + RACE_PATIENCE
        while min(self.board[FIRST_CLIENT + 1 :: NUMBERS]) < race:
            if time.monotonic() > end:
                return
            time.sleep(0.0005)
        number, kind = race // 4 % RACE_NAMES, race % 4
        page, directory = f"{self.mnt}/races/{number + 1}", f"{self.mnt}/r{number}"
        with contextlib.suppress(FileNotFoundError if kind in (1, 3) else FileExistsError):
            if kind == 0:
                fd = os.open(page, os.O_CREAT | os.O_EXCL | os.O_RDWR)
                try:
                    mine = b"%d" % self.number
                    os.pwrite(fd, mine, 0)
                    assert os.pread(fd, len(mine), 0) == mine
                finally:
                    os.close(fd)
            else:
                (os.unlink, os.mkdir, os.rmdir)[kind - 1](page if kind == 1 else directory)
            self.won.append(race)
        self.board[FIRST_CLIENT + NUMBERS * self.number + 1] += 1

    # --- the end ---

    def verify(self) -> None:
        """Check that everything that was answered is there, by every way of reading it."""
        assert sorted(os.listdir(self.name), key=int) == [str(index + 1) for index in sorted(self.pages)]
        for index in self.pages:
            with self.opened(self.path(index), os.O_RDONLY) as fd:
                self.check(index, os.read(fd, self.page_size + 1))
        with self.opened(f"{self.name}/.image", os.O_RDONLY) as fd:
            whole = self.span * self.page_size
            assert os.pread(fd, whole, 0) == self.known(0, whole), "the image"
        assert set(map(int, os.listdir(self.long))) == self.present
        for fd, index in self.held:
            if index in self.pages:
                self.check(index, os.pread(fd, self.page_size, 0))
        self.verified = len(self.pages) + len(self.present)

    def remove(self) -> None:
        """Remove everything."""
        for fd, _ in self.held:
            os.close(fd)
        if self.listing:
            self.listing.entries.close()
        for path in self.name, self.long:
            os.truncate(f"{path}/.image", 0)
            os.rmdir(path)


def main(fd: str, number: str, count: str, seed: str, shmem: str, mnt: str) -> int:
    with open(int(fd), "r+b") as file, mmap.mmap(file.fileno(), 0) as shared, memoryview(shared).cast("Q") as board:
        client = Client(board, int(number), int(count), int(seed), shmem == "1", mnt)
        try:
            client.run()
            json.dump(client.report(), sys.stdout)
        except Exception:
            traceback.print_exc()
            return 1
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(*sys.argv[1:]))
