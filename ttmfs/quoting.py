"""File names and texts from other users, made safe to print on a terminal.

Another user can choose the name of a file, a backup or a mount point, and the server of a mount chooses its answers.
They may contain line breaks, escape sequences and marks that change the direction of text.
"""

import os
import sys

__all__ = ["plain", "quoted"]

BARE = frozenset("%+,-./:=@_")
"""Characters that need no quotes in a shell, beside letters and digits."""

ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\e"}


def quoted(name: str | os.PathLike[str]) -> str:
    """Quote a file name so that a shell reads it back and a terminal shows it harmlessly."""
    text = os.fsdecode(name)
    shown = all(map(_is_shown, text))
    if shown and text and all(char.isalnum() or char in BARE for char in text):
        return text
    if shown and "'" not in text:
        return f"'{text}'"
    return "$'" + "".join(f"\\{char}" if char in "'\\" else _escaped(char) for char in text) + "'"


def plain(text: str) -> str:
    """Escape control characters in a message. The result is one line."""
    return "".join(map(_escaped, text))


def _is_shown(char: str) -> bool:
    """Whether to show a character as it is. Marks of direction are not printable."""
    return char.isprintable() and (char.isascii() or _is_utf8())


def _is_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "") == "utf8"


def _escaped(char: str) -> str:
    if char in ESCAPES:
        return ESCAPES[char]
    return char if _is_shown(char) else "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))
