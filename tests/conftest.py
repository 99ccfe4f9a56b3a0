"""Fixtures, and the plugin that fails a test on whatever it leaves behind or lets pass unseen.

That is: a log record of ttmfs or pyfuse3 of level WARNING or above that it did not expect, a warning, a descriptor, a
mount or a process left over. In CI a skipped test has failed: what it needs must be there.
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

from harness import Mount, children, descriptors, mounts_below, set_attribute
from stores import KINDS, Place, Site, site_of
from systemd_machine import Machine

# In CI the same examples each time, so that landing is no matter of luck; elsewhere new ones, which find new things.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

LAYERS = ("arithmetic", "store", "model", "face", "mount", "house")
PR_SET_CHILD_SUBREAPER = 36


def pytest_configure() -> None:
    """Become the parent of every orphan, so that a daemon left behind is seen as a child."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def layer_of(path: Path) -> str:
    return next((layer for layer in LAYERS if layer in path.parts), "other")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lower layers first: the first failure is then the nearest to its cause."""
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
    """Keeps the log records that need someone's attention."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self.expected: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    """Fail the test for what it left behind."""
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
    while (left := children() - before[1]) and time.monotonic() < end:
        for pid in left:  # ended, and only waiting for us to notice
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    assert not left, f"left processes {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in left]}"
    leaked = [d for d in descriptors(os.getpid()) if d not in before[2]]
    assert not leaked, f"leaked descriptors {leaked}"


@pytest.fixture
def expect_log(nothing_left: Records) -> Callable[[str], None]:
    """Let this test's process log warnings in which a pattern is found."""
    return lambda pattern: nothing_left.expected.append(re.compile(pattern))


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def mount(mountpoint: Path) -> Iterator[Mount]:
    """A mount of 64 MiB."""
    with Mount(mountpoint, "size=64m") as mounted:
        yield mounted


@pytest.fixture
def mnt(mount: Mount) -> Path:
    """The mount point of `mount`."""
    return mount.path


@pytest.fixture
def backup(mnt: Path) -> Path:
    """The directory of an empty backup in it."""
    path = mnt / "a"
    path.mkdir()
    return path


SHARED = 512 << 20


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount for all tests of a file, of 512 MiB with backups of 64 MiB."""
    with Mount(tmp_path_factory.mktemp("shared"), f"size={SHARED},backup_size=64m") as mount:
        yield mount


@pytest.fixture
def shared(shared_mount: Mount) -> Iterator[Mount]:
    """That mount, empty, and with its budget."""
    yield shared_mount
    for backup in shared_mount.path.iterdir():
        os.truncate(backup / ".image", 0)
        backup.rmdir()
    set_attribute(shared_mount.path, "size", SHARED)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Where other users reach ttmfs."""
    with Place() as place:
        yield place


@pytest.fixture(scope="module", params=KINDS)
def site(request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Every kind of store, one after the other."""
    with site_of(request.param, place, tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A booted machine in which ttmfs is installed. Whoever changes what is installed changes it back."""
    with Machine() as machine:
        machine.run("make install")
        yield machine
