"""Fixtures, and a plugin that fails a test for what it leaves behind.

A test fails for a log record of level WARNING or above that it did not expect, for a Python warning, and for a
descriptor, a mount or a process that it leaves. In CI a skipped test fails too: CI has to provide what a test needs.
"""

import ctypes
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

import stores
from ceph import Ceph, missing_programs
from harness import Mount, children, descriptors, mounts_below, remaining, set_attribute
from stores import KINDS, Place, Site, site_of
from systemd_machine import Machine

# CI always tries the same examples, so that a change passes or fails by itself. Other runs try new examples.
# There is no deadline: an example may take long on a machine under load.
hypothesis.settings.register_profile("ttmfs", derandomize=bool(os.environ.get("CI")), deadline=None)
hypothesis.settings.load_profile("ttmfs")

LAYERS = ("arithmetic", "store", "model", "face", "mount", "house")
PR_SET_CHILD_SUBREAPER = 36


def pytest_configure() -> None:
    """Adopt orphaned processes: a daemon that a test leaves behind is then a child of this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def layer_of(path: Path) -> str:
    return next((layer for layer in LAYERS if layer in path.parts), "other")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the lower layers first: the first failure is then closest to its cause."""
    order = [*LAYERS, "other"]
    items.sort(key=lambda item: order.index(layer_of(item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which in CI is a failure: {report.longreprtext}"
    return report


class Records(logging.Handler):
    """Collects log records of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self.expected: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    """Fail the test for unexpected log records and for what it leaves behind."""
    for mount in Mount.living:
        mount.watch_anew()
    base = tmp_path_factory.getbasetemp()
    before = mounts_below(base), children(), descriptors(os.getpid())
    records = Records()
    logging.getLogger().addHandler(records)
    yield records
    logging.getLogger().removeHandler(records)
    unexpected = [
        r.getMessage() for r in records.records if not any(p.search(r.getMessage()) for p in records.expected)
    ]
    assert not unexpected, f"logged: {unexpected}"
    assert mounts_below(base) == before[0], "a mount was left or taken away"
    end = time.monotonic() + 5
    while (left := remaining(before[1])) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left, f"left processes {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in left]}"
    leaked = [d for d in descriptors(os.getpid()) if d not in before[2]]
    assert not leaked, f"leaked descriptors {leaked}"


@pytest.fixture
def expect_log(nothing_left: Records) -> Callable[[str], None]:
    """A function that allows log records of this process that contain a pattern."""
    return lambda pattern: nothing_left.expected.append(re.compile(pattern))


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def mount(mountpoint: Path) -> Iterator[Mount]:
    """A mount with a budget of 64 MiB."""
    with Mount(mountpoint, "size=64m") as mounted:
        yield mounted


@pytest.fixture
def mnt(mount: Mount) -> Path:
    """The mount point of `mount`."""
    return mount.path


@pytest.fixture
def backup(mnt: Path) -> Path:
    """The directory of an empty backup in `mnt`."""
    path = mnt / "a"
    path.mkdir()
    return path


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """The machine has swap during the test, which must be marked serial."""
    with stores.swap(tmp_path):
        yield


SHARED = 512 << 20


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount for all tests of a module, with a budget of 512 MiB and backups of 64 MiB."""
    with Mount(tmp_path_factory.mktemp("shared"), f"size={SHARED},backup_size=64m") as mount:
        yield mount


@pytest.fixture
def shared(shared_mount: Mount) -> Iterator[Mount]:
    """`shared_mount`, empty and with its original budget."""
    yield shared_mount
    for backup in shared_mount.path.iterdir():
        os.truncate(backup / ".image", 0)
        backup.rmdir()
    set_attribute(shared_mount.path, "size", SHARED)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A directory in which other users can run ttmfs."""
    with Place() as place:
        yield place


@pytest.fixture(scope="module", params=KINDS)
def site(request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site for each kind of store."""
    if request.param == "dir-ceph":
        _need_ceph()
    with site_of(request.param, place, tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A booted machine on which ttmfs is installed. A test that changes the installation restores it."""
    with Machine() as machine:
        machine.run("make install")
        yield machine


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """A Ceph for all tests of a module. A test that kills one of its servers starts it again."""
    _need_ceph()
    with Ceph() as ceph:
        yield ceph


def _need_ceph() -> None:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
