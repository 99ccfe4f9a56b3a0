"""Records what a command shows on a terminal, and writes it as an animated SVG that follows light and dark themes.

A pseudo-terminal runs the command, and pyte interprets what it writes. A frame is the screen at an instant. The SVG has
all frames below each other, and moves them behind a window by one CSS animation. Without animation it shows the last.
"""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from dataclasses import dataclass
from html import escape

import pyte

FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
SIZE, ADVANCE, LEADING = 16, 9.6, 22
"""Of the font, in user units: its size, and the width and height of a cell."""

MARGIN, BAR, CAPTION = 16, 36, 34
"""Around the text, and the heights of the title bar and of the caption."""

LAST_SECONDS = 3.0
"""How long the last frame stays before the recording starts again."""

STYLE = f"""\
text {{ font: {SIZE}px {FONT}; fill: #1f2328 }}
.back {{ fill: #ffffff; stroke: #d0d7de }}
.bar {{ fill: #f6f8fa; stroke: #d0d7de }}
.bold {{ font-weight: bold }}
.caption, .title {{ fill: #59636e }}
.caption, .title {{ font-size: 14px }}
.mark {{ fill: #0969da }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #e6edf3 }}
  .back {{ fill: #0d1117; stroke: #3d444d }}
  .bar {{ fill: #151b23; stroke: #3d444d }}
  .caption, .title {{ fill: #9198a1 }}
  .mark {{ fill: #58a6ff }}
}}
"""


@dataclass(frozen=True)
class Frame:
    """The screen from an instant on: lines of runs (column, text, class), and what happens meanwhile."""

    seconds: float
    lines: tuple[tuple[tuple[int, str, str], ...], ...]
    caption: str


class Recorder:
    """A command on a terminal, for the time of a ``with``. :meth:`watch` records it; its captions are yours."""

    def __init__(self, command: list[str], columns: int, lines: int) -> None:
        self._command, self._columns, self._lines = command, columns, lines
        self.frames: list[Frame] = []
        self.caption = ""

    def __enter__(self) -> "Recorder":
        self._screen = pyte.Screen(self._columns, self._lines)
        self._stream = pyte.ByteStream(self._screen)
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            os.environ.update(TERM="xterm-256color", LC_ALL="C.UTF-8")
            os.execvp(self._command[0], self._command)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", self._lines, self._columns, 0, 0))
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGINT)
        self.watch(0.3)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)

    def watch(self, seconds: float) -> None:
        """Record for some seconds. A screen counts when the command has paused, so that no frame is half drawn."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._terminal], [], [], min(left, 0.05))[0]:
                with contextlib.suppress(OSError):  # EIO: the command has ended
                    self._stream.feed(os.read(self._terminal, 65536))
                continue
            lines = tuple(_runs(self._screen.buffer[y], self._columns) for y in range(self._lines))
            last = (self.frames[-1].lines, self.frames[-1].caption) if self.frames else None
            if any(lines) and (lines, self.caption) != last:
                self.frames.append(Frame(time.monotonic() - self._began, lines, self.caption))


def _runs(row: dict[int, pyte.screens.Char], columns: int) -> tuple[tuple[int, str, str], ...]:
    """The words of a line, each with its column and the class of its style."""
    runs: list[tuple[int, str, str]] = []
    for x in range(columns):
        char = row[x]
        if char.data == " ":
            continue
        style = "bold" if char.bold else "plain"
        if runs and runs[-1][2] == style and runs[-1][0] + len(runs[-1][1]) == x:
            runs[-1] = runs[-1][0], runs[-1][1] + char.data, style
        else:
            runs.append((x, char.data, style))
    return tuple(runs)


def svg(frames: list[Frame], title: str, description: str, columns: int, still: int | None = None) -> str:
    """The recording as one SVG. `still` is the number of a frame: then that frame alone is shown."""
    lines = max(len([*filter(None, frame.lines)]) for frame in frames)
    width, height = columns * ADVANCE + 2 * MARGIN, BAR + 2 * MARGIN + lines * LEADING + CAPTION
    whole = frames[-1].seconds - frames[0].seconds + LAST_SECONDS
    shown = len(frames) - 1 if still is None else still
    steps = "".join(
        f"{(frame.seconds - frames[0].seconds) / whole:.2%} {{ transform: translateY({-height * number:g}px) }}\n"
        for number, frame in enumerate(frames)
    )
    moving = (
        f"@keyframes roll {{\n{steps}}}\n.roll {{ animation: roll {whole:.1f}s step-end infinite }}\n"
        "@media (prefers-reduced-motion: reduce) { .roll { animation: none } }\n"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-labelledby="title">\n<title id="title">{escape(description)}</title>\n'
        f"<style>\n{STYLE}{moving if still is None else ''}</style>\n"
        f'<rect class="back" x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8"/>\n'
        f'<path class="bar" d="M0.5 {BAR}.5v-{BAR - 8}a8 8 0 0 1 8-8h{width - 17:g}a8 8 0 0 1 8 8v{BAR - 8}z"/>\n'
        f'<text class="title" x="{MARGIN}" y="24">{escape(title)}</text>\n'
    )
    bodies = "".join(_body(frame, number * height, height) for number, frame in enumerate(frames))
    window = f'<svg width="{width:g}" height="{height:g}">\n'
    return (
        f'{head}{window}<g class="roll" transform="translate(0 {-height * shown:g})">\n{bodies}</g>\n</svg>\n</svg>\n'
    )


def _body(frame: Frame, top: float, height: float) -> str:
    texts = []
    for number, line in enumerate(frame.lines):
        y = top + BAR + MARGIN + number * LEADING + SIZE
        texts += [
            f'<text class="{style}" x="{MARGIN + x * ADVANCE:g}" y="{y:g}" textLength="{len(text) * ADVANCE:g}">'
            f"{escape(text, quote=False)}</text>"
            for x, text, style in line
        ]
    texts.append(
        f'<text class="caption" x="{MARGIN}" y="{top + height - MARGIN:g}">'
        f'<tspan class="mark">{frame.seconds:4.1f} s</tspan>  {escape(frame.caption, quote=False)}</text>'
    )
    return "".join(text + "\n" for text in texts)
