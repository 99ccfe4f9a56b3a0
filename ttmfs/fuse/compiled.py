"""Decides whether the compiled module answers a mount's plain requests, or Python answers all of them.

The module ``compiled_requests`` is made from ``compiled_requests.pyx`` when ttmfs is installed, if there is a C
compiler. Without it everything works, and takes longer. ``TTMFS_LOOP=python`` in the daemon's environment switches it
off.
"""

import os
from typing import TYPE_CHECKING

from ..model.pool import Pool
from ..options import BASE_PAGE_SIZE
from ..recovery.state import State
from .metrics import Metrics
from .page_requests import PageRequests

if TYPE_CHECKING:
    from .compiled_requests import CompiledRequests

__all__ = ["COMPILED", "PYTHON", "compiled_requests", "loop_of"]

COMPILED, PYTHON = "compiled", "python"
SWITCH = "TTMFS_LOOP"


def loop_of(pool: Pool) -> str:
    """COMPILED or PYTHON: which answers the plain requests of a pool."""
    store = pool.store
    plain = store.in_memory and not store.counts_changes and pool.page_size == store.block_size == BASE_PAGE_SIZE
    if not plain or os.sysconf("SC_PAGE_SIZE") != BASE_PAGE_SIZE or os.environ.get(SWITCH) == PYTHON:
        return PYTHON
    try:
        from . import compiled_requests  # noqa: F401
    except ImportError:
        return PYTHON
    return COMPILED


def compiled_requests(
    connection: int, state: State, handlers: PageRequests, metrics: Metrics, message: memoryview
) -> "CompiledRequests":
    """The compiled requests of a mount whose :func:`loop_of` is COMPILED. They read into `message`."""
    from .compiled_requests import CompiledRequests

    return CompiledRequests(connection, message, state, handlers, metrics)
