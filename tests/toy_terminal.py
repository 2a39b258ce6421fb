"""A terminal of a few lines of code: what a program wrote to it, as a screen of characters and colours."""

import fcntl
import os
import re
import select
import struct
import termios

PIECES = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n])")


class Screen:
    """Understands what `dit_ops.preview` and tqdm send; anything else fails the test."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.lines: list[list[tuple[str, tuple | None, tuple | None]]] = [[] for _ in range(rows)]
        self.row = self.column = 0
        self.colours: list[tuple | None] = [None, None]  # of characters and of what is behind them
        self.shown: set[str] = set()  # every text that a line has had
        self._rest = ""

    def feed(self, text: str) -> None:
        text = self._rest + text
        at = 0
        while at < len(text):
            piece = PIECES.match(text, at)
            if piece is None:  # an escape sequence that is not whole yet
                assert text[at] == "\x1b" and len(text) - at < 64, repr(text[at : at + 40])
                break
            at = piece.end()
            self._do(*piece.groups())
        self._rest = text[at:]

    def _do(self, numbers: str | None, command: str | None, control: str | None, character: str | None) -> None:
        line = self.lines[self.row]
        if command == "A":
            assert int(numbers or 1) <= self.row, "the cursor would leave the screen: the picture is too high for it"
            self.row -= int(numbers or 1)
        elif command == "K":
            del line[self.column :]
        elif command == "J":
            del line[self.column :]
            self.lines[self.row + 1 :] = [[] for _ in self.lines[self.row + 1 :]]
        elif command == "m":
            self._colour([int(n or 0) for n in numbers.split(";")])
        elif command is not None:
            raise AssertionError(f"unknown escape sequence {numbers}{command}")
        elif control == "\r":
            self.column = 0
        elif control == "\n":
            self.shown.add(self.text(self.row))
            self.row += 1
            if self.row == self.rows:
                self.lines, self.row = [*self.lines[1:], []], self.rows - 1
        else:
            assert self.column < self.columns, "a line is wider than the terminal"
            line.extend([(" ", None, None)] * (self.column + 1 - len(line)))
            line[self.column] = (character, *self.colours)
            self.column += 1

    def _colour(self, numbers: list[int]) -> None:
        while numbers:
            kind, *numbers = numbers
            if kind == 0:
                self.colours = [None, None]
            else:
                assert kind in (38, 48) and numbers[0] == 2, numbers
                self.colours[kind == 48], numbers = tuple(numbers[1:4]), numbers[4:]

    def text(self, row: int) -> str:
        return "".join(character for character, _, _ in self.lines[row]).rstrip()

    def texts(self) -> list[str]:
        return [self.text(row) for row in range(self.rows) if self.text(row)]

    def picture(self) -> list[int]:
        """Rows that show half blocks."""
        return [row for row in range(self.rows) if "▀" in self.text(row)]


def open_terminal(columns: int, rows: int) -> tuple[int, int]:
    """File descriptors (ours, the program's) of a pseudo-terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return ours, theirs


def read_available(ours: int, seconds: float = 0.0) -> bytes | None:
    """What has come, waiting for something at most `seconds`; None when the other end is closed."""
    if not select.select([ours], [], [], seconds)[0]:
        return b""
    try:
        return os.read(ours, 65536) or None
    except OSError:  # EIO: the last one at the other end has gone
        return None
