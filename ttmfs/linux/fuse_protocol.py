"""The kernel's FUSE protocol, as far as the daemon speaks it itself. The names are those of <linux/fuse.h>.

A request is a HEADER and what the opcode asks for. An answer is an ANSWER header and a body. Numbers have the byte
order of the machine.
"""

import struct
from typing import NamedTuple

HEADER = struct.Struct("=IIQQIIIHH")
"""fuse_in_header: see :class:`Request`."""

ANSWER = struct.Struct("=IiQ")
"""fuse_out_header: length with the header, negative errno or 0, the request's number."""

ATTRIBUTES = "QQQQQQIIIIIIIIII"  # fuse_attr
ENTRY = struct.Struct(f"=QQQQII{ATTRIBUTES}")
"""fuse_entry_out: node, generation, seconds that name and attributes live, their ns, and fuse_attr."""

ATTR = struct.Struct(f"=QII{ATTRIBUTES}")
"""fuse_attr_out: seconds and ns that the attributes live, padding, and fuse_attr."""

OPENED = struct.Struct("=QIi")
"""fuse_open_out: file handle, FOPEN flags, number of the backing file."""

WRITTEN = struct.Struct("=II")
"""fuse_write_out: bytes, padding."""

OFFSET = struct.Struct("=Q")
"""fuse_lseek_out, and the body of a FUSE_INTERRUPT: the number of the request to end."""

XATTR_SIZE = struct.Struct("=II")
"""fuse_getxattr_out: bytes of the value, padding."""

DIRENT = struct.Struct("=QQII")
"""fuse_dirent, before the name: inode number, offset of the next entry, length of the name, type."""

OPEN_IN = struct.Struct("=II")  # flags, padding
CREATE_IN = struct.Struct("=IIII")  # flags, mode, umask, padding; the name follows
MKNOD_IN = struct.Struct("=IIII")  # mode, device, umask, padding; the name follows
MKDIR_IN = struct.Struct("=II")  # mode, umask; the name follows
RENAME_IN = struct.Struct("=Q")  # new directory; both names follow
RENAME2_IN = struct.Struct("=QII")  # new directory, flags, padding; both names follow
READ_IN = struct.Struct("=QQIIQI")  # file handle, offset, bytes, READ_ flags, lock owner, flags of open(2)
WRITE_IN = struct.Struct("=QQIIQII")  # the same, padding; the data follow
RELEASE_IN = struct.Struct("=Q")  # file handle; the rest is not needed
FSYNC_IN = struct.Struct("=Q")  # file handle; the rest is not needed
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIII")
"""fuse_setattr_in: FATTR_ flags, padding, file handle, size, lock owner, atime, mtime, ctime, their ns, mode, padding,
uid, gid."""
GETXATTR_IN = struct.Struct("=II")  # bytes of room, padding; the name follows
SETXATTR_IN = struct.Struct("=II")  # bytes of the value, flags of setxattr(2); name and value follow
LSEEK_IN = struct.Struct("=QQI")  # file handle, offset, whence
FALLOCATE_IN = struct.Struct("=QQQI")  # file handle, offset, length, mode
BACKING_MAP = struct.Struct("=iIQ")
"""fuse_backing_map: descriptor, flags, padding."""

LOOKUP, FORGET, GETATTR, SETATTR, MKNOD, MKDIR, UNLINK, RMDIR, RENAME = 1, 2, 3, 4, 8, 9, 10, 11, 12
OPEN, READ, WRITE, RELEASE, FSYNC, SETXATTR, GETXATTR = 14, 15, 16, 18, 20, 21, 22
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT = 27, 28, 29, 30, 35, 36
BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK = 42, 43, 44, 45, 46

FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME = (1 << bit for bit in range(6))
FATTR_FH, FATTR_ATIME_NOW, FATTR_MTIME_NOW = 1 << 6, 1 << 7, 1 << 8

READ_LOCKOWNER = 1 << 1
"""A read that goes past the page cache has this flag (fuse_send_read()); one that fills the page cache has not."""

FOPEN_DIRECT_IO, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH = 1, 1 << 5, 1 << 7

BACKING_OPEN, BACKING_CLOSE = 0x4010E501, 0x4004E502
"""ioctl(2) of the connection: FUSE_DEV_IOC_BACKING_OPEN takes a BACKING_MAP and returns a number, by which
FUSE_DEV_IOC_BACKING_CLOSE forgets it."""

INVAL_INODE = struct.Struct("=IiQQqq")
"""fuse_out_header and fuse_notify_inval_inode_out: node, offset, length. A negative offset expires the attributes."""

NOTIFY_INVAL_INODE = 2

NOTIFY_RESEND = ANSWER.pack(ANSWER.size, 7, 0)
"""The notification that makes the kernel send every unanswered request again (Linux 6.9)."""

RESENT = 1 << 63
"""Set in the number of a request that is sent again. The answer must have it as well."""

LARGEST_REQUEST = (1 << 20) + 4096
"""A write of 256 pages with its headers. (libfuse asks for at most 256 pages a request.)"""


class Request(NamedTuple):
    """The header of a request. It has what :class:`ttmfs.fuse.permissions.Caller` has."""

    length: int
    opcode: int
    unique: int
    """The request's number, which never comes again on a connection, except for the request itself: see RESENT."""
    node: int
    uid: int
    gid: int
    pid: int
    extensions: int = 0
    padding: int = 0

    @property
    def number(self) -> int:
        """The same number whether the request is sent for the first time or again."""
        return self.unique & ~RESENT
