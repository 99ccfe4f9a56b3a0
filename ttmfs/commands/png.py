"""A small canvas that becomes a PNG: rectangles, and text of ASCII."""

import struct
import zlib

__all__ = ["BLUE", "GREY", "LETTER", "LINE_HEIGHT", "ORANGE", "PURPLE", "Canvas"]

Colour = tuple[int, int, int]

GREY: Colour = (226, 228, 231)
ORANGE: tuple[Colour, ...] = ((253, 208, 162), (253, 160, 80), (226, 98, 10))
PURPLE: tuple[Colour, ...] = ((214, 196, 224), (178, 135, 196), (136, 70, 160))
BLUE: tuple[Colour, ...] = ((176, 208, 236), (98, 160, 214), (24, 96, 174))
INK: Colour = (40, 44, 52)
"""Three shades each, from little to all."""

ZOOM = 2
LETTER = 6 * ZOOM
LINE_HEIGHT = 12 * ZOOM

_FONT = (
    "0000000000" "00005F0000" "0007000700" "147F147F14" "242A7F2A12" "2313086462" "3649562050" "0008070300"
    "001C224100" "0041221C00" "2A1C7F1C2A" "08083E0808" "0080703000" "0808080808" "0000606000" "2010080402"
    "3E5149453E" "00427F4000" "7249494946" "2141494D33" "1814127F10" "2745454539" "3C4A494931" "4121110907"
    "3649494936" "464949291E" "0000140000" "0040340000" "0008142241" "1414141414" "0041221408" "0201590906"
    "3E415D594E" "7C1211127C" "7F49494936" "3E41414122" "7F4141413E" "7F49494941" "7F09090901" "3E41415173"
    "7F0808087F" "00417F4100" "2040413F01" "7F08142241" "7F40404040" "7F021C027F" "7F0408107F" "3E4141413E"
    "7F09090906" "3E4151215E" "7F09192946" "2649494932" "03017F0103" "3F4040403F" "1F2040201F" "3F4038403F"
    "6314081463" "0304780403" "6159494D43" "007F414141" "0204081020" "004141417F" "0402010204" "4040404040"
    "0003070800" "2054547840" "7F28444438" "3844444428" "384444287F" "3854545418" "00087E0902" "18A4A49C78"
    "7F08040478" "00447D4000" "2040403D00" "7F10284400" "00417F4000" "7C04780478" "7C08040478" "3844444438"
    "FC18242418" "18242418FC" "7C08040408" "4854545424" "04043F4424" "3C4040207C" "1C2040201C" "3C4030403C"
    "4428102844" "4C9090907C" "4464544C44" "0008364100" "0000770000" "0041360800" "0201020402"
)  # fmt: skip
"""ASCII from blank to tilde, five columns of eight points each, the lowest bit on top."""


class Canvas:
    """Pixels, white at first."""

    def __init__(self, width: int, height: int) -> None:
        self._width = width
        self._rows = [bytearray(b"\xff" * (3 * width)) for _ in range(height)]

    def rectangle(self, left: int, top: int, width: int, height: int, colour: Colour) -> None:
        """Fill one, as far as it lies on the canvas."""
        right = min(left + width, self._width)
        for row in self._rows[top : top + height]:
            row[3 * left : 3 * right] = bytes(colour) * max(0, right - left)

    def text(self, left: int, top: int, text: str) -> int:
        """Write a line, and give where it ends."""
        for char in text:
            code = ord(char) - 32 if " " <= char <= "~" else ord("?") - 32
            for column, bits in enumerate(bytes.fromhex(_FONT[10 * code : 10 * code + 10])):
                for row in range(8):
                    if bits >> row & 1:
                        self.rectangle(left + column * ZOOM, top + row * ZOOM, ZOOM, ZOOM, INK)
            left += LETTER
        return left

    def png(self) -> bytes:
        """The file. https://www.w3.org/TR/png."""
        header = struct.pack(">IIBBBBB", self._width, len(self._rows), 8, 2, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in self._rows), 9)
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
