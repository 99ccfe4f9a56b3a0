"""Names and texts of others, fit to be shown: no line end, escape sequence or change of direction reaches a terminal.

Anyone who makes a file, a backup or a mount point chooses its name, and whoever serves a mount chooses what it answers.
"""

import os
import sys

__all__ = ["plain", "quoted"]

BARE = frozenset("%+,-./:=@_")
"""What needs no quotes in a shell, beside letters and digits."""

ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\e"}


def quoted(name: str | os.PathLike[str]) -> str:
    """A file's name as a shell reads it back, without anything that a terminal would obey."""
    text = os.fsdecode(name)
    shown = all(map(_is_shown, text))
    if shown and text and all(char.isalnum() or char in BARE for char in text):
        return text
    if shown and "'" not in text:
        return f"'{text}'"
    return "$'" + "".join(f"\\{char}" if char in "'\\" else _escaped(char) for char in text) + "'"


def plain(text: str) -> str:
    """A message, which may hold what others chose, without anything that a terminal would obey. It stays one line."""
    return "".join(map(_escaped, text))


def _is_shown(char: str) -> bool:
    """Whether a character is shown as it is: one that is printable, which marks of direction are not."""
    return char.isprintable() and (char.isascii() or _is_utf8())


def _is_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "") == "utf8"


def _escaped(char: str) -> str:
    if char in ESCAPES:
        return ESCAPES[char]
    return char if _is_shown(char) else "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))
