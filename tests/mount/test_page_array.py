"""The caller's side of the contract (C17 to C21), and evicting twice the memory there is, as xe_bo_shrink does."""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from harness import Mount, set_attribute
from stores import ControlGroup, swap
from ttmfs.client import Backup, PageArray, shrink
from ttmfs.errors import BackupClosed, InvalidArgument, NoRoom, NotPermitted, PageAbsent, StoreFailed
from ttmfs.handles import handle_to_page_ptr, page_ptr_is_handle

PAGE = os.sysconf("SC_PAGE_SIZE")
COUNT = 600  # more than are moved at once


@pytest.fixture
def backup(shared: Mount) -> Iterator[Backup]:
    with Backup.create(shared.path / "a", 4096 * PAGE) as made:
        yield made


class Faulty:
    """A backup that fails on demand, as with ``backup_fault_inject`` in the kernel."""

    def __init__(self, backup: Backup) -> None:
        self._backup = backup
        self.page_size = backup.page_size
        self.bad: dict[str, set[int]] = {"backup": set(), "copy": set(), "drop": set()}
        self.error: type[Exception] = StoreFailed
        self.copied: list[int] = []
        self.dropped: list[int] = []
        self.gone: set[int] = set()

    @property
    def size(self) -> int:
        return self._backup.size

    def _fail(self, verb: str, handles: Any) -> None:
        if hit := self.bad[verb] & set(map(int, handles)):
            raise self.error(f"{verb} of {hit} fails")

    def backup_pages(self, pages: NDArray[np.uint8], idx: int, writeback: bool = False) -> NDArray[np.uint64]:
        good = next((n for n in range(len(pages)) if idx + n + 1 in self.bad["backup"]), len(pages))
        if not good:
            raise self.error("backing up fails")
        handles = self._backup.backup_pages(pages[:good], idx, writeback)
        self.gone -= set(map(int, handles))
        return handles

    def copy_pages(self, dst: NDArray[np.uint8], handles: NDArray[np.uint64], intr: Any = None) -> None:
        self._fail("copy", handles)
        assert not set(map(int, handles)) & self.gone, "C19: a dropped handle is never read again"
        self._backup.copy_pages(dst, handles, intr)
        self.copied += map(int, handles)

    def drop_pages(self, handles: NDArray[np.uint64]) -> None:
        self._fail("drop", handles)
        self._backup.drop_pages(handles)
        self.dropped += map(int, handles)
        self.gone |= set(map(int, handles))


def filled(store: Any, count: int = COUNT, first: int = 0, seed: int = 1) -> tuple[PageArray, NDArray[np.uint8]]:
    """An array with a page in every slot, and the content of the pages."""
    array, content = (
        PageArray(store, count, first),
        np.random.default_rng(seed).integers(0, 256, (count, PAGE), np.uint8),
    )
    for slot in range(count):
        array[slot][:] = content[slot]
    return array, content


def holds(array: PageArray, content: NDArray[np.uint8]) -> bool:
    return all((array[slot] == content[slot]).all() for slot in range(len(array)))


def test_c17_c19_pages_are_backed_up_and_restored(backup: Backup) -> None:
    array, content = filled(backup)
    assert (array.populated, array.backed_up) == (COUNT, 0)
    assert not page_ptr_is_handle(array.slots).any(), "C1: a page's address has bit 0 clear"
    assert array.backup() == COUNT
    assert (array.slots == handle_to_page_ptr(np.arange(1, COUNT + 1, dtype=np.uint64))).all()
    assert backup.residency().pages == COUNT
    with pytest.raises(InvalidArgument, match="restore"):
        array[0]
    with pytest.raises(InvalidArgument, match="backed up already"):
        array.backup()
    assert array.restore() == COUNT
    assert holds(array, content)
    assert backup.residency().pages == 0
    assert array.restore() == 0
    array.destroy()


def test_backed_up_pages_leave_memory(backup: Backup) -> None:
    def anonymous() -> int:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("Anonymous:")) << 10

    array, _ = filled(backup, 4096)
    before = anonymous()
    array.backup()
    assert before - anonymous() > 4000 * PAGE
    array.destroy()


