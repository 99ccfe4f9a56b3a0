"""The sizes of a run: full, quick, and tiny. The tiny one only covers every path, for tests."""

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "TINY", "Plan"]


@dataclass(frozen=True)
class Plan:
    """Sizes of one run. The project's targets are for FULL. A table says where a run is smaller."""

    name: str
    rounds: int  # counted rounds, after one round to warm up
    operations: int  # page operations a round, kind and system
    held: int  # pages that stay open
    clients: int  # concurrent processes
    client_seconds: float
    bulk_bytes: int  # existing pages for requests of 1 MiB
    request_sizes: tuple[int, ...]
    sweep_bytes: int  # the most for each request size
    sweep_requests: int  # the most requests for each request size
    many_pages: int  # listing, dropping at once, kernel memory
    most_pages: int  # the daemon's memory
    page_counts: tuple[int, ...]  # for latency against the number of pages
    latency_operations: int  # for each round, kind and number of pages
    example_pages: int  # the most pages for the example, because it slows down
    bindfs_pages: int  # the most pages for bindfs, because it is filled file by file
    backup_counts: tuple[int, ...]
    stream_seconds: float
    idle_seconds: float
    recovery_pages: tuple[int, ...]
    kills: int
    kill_pause_seconds: float  # before the kills of a round


FULL = Plan(
    name="full",
    rounds=7,
    operations=1000,
    held=64,
    clients=16,
    client_seconds=0.5,
    bulk_bytes=256 << 20,
    request_sizes=(4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20),
    sweep_bytes=64 << 20,
    sweep_requests=2048,
    many_pages=1_000_000,
    most_pages=4_000_000,
    page_counts=(1, 10, 100, 1000, 10_000, 100_000, 1_000_000),
    latency_operations=300,
    example_pages=1000,
    bindfs_pages=10_000,
    backup_counts=(1, 1000, 10_000),
    stream_seconds=2.0,
    idle_seconds=10.0,
    recovery_pages=(1, 1_000_000),
    kills=15,
    kill_pause_seconds=2.0,
)
QUICK = Plan(
    name="quick",
    rounds=5,
    operations=80,
    held=16,
    clients=16,
    client_seconds=0.1,
    bulk_bytes=64 << 20,
    request_sizes=(4 << 10, 64 << 10, 1 << 20),
    sweep_bytes=8 << 20,
    sweep_requests=128,
    many_pages=20_000,
    most_pages=100_000,
    page_counts=(1, 1000, 20_000),
    latency_operations=40,
    example_pages=100,
    bindfs_pages=1000,
    backup_counts=(1, 100, 1000),
    stream_seconds=0.2,
    idle_seconds=1.0,
    recovery_pages=(1, 20_000),
    kills=5,
    kill_pause_seconds=1.0,
)
TINY = Plan(
    name="tiny",
    rounds=1,
    operations=5,
    held=2,
    clients=2,
    client_seconds=0.05,
    bulk_bytes=2 << 20,
    request_sizes=(4 << 10, 1 << 20),
    sweep_bytes=2 << 20,
    sweep_requests=2,
    many_pages=500,
    most_pages=1000,
    page_counts=(1, 500),
    latency_operations=5,
    example_pages=10,
    bindfs_pages=500,
    backup_counts=(1, 20),
    stream_seconds=0.1,
    idle_seconds=0.1,
    recovery_pages=(1, 500),
    kills=1,
    kill_pause_seconds=0.3,
)
