"""The table from errors to errno."""

import errno
import os

import pytest

from ttmfs import errors
from ttmfs.errors import TtmfsError


def all_errors() -> list[type[TtmfsError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TtmfsError)]


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind is not TtmfsError])
def test_every_error_has_its_errno(kind: type[TtmfsError]) -> None:
    assert errors.errno_of(kind("what happened")) in errno.errorcode


@pytest.mark.parametrize(
    ("number", "becomes"),
    [
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.ENOMEM, errno.ENOSPC),
        (errno.EFBIG, errno.EFBIG),
        (errno.ENAMETOOLONG, errno.ENAMETOOLONG),
        (errno.EPERM, errno.EPERM),
        (errno.EACCES, errno.EPERM),
        (errno.EIO, errno.EIO),
        (errno.EUCLEAN, errno.EIO),
        (errno.EBADF, errno.EIO),
    ],
)
def test_an_oserror_of_the_store_becomes_a_ttmfs_error(number: int, becomes: int) -> None:
    error = errors.from_os_error(OSError(number, os.strerror(number)), "storing pages")
    assert errors.errno_of(error) == becomes
    assert "storing pages" in str(error)
