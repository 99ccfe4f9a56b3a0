"""The answer to the kernel's first message, FUSE_INIT: libfuse's, with a few flags changed."""

import struct

from ..linux.fuse_protocol import ANSWER

__all__ = ["edited"]

LENGTH = struct.Struct("=I")
FLAGS, FLAGS2_AND_DEPTH = struct.Struct("=I"), struct.Struct("=II")
SIZE = ANSWER.size + 64
FLAGS_AT, FLAGS2_AT = ANSWER.size + 12, ANSWER.size + 32
"""Where fuse_init_out has its flags in an answer, then its flags2 and its max_stack_depth; and its size."""

ATOMIC_O_TRUNC, HANDLE_KILLPRIV_V2, SETXATTR_EXT, INIT_EXT = 1 << 3, 1 << 28, 1 << 29, 1 << 30
PASSTHROUGH = 1 << 5  # of flags2

STACK_DEPTH = 1
"""A filesystem on which others may lie (an overlay), and whose files lie on no such filesystem. With 0 nothing can be
opened in passthrough mode, with 2 no overlay can lie on it."""


def edited(answer: bytes, *, passthrough: bool) -> bytes:
    """libfuse's answer, without what changes the meaning of later requests, and with what passthrough mode needs.

    ATOMIC_O_TRUNC: open and truncation would be one request, after which the kernel takes the file's size to be 0 until
    it asks again. For a page that is never true, and tar would store an empty page. As two requests, the second is
    answered with the size. SETXATTR_EXT: another layout of one request.

    HANDLE_KILLPRIV_V2: without it the kernel asks for an attribute before each write. Files here have no set-id bits,
    nor capabilities, that a write would have to clear.
    """
    answer_ = bytearray(answer.ljust(SIZE, b"\0"))
    (flags,) = FLAGS.unpack_from(answer_, FLAGS_AT)
    flags &= ~(ATOMIC_O_TRUNC | SETXATTR_EXT)
    if passthrough:
        flags |= HANDLE_KILLPRIV_V2 | INIT_EXT
        flags2, _ = FLAGS2_AND_DEPTH.unpack_from(answer_, FLAGS2_AT)
        FLAGS2_AND_DEPTH.pack_into(answer_, FLAGS2_AT, flags2 | PASSTHROUGH, STACK_DEPTH)
    FLAGS.pack_into(answer_, FLAGS_AT, flags)
    LENGTH.pack_into(answer_, 0, len(answer_))
    return bytes(answer_)
