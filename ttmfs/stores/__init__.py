"""Makes the store of a mount, of the kind that its options ask for."""

import errno
from collections.abc import Iterable

from ..errors import NotSupported, TtmfsError
from ..options import Options
from . import temporary_directory
from .directory import RECORD, Directory
from .directory_record import DirectoryRecord
from .private_tmpfs import NAMESPACE, PrivateTmpfs
from .store import STORE, Store

__all__ = ["make_store", "make_temporary_store", "resume_store"]


def make_store(options: Options) -> Store:
    """Make the store that the options ask for. Raises InvalidArgument, NotSupported and StoreBusy."""
    if options.store is not None:
        return Directory.open(options.store, options)
    try:
        return PrivateTmpfs.make(options)
    except NotSupported as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno == errno.EINVAL:
            raise
        return make_temporary_store(options, error)


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
    record = DirectoryRecord(directory, options.page_size, read_only=read_only, fd=descriptors[RECORD])
    return Directory(directory, options, record, temporary=temporary, failed=failed)
