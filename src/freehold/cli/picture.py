"""A table with bars as a picture: an SVG file that any browser shows.

rich lays it out and writes it; our frame for its SVG loads no font from a network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from freehold.errors import BadInput

WIDTH = 116  # columns of text
BAR_WIDTH = 18
TRACK = "grey93"  # what a bar is drawn on

# The names in braces are rich's (`Console.export_svg`).
FRAME = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="100%" height="100%" fill="#ffffff"/>
<g transform="translate({terminal_x}, {char_height})">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


@dataclass(frozen=True, kw_only=True)
class BarCell:
    """A number in words, and its bar: a share of the whole width."""

    text: str
    share: float
    color: str


def check_picture(path: Path) -> None:
    """Refuse a place where no picture can be written. Raises: BadInput."""
    if path.suffix.lower() != ".svg":
        raise BadInput(f"{path.name}: pictures are SVG files", hint=f"name it {path.stem}.svg")
    if path.exists():
        raise BadInput(f"{path.name} exists already", hint="name another file")
    if not path.parent.is_dir():
        raise BadInput(f"{path.name} cannot be written: there is no folder {path.parent}")


def write_picture(path: Path, text: str) -> None:
    """Write a picture to a new file. Raises: BadInput."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadInput(f"{path.name} cannot be written: {error.strerror}") from None


def draw_table(lines: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str | BarCell]]) -> str:
    """Return the SVG of lines of text over a table; an empty row is a gap, and the first row is none."""
    from rich.bar import Bar
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title, cell in zip(header, rows[0], strict=True):
        is_name = isinstance(cell, str) and not cell[:1].isdigit()
        table.add_column(title, justify="left" if is_name else "right", no_wrap=True)
        if isinstance(cell, BarCell):
            table.add_column("", width=BAR_WIDTH)
    for row in rows:
        drawn: list[RenderableType] = []
        for cell in row:
            drawn.append(Text(cell.text if isinstance(cell, BarCell) else cell))
            if isinstance(cell, BarCell):
                drawn.append(Bar(1.0, 0.0, min(cell.share, 1.0), color=cell.color, bgcolor=TRACK, width=BAR_WIDTH))
        table.add_row(*drawn)
    console = Console(record=True, file=StringIO(), width=WIDTH, color_system="truecolor", force_terminal=True)
    for line in lines:
        console.print(Text(line))
    console.print()
    console.print(table)
    return console.export_svg(title="", theme=DEFAULT_TERMINAL_THEME, code_format=FRAME)
