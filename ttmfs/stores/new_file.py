"""A new file in a directory, which has all its content before it gets its name.

Distributed filesystems have no O_TMPFILE. There the file has a name meanwhile that nobody looks for, and that the next
mount of the store removes. Nor have they RENAME_NOREPLACE; so no other process may make names in the directory.
"""

import contextlib
import errno
import os
import secrets

__all__ = ["NewFile", "remove_unfinished"]

UNFINISHED = ".ttmfs-new-"


class NewFile:
    """A file without a name. The caller closes `fd`, or calls :meth:`discard`."""

    def __init__(self, directory: int, *, unnamed: bool = True) -> None:
        """`unnamed`: whether the filesystem has O_TMPFILE."""
        self._directory, self._name = directory, ""
        flags = os.O_RDWR | os.O_CLOEXEC
        if unnamed:
            self.fd = os.open(".", os.O_TMPFILE | flags, 0o600, dir_fd=directory)
        else:
            self._name = UNFINISHED + secrets.token_hex(8)
            self.fd = os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | flags, 0o600, dir_fd=directory)

    def link(self, name: str) -> None:
        """Give it a name. Raises FileExistsError if that is taken."""
        if not self._name:
            os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=self._directory, follow_symlinks=True)
            return
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._name = ""

    def discard(self) -> None:
        """Close it. If it has no name, it is gone."""
        if self._name:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
        os.close(self.fd)


def remove_unfinished(directory: int) -> None:
    """Remove what a daemon that was killed had begun to make."""
    for name in os.listdir(directory):
        if name.startswith(UNFINISHED):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
