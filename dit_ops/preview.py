"""The newest frame of a video in the terminal's own means: half blocks in 24-bit colours, redrawn above a progress bar."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from dit_ops.video import check_frames, to_uint8


def half_blocks(frame: Tensor, columns: int, rows: int) -> list[str]:
    """A picture [3, H, W] in [−1, 1] as at most `rows` lines of at most `columns` characters.

    A character is "▀": its colour is the upper pixel and its background the lower one, so pixels are square. A picture that is
    larger is averaged down, a smaller one keeps its size. Each line ends with the colours reset.
    """
    check_frames("half_blocks", frame[None])
    _, height, width = frame.shape
    scale = min(1.0, columns / width, 2 * rows / height)
    size = (2 * max(1, round(height * scale / 2)), max(1, round(width * scale)))
    pixels = to_uint8(torch.nn.functional.adaptive_avg_pool2d(frame.float(), size)[None])[0].tolist()
    return [_line(upper, lower) for upper, lower in zip(pixels[::2], pixels[1::2], strict=True)]


def _line(upper: list[list[int]], lower: list[list[int]]) -> str:
    """Colours are named where they change only."""
    text: list[str] = []
    before: tuple[list[int], list[int]] | tuple[None, None] = None, None
    for top, bottom in zip(upper, lower, strict=True):
        codes = [
            f"{kind};2;{r};{g};{b}"
            for kind, (r, g, b), old in ((38, top, before[0]), (48, bottom, before[1]))
            if old != [r, g, b]
        ]
        text.append(f"\x1b[{';'.join(codes)}m▀" if codes else "▀")
        before = (top, bottom)
    return "".join(text) + "\x1b[0m"


class Preview:
    """`with tqdm(…) as bar, Preview(sys.stderr) as preview:` a picture above the bar, which goes away when the block ends.

    Between two calls the terminal is as it was, but for the picture: no colour, mode or cursor position is left to repair.
    """

    def __init__(self, terminal: TextIO):
        if not terminal.isatty() or os.environ.get("TERM") == "dumb":
            raise ValueError("preview needs a terminal to draw in, but standard error is none")
        self._terminal = terminal
        self._rows = 0  # of the picture that is shown

    def __enter__(self) -> "Preview":
        return self

    def __exit__(self, *error: object) -> None:
        self._draw([])

    def show(self, frame: Tensor) -> None:
        """frame: [3, H, W] in [−1, 1]. It takes the place of the one before."""
        size = os.get_terminal_size(self._terminal.fileno())
        self._draw(half_blocks(frame, size.columns - 1, max(1, size.lines - 2)))

    def _draw(self, lines: list[str]) -> None:
        """Up to the first line of the old picture, the new lines one below the other, and everything below them cleared."""
        up = f"\x1b[{self._rows}A" if self._rows else ""
        text = up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
        with _uninterrupted(), tqdm.external_write_mode(file=self._terminal):  # the bar goes away and comes back below
            self._rows = len(lines)
            self._terminal.flush()
            rest = text.encode()
            while rest:  # an unbuffered stream drops what a signal keeps from being written
                rest = rest[os.write(self._terminal.fileno(), rest) :]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect when the block has ended: half a picture would leave the cursor anywhere."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
