"""What reaches the terminal: answers, tables and JSON on stdout, everything about them on stderr.

Belongs here: the only calls that write. Not here: errors and exit codes (report.py), progress (progress.py).
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from freehold.text.answer import Piece

# All control characters but tab and newline: a model's words must not steer the terminal that shows them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
DIM, GREEN, PLAIN = "\x1b[2m", "\x1b[32m", "\x1b[0m"


def printable(text: str) -> str:
    """Return the text with each control character replaced by U+FFFD."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def show_text(text: str) -> None:
    """Write part of an answer to stdout, at once; byte for byte where nobody watches."""
    _write(sys.stdout, printable(text) if sys.stdout.isatty() else text)


def show_line(text: str = "") -> None:
    """Write a line to stdout."""
    show_text(f"{text}\n")


def show_json(value: Any) -> None:
    """Write a value to stdout as JSON; what JSON cannot say, such as NaN, is a programmer's error."""
    show_line(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def show_table(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Write rows to stdout in columns: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        show_line(f"{indent}{'  '.join(cells)}".rstrip())


def show_marked(parts: Iterable[tuple[str, bool]]) -> None:
    """Write parts of a text to stdout: marked ones green and others dim; in brackets where nobody watches."""
    for text, is_marked in parts:
        if sys.stdout.isatty():
            _write(sys.stdout, f"{GREEN if is_marked else DIM}{printable(text)}{PLAIN}")
        else:
            _write(sys.stdout, f"⟦{text}⟧" if is_marked else text)


def show_aside(text: str) -> None:
    """Write to stderr what is beside the answer, such as reasoning; dim where somebody watches."""
    _write(sys.stderr, f"{DIM}{printable(text)}{PLAIN}" if sys.stderr.isatty() else text)


def show_note(text: str) -> None:
    """Write a line about an answer to stderr."""
    show_aside(text)
    _write(sys.stderr, "\n")


class AnswerWriter:
    """Shows an answer piece by piece: its text on stdout, its reasoning on stderr."""

    def __init__(self) -> None:
        self._is_reasoning = False
        self._last = "\n"

    def show(self, piece: "Piece") -> None:
        """Show one piece."""
        from freehold.text.answer import ReasoningPiece, TextPiece

        if isinstance(piece, ReasoningPiece):
            self._is_reasoning = True
            show_aside(piece.text)
        elif isinstance(piece, TextPiece):
            self.show_text(piece.text)
        else:
            self.show_text(f"{piece.name}({piece.arguments})\n")

    def show_text(self, text: str) -> None:
        """Show some of the answer's own text."""
        if self._is_reasoning:
            self._is_reasoning = False
            show_aside("\n\n")
        self._last = text[-1:] or self._last
        show_text(text)

    def finish(self) -> None:
        """End the last line, wherever the answer stopped."""
        if self._is_reasoning:
            show_aside("\n")
        if self._last != "\n":
            show_line()


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