def test_c17_empty_slots_are_skipped(backup: Backup) -> None:
    array = PageArray(backup, 10)
    for slot in 2, 3, 7:
        array[slot][:] = slot
    assert array.backup() == 3
    assert backup.handles().tolist() == [3, 4, 8]
    assert array.slots[[0, 1, 4, 5, 6, 8, 9]].any() == False  # noqa: E712 # numpy's own
    assert array.restore() == 3
    assert [int(array[slot][0]) for slot in (2, 3, 7)] == [2, 3, 7]
    array.destroy()


def test_c17_a_failure_gives_a_short_count_or_the_error_if_nothing_was_done(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, content = filled(faulty)
    faulty.bad["backup"] = {COUNT // 2 + 1}
    assert array.backup() == COUNT // 2
    assert (array.backed_up, array.populated) == (COUNT // 2, COUNT - COUNT // 2), "slots past it stay pages"
    assert array.restore() == COUNT // 2
    assert holds(array, content)
    faulty.bad["backup"] = {1}
    with pytest.raises(StoreFailed):
        array.backup()
    assert array.populated == COUNT
    assert holds(array, content)
    array.destroy()


def test_c17_running_out_of_room_gives_a_short_count(backup: Backup, shared: Mount) -> None:
    array, content = filled(backup)
    set_attribute(shared.path, "size", 100 * PAGE)
    assert array.backup() == 100
    set_attribute(shared.path, "size", "512m")
    assert array.restore() == 100
    with Backup.create(shared.path / "b") as other:
        other.backup_pages(content[:100], 0)
        set_attribute(shared.path, "size", 100 * PAGE)
        with pytest.raises(NoRoom):
            array.backup()
        assert holds(array, content)
        array.destroy()
        other.fini()


def test_c17_an_exception_of_a_signal_handler_is_not_reported_as_a_store_failure(backup: Backup) -> None:
    """InterruptedError is an OSError, and means that the caller wants it to end."""
    faulty = Faulty(backup)
    array, content = filled(faulty)
    faulty.bad["backup"], faulty.error = {257}, InterruptedError
    with pytest.raises(InterruptedError):
        array.backup()
    assert array.backed_up == 256
    array.restore()
    other, _ = filled(backup, 10, first=COUNT)
    with pytest.raises(InterruptedError):
        shrink([other, array], 1000)
    assert (other.backed_up, array.backed_up) == (10, 256)
    array.restore()
    assert holds(array, content)
    array.destroy()
    other.destroy()
    assert backup.residency().pages == 0


def test_an_array_lies_within_its_backup(backup: Backup) -> None:
    for count, first in (4097, 0), (1, 4096), (4096, 1):
        with pytest.raises(InvalidArgument, match="4096 pages"):
            PageArray(backup, count, first)
    PageArray(backup, 4096).destroy()
    PageArray(backup, 1, 4095).destroy()


@pytest.mark.parametrize("first", [0, 4], ids=["from its start", "from its middle"])
def test_c20_a_shrunk_backup_takes_the_pages_that_fit(backup: Backup, first: int) -> None:
    array, content = filled(backup, 16, first)
    backup.resize(8 * PAGE)
    assert array.backup() == 8 - first
    assert array.restore() == 8 - first
    backup.resize(4 * PAGE)
    if first:
        with pytest.raises(InvalidArgument, match="smaller"):
            array.backup()
    else:
        assert array.backup() == 4
    array.restore()
    assert holds(array, content)
    array.destroy()
    assert backup.residency().pages == 0


def test_c20_pages_past_the_end_of_a_shrunk_backup_are_lost(backup: Backup) -> None:
    array, content = filled(backup, 16)
    array.backup()
    backup.drop_pages(np.arange(9, 17, dtype=np.uint64))
    backup.resize(8 * PAGE)
    with pytest.raises(PageAbsent, match="handles: 9-16;"):
        array.restore()
    assert all((array[slot] == content[slot]).all() for slot in range(8))
    array.destroy()
    others, _ = filled(backup, 8)
    others.backup()
    backup.drop_pages(np.arange(5, 9, dtype=np.uint64))
    backup.resize(4 * PAGE)
    others.destroy()
    assert backup.residency().pages == 0


def test_c20_destroy_drops_no_page_that_was_not_stored(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, content = filled(faulty)
    faulty.error = NotPermitted
    faulty.bad = {verb: set(range(1, 4097)) for verb in faulty.bad}
    with pytest.raises(NotPermitted):
        array.backup()
    assert array.restore() == 0
    assert holds(array, content)
    array.destroy()
    assert not faulty.dropped
    faulty = Faulty(backup)
    array, _ = filled(faulty)
    faulty.bad["backup"] = {101}
    assert array.backup() == 100
    array.destroy()
    assert faulty.dropped == list(range(1, 101))


def test_a_limit_bounds_the_pages_backed_up(backup: Backup) -> None:
    array, content = filled(backup)
    assert array.backup(limit=0) == 0
    assert array.backup(limit=37) == 37
    assert array.backed_up == 37
    array.restore()
    assert holds(array, content)
    with pytest.raises(InvalidArgument):
        array.backup(limit=-1)
    array.destroy()


def test_c18_purge_frees_without_backing_up(backup: Backup) -> None:
    array, _ = filled(backup)
    assert array.backup(purge=True) == COUNT
    assert not array.slots.any()
    assert backup.residency().pages == 0
    assert not array[5].any(), "an empty slot gets a page of zeros"
    array.destroy()


def test_c18_purge_drops_the_pages_of_a_failed_restore(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, content = filled(faulty, 16)
    array.backup()
    faulty.bad["drop"] = {1}
    with pytest.raises(StoreFailed):
        array.restore()
    assert (array.populated, backup.residency().pages) == (16, 16)
    assert array.backup(purge=True, limit=10) == 10, "what is left cannot be dropped, which is told by no short count"
    faulty.bad["drop"] = set()
    assert array.backup(purge=True, limit=2) == 2
    assert backup.residency().pages == 0
    assert all((array[slot] == content[slot]).all() for slot in range(12, 16))
    array.destroy()
    assert faulty.dropped == list(range(1, 17))


def test_c19_a_retry_continues_an_interrupted_restore(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, content = filled(faulty)
    array.backup()
    faulty.bad["copy"] = {300}
    with pytest.raises(StoreFailed):
        array.restore()
    assert array.populated == 299
    intr = threading.Event()
    intr.set()
    with pytest.raises(InterruptedError):
        array.restore(intr)
    faulty.bad["copy"] = set()
    intr.clear()
    left = array.backed_up
    assert array.restore(intr) == left
    assert holds(array, content)
    assert sorted(faulty.copied) == sorted(faulty.dropped) == list(range(1, COUNT + 1)), "each exactly once"
    array.destroy()


def test_c19_a_copied_page_is_not_read_again_if_its_drop_failed(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, content = filled(faulty)
    array.backup()
    faulty.bad["drop"] = {10}
    with pytest.raises(StoreFailed):
        array.restore()
    faulty.bad["drop"] = set()
    array.restore()
    assert sorted(faulty.copied) == list(range(1, COUNT + 1))
    assert backup.residency().pages == 0
    assert holds(array, content)
    array.destroy()


def test_c19_pages_are_restored_even_if_others_cannot_be_dropped(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, content = filled(faulty)
    array.backup()
    faulty.bad["drop"] = {1, 257, 513}
    for _ in range(COUNT // 256 + 1):
        with pytest.raises(StoreFailed):
            array.restore()
    assert array.populated == COUNT
    assert holds(array, content)
    faulty.bad["drop"] = set()
    array.restore()
    array.destroy()
    assert sorted(faulty.copied) == sorted(faulty.dropped) == list(range(1, COUNT + 1))


LOST = [4, 100, 101, 256, 257, COUNT]
"""Handles: of the first of a batch, of its last, of neighbours."""


@pytest.fixture
def array_with_lost_pages(backup: Backup) -> tuple[PageArray, NDArray[np.uint8], Faulty]:
    """A restored array. Another client had dropped some of its pages, and stored others there."""
    faulty = Faulty(backup)
    array, content = filled(faulty)
    array.backup()
    backup.drop_pages(np.array(LOST, np.uint64))
    with pytest.raises(PageAbsent, match="handles: 4,100-101,256-257,600;"):
        array.restore()
    for handle in LOST:
        backup.backup_page(bytes(PAGE), handle - 1)
    return array, content, faulty


def test_c11_restore_returns_all_pages_that_were_not_dropped(
    array_with_lost_pages: tuple[PageArray, NDArray[np.uint8], Faulty],
) -> None:
    array, content, faulty = array_with_lost_pages
    kept = [slot for slot in range(COUNT) if slot + 1 not in LOST]
    assert (array.populated, array.backed_up, array.lost) == (len(kept), 0, len(LOST))
    assert repr(array) == f"<PageArray of {COUNT}: {len(kept)} in memory, 0 backed up, {len(LOST)} lost>"
    with pytest.raises(PageAbsent, match="handle 4 "):
        array[3]
    with pytest.raises(PageAbsent, match="handles: 4,100"):
        array.restore()  # C19: and what is there now is another's
    assert shrink([array], COUNT) == len(kept), "one that has lost a page can leave memory still"
    with pytest.raises(InvalidArgument, match="backed up already"):
        array.backup(purge=True)
    with pytest.raises(PageAbsent):
        array.restore()
    assert all((array[slot] == content[slot]).all() for slot in kept)
    assert sorted(faulty.copied) == sorted(faulty.dropped) == sorted(2 * [slot + 1 for slot in kept])
    array.destroy()


def test_c18_a_purge_empties_the_slots_of_lost_pages(
    array_with_lost_pages: tuple[PageArray, NDArray[np.uint8], Faulty], backup: Backup
) -> None:
    array, content, _ = array_with_lost_pages
    assert array.backup(purge=True, limit=0) == 0
    assert (array.populated, array.lost) == (COUNT - len(LOST), 0)
    assert not array[3].any()
    assert (array[4] == content[4]).all()
    assert array.restore() == 0
    assert array.backup(purge=True) == COUNT - len(LOST) + 1
    assert not array.slots.any()
    array.destroy()
    assert backup.handles().tolist() == LOST, "another's"


def test_c20_destroy_does_not_drop_lost_pages(
    array_with_lost_pages: tuple[PageArray, NDArray[np.uint8], Faulty], backup: Backup
) -> None:
    array, _, faulty = array_with_lost_pages
    array.destroy()
    assert not set(faulty.dropped) & set(LOST)
    assert backup.handles().tolist() == LOST, "another's"


def test_c20_destroying_a_half_restored_array_frees_each_page_once(backup: Backup) -> None:
    faulty = Faulty(backup)
    array, _ = filled(faulty)
    others, content = filled(backup, 50, first=COUNT)
    others.backup()
    array.backup()
    faulty.bad["copy"] = {300}
    with pytest.raises(StoreFailed):
        array.restore()
    array.destroy()
    array.destroy()
    assert sorted(faulty.dropped) == list(range(1, COUNT + 1))
    assert backup.residency().pages == 50, "another array of the backup has its own"
    others.restore()
    assert holds(others, content)
    others.destroy()
    for call in array.backup, array.restore, lambda: array[0]:
        with pytest.raises(InvalidArgument, match="destroyed"):
            call()


@pytest.mark.parametrize("native", [True, False], ids=["natively", "through the mount"])
def test_c20_destroying_after_the_backup_was_closed_is_refused(backup: Backup, native: bool) -> None:
    with Backup.open(backup.path, native=native) as closed:
        array, content = filled(closed)
        other, _ = filled(closed, 10, first=COUNT)
        array.backup()
        slots = array.slots.copy()
    for call in array.restore, array.destroy, array.destroy, other.backup:
        with pytest.raises(BackupClosed):
            call()
    assert (array.slots == slots).all()
    pages = np.empty_like(content)
    backup.copy_pages(pages, backup.handles())
    assert (pages == content).all()
    other.destroy()  # nothing of it was stored


def test_destroying_after_the_backup_ended_succeeds(backup: Backup) -> None:
    array, _ = filled(backup, 10)
    array.backup()
    backup.fini()
    array.destroy()


def test_c21_a_failing_array_does_not_stop_a_walk_over_others(backup: Backup) -> None:
    broken = Faulty(backup)
    broken.bad["backup"] = set(range(1, 4097))
    arrays = [filled(backup, 100, first)[0] for first in (0, 100, 200)]
    arrays.insert(1, filled(broken, 100, 300)[0])
    assert shrink(arrays, 250) == 250
    assert [array.backed_up for array in arrays] == [100, 0, 100, 50]
    with pytest.raises(StoreFailed):  # the others are backed up, if only in part
        shrink(arrays, 1000)
    for array in arrays:
        array.restore()
    for array in arrays:
        array.destroy()


class Interrupted(Exception):
    """The exception that the signal handler raises."""


class Interruption:
    """Raises at one of the lines of the array's own code, or when the backup is about to return."""

    VERBS = ("backup_pages", "copy_pages", "drop_pages")

    def __init__(self, after: int) -> None:
        self._left = after
        self.came = False

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        own = code.co_filename.endswith("page_array.py") and event == "line"
        answers = code.co_filename.endswith("client/backup.py") and code.co_name in self.VERBS and event == "return"
        if own or answers:
            self._left -= 1
            if not self._left:
                self.came = True
                raise Interrupted
        return self._trace

    def during(self, call: Callable[[], object]) -> None:
        before = self.came
        sys.settrace(self._trace)
        try:
            call()
        except Interrupted:
            assert self.came
        else:
            assert self.came == before, "it comes out"
        finally:
            sys.settrace(None)


def there_and_back(_: Backup, array: PageArray, content: NDArray[np.uint8], interruption: Interruption) -> None:
    interruption.during(array.backup)
    assert array.populated + array.backed_up == len(array)
    interruption.during(array.restore)
    while array.backed_up:
        array.restore()
    assert holds(array, content)


def with_a_page_lost(backup: Backup, array: PageArray, content: NDArray[np.uint8], interruption: Interruption) -> None:
    def restore() -> None:
        with contextlib.suppress(PageAbsent):
            array.restore()

    interruption.during(array.backup)
    lost = {3} & set(np.flatnonzero(array.slots & np.uint64(1)).tolist())
    backup.drop(4)
    interruption.during(restore)
    restore()
    backup.backup_page(bytes(PAGE), 3)
    interruption.during(restore)
    restore()
    assert (array.lost, array.backed_up) == (len(lost), 0)
    assert all((array[slot] == content[slot]).all() for slot in {*range(len(array))} - lost)
    assert backup.handles().tolist() == [4], "another's"
    interruption.during(lambda: array.backup(purge=True, limit=0))
    array.backup(purge=True, limit=0)
    assert array.populated == len(array) - len(lost)
    backup.drop(4)


def purged(backup: Backup, array: PageArray, _: NDArray[np.uint8], interruption: Interruption) -> None:
    interruption.during(array.backup)
    interruption.during(array.restore)
    while array.backed_up:
        array.restore()
    interruption.during(lambda: array.backup(purge=True))
    array.backup(purge=True)
    assert not array.slots.any()
    assert backup.residency().pages == 0
    assert not any(array[slot].any() for slot in range(len(array)))


def destroyed(_: Backup, array: PageArray, _content: NDArray[np.uint8], interruption: Interruption) -> None:
    array.backup(limit=len(array) // 2)
    interruption.during(array.destroy)


@pytest.mark.parametrize(
    ("story", "lines"), [(there_and_back, 60), (with_a_page_lost, 150), (purged, 80), (destroyed, 10)]
)
def test_an_exception_at_any_line_loses_no_page(
    backup: Backup, story: Callable[[Backup, PageArray, NDArray[np.uint8], Interruption], None], lines: int
) -> None:
    """The exception comes as from a signal handler, at each line in turn, until no line is left."""
    after, interruption = 0, Interruption(0)
    while interruption.came or not after:
        after += 1
        interruption = Interruption(after)
        array, content = filled(backup, 12, seed=after)
        story(backup, array, content, interruption)
        array.destroy()
        assert backup.residency().pages == 0
    assert after > lines, "it came at every line"


# --- locked memory ---


def locked() -> None:
    """A process that locks all its memory, and releases some of it all the same: run as a program."""
    import ctypes
    import mmap
    import sys

    import numpy as np
    import pytest

    from ttmfs.client import Backup, PageArray

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    with Backup.open(sys.argv[1]) as backup:
        assert not ctypes.CDLL(None).mlockall(1 | 2)  # MCL_CURRENT | MCL_FUTURE
        array = PageArray(backup, 4096)
        with pytest.raises(OSError, match="Invalid argument"):
            array._map.madvise(mmap.MADV_DONTNEED)
        content = np.random.default_rng(1).integers(0, 256, (4096, backup.page_size), np.uint8)
        for slot, page in enumerate(content):
            array[slot][:] = page
        before = resident()
        assert array.backup() == array.backed_up == 4096
        assert before - resident() > 4000
        assert array.restore() == 4096
        assert all((array[slot] == page).all() for slot, page in enumerate(content))
        before = resident()
        assert array.backup(purge=True) == 4096
        assert before - resident() > 4000
        assert not any(array[slot].any() for slot in range(4096)), "an empty slot gets a page of zeros"
        array.destroy()


def test_arrays_work_in_locked_memory(backup: Backup) -> None:
    source = inspect.getsource(locked) + "locked()\n"
    subprocess.run([sys.executable, "-c", source, backup.path], timeout=60, check=True)
    assert backup.residency().pages == 0


# --- twice the memory there is ---


def evictor() -> None:
    """A process that evicts arrays of twice its memory limit, and reads all of it back: run as a program."""
    import json
    import random
    import sys
    import threading

    import numpy as np

    from ttmfs.client import Backup, PageArray, shrink

    path, arrays_, pages, budget, seed = sys.argv[1], *map(int, sys.argv[2:6])
    random_, size = random.Random(seed), 4096

    def content(number: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        return np.random.default_rng([seed, number]).integers(0, 256, (pages, size), np.uint8)

    done = {"backed up": 0, "purged": 0, "restored": 0, "interrupted": 0, "wrong": 0}
    with Backup.create(path, arrays_ * pages * size) as backup:
        arrays: list[PageArray] = []
        purgeable: set[int] = set()

        def make_room() -> None:
            over = sum(array.populated for array in arrays) + pages - budget
            if over <= 0:
                return
            for number in list(purgeable):
                if arrays[number].populated and over > 0:
                    gone = arrays[number].backup(purge=True)
                    done["purged"] += gone
                    over -= gone
            candidates = [array for number, array in enumerate(arrays) if number not in purgeable]
            random_.shuffle(candidates)
            if over > 0:
                done["backed up"] += shrink(candidates, over, writeback=random_.random() < 0.2)

        for number in range(arrays_):
            make_room()
            arrays.append(PageArray(backup, pages, number * pages))
            for slot, page in enumerate(content(number)):
                arrays[number][slot][:] = page
            if number % 8 == 3:
                purgeable.add(number)
        order = [number for number in range(arrays_) for _ in range(2)]
        random_.shuffle(order)
        for number in order:
            array = arrays[number]
            if number in purgeable:
                continue
            if array.backed_up:
                make_room()
            while array.backed_up:
                intr = threading.Event()
                if random_.random() < 0.3:
                    threading.Timer(random_.random() / 500, intr.set).start()
                elif random_.random() < 0.1:
                    intr.set()
                try:
                    done["restored"] += array.restore(intr)
                except InterruptedError:
                    done["interrupted"] += 1
            expected = content(number)
            done["wrong"] += sum(not (array[slot] == expected[slot]).all() for slot in range(pages))
        done["stored"] = backup.residency().pages
        done["held"] = sum(array.backed_up for array in arrays)
        for array in arrays:
            array.destroy()
        done["left"] = backup.residency().pages
        done["native"] = backup.is_native
        backup.fini()
    json.dump(done, sys.stdout)


@pytest.mark.serial
@pytest.mark.parametrize("native", [True, False], ids=["natively", "through the mount"])
def test_twice_the_available_memory_is_evicted_and_read_back_at_random(
    mountpoint: Path, tmp_path: Path, native: bool
) -> None:
    """xe_bo_shrink in user space: some arrays purgeable, interruptions injected, all verified, nothing leaked."""
    limit, arrays, pages = 96 << 20, 48, 1024
    assert arrays * pages * PAGE == 2 * limit
    options = "size=512m" + ("" if native else ",uid_size=512m")
    with swap(tmp_path, 512 << 20), ControlGroup(limit) as group, Mount(mountpoint, options, preexec_fn=group.join):
        budget = (limit - (48 << 20)) // PAGE  # what python, numpy and pages just backed up take is not for pages
        source = inspect.getsource(evictor) + "evictor()\n"
        command = [sys.executable, "-c", source, str(mountpoint / "a"), str(arrays), str(pages), str(budget), "7"]
        found = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True, preexec_fn=group.join)
        assert group.oom_kills() == 0
        done = json.loads(found.stdout)
        assert (done["wrong"], done["left"], done["native"]) == (0, 0, native)
        assert done["stored"] == done["held"]
        assert done["backed up"] > pages * arrays // 2
        assert done["restored"] > pages * arrays // 4
        assert done["purged"] >= pages
        assert done["interrupted"] > 0
        assert not list(mountpoint.iterdir())
        assert os.statvfs(mountpoint).f_bfree == os.statvfs(mountpoint).f_blocks
