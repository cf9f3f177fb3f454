"""Write freehold-pico's text: `python rows.py FOLDER NUM_TEXTS NUM_CHATS NUM_HELD_OUT` makes files of JSON rows.

Rows are made by number, so a larger file begins with the rows of a smaller one; rows of negative numbers are held out.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from conversations import Row, chat_row, text_row


def write_rows(path: Path, row_of: Callable[[int], Row], numbers: Iterable[int]) -> None:
    """Write the rows of some numbers."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row_of(number)) + "\n" for number in numbers)


def main(folder: Path, num_texts: int, num_chats: int, num_held_out: int) -> None:
    """Write texts and chats to train on, and as many of each to measure with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "texts.jsonl", text_row, range(num_texts))
    write_rows(folder / "chats.jsonl", chat_row, range(num_chats))
    write_rows(folder / "held-out-texts.jsonl", text_row, range(-num_held_out, 0))
    write_rows(folder / "held-out-chats.jsonl", chat_row, range(-num_held_out, 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
