"""Makes the store of a mount, of the kind that its options ask for."""

import errno
import os
import time
from collections.abc import Iterable

from ..errors import InvalidArgument, NotSupported, StoreBusy, TtmfsError
from ..options import WRITE, Options
from . import temporary_directory
from .directory import RECORD, Directory, open_directory
from .directory_record import DirectoryRecord
from .distributed import Distributed
from .distributed_record import DistributedRecord
from .filesystems import is_distributed
from .private_tmpfs import NAMESPACE, PrivateTmpfs
from .store import STORE, Store

__all__ = ["make_store", "make_temporary_store", "resume_store"]

WAIT_SECONDS = 0.5
"""The interval of tries to get a store that is in use."""


def make_store(options: Options) -> Store:
    """Make the store that the options ask for. Raises InvalidArgument, NotSupported and StoreBusy."""
    if options.store is not None:
        return _open_in_time(options.store, options)
    _refuse_durable(options)
    try:
        return PrivateTmpfs.make(options)
    except NotSupported as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno == errno.EINVAL:
            raise
        return make_temporary_store(options, error)


def _open_in_time(path: str, options: Options) -> Directory:
    """Open a store in a directory, and wait up to `store_wait=` seconds for another mount to leave it."""
    end = time.monotonic() + options.store_wait
    while True:
        try:
            kind = _kind_of(path)
            if kind is Directory:
                _refuse_durable(options)
            return kind.open(path, options)
        except StoreBusy:
            if time.monotonic() >= end:
                raise
            time.sleep(WAIT_SECONDS)


def _kind_of(path: str) -> type[Directory]:
    directory = open_directory(path)
    try:
        return Distributed if is_distributed(directory) else Directory
    except NotSupported as error:
        raise NotSupported(f"store={path}: {error}") from None
    finally:
        os.close(directory)


def _refuse_durable(options: Options) -> None:
    if options.durable == WRITE:
        raise InvalidArgument(
            "durable=write is for a store=DIR on a distributed filesystem; elsewhere write with O_SYNC, or fsync"
        )


def make_temporary_store(options: Options, why: NotSupported) -> Directory:
    """Make a store in memory for a user who cannot make a tmpfs. Raises `why` if no place is suitable."""
    for temporary in temporary_directory.candidates(options):
        try:
            store = Directory.open(temporary_directory.store_in(temporary), options, temporary=temporary)
        except TtmfsError:
            temporary_directory.remove(temporary)
            continue
        if store.in_memory:
            return store
        store.close()
    raise why


def resume_store(
    descriptors: dict[str, int], options: Options, *, temporary: str | None = None, failed: Iterable[int] = ()
) -> Store:
    """Open the store of the previous daemon by its :meth:`Store.descriptors`. Does not probe it, as it may be full."""
    directory = descriptors[STORE]
    if RECORD not in descriptors:
        return PrivateTmpfs(directory, options, descriptors.get(NAMESPACE), failed=failed)
    read_only = options.ro and temporary is None
    if temporary is None and is_distributed(directory):
        shared = DistributedRecord(directory, options.page_size, read_only=read_only, fd=descriptors[RECORD])
        return Distributed(directory, options, shared, failed=failed)
    record = DirectoryRecord(directory, options.page_size, read_only=read_only, fd=descriptors[RECORD])
    return Directory(directory, options, record, temporary=temporary, failed=failed)
