"""The losses of a run as a picture: curves over its steps, an SVG file that any browser shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PICTURE = "loss.svg"
MOST_POINTS = 500  # of a curve: each is the mean of a stretch of steps
WIDTH, HEIGHT = 900, 500
TRAINED_COLOR, HELD_OUT_COLOR = "#76b900", "#1f4e79"

Point = tuple[int, float]


def draw_losses(folder: Path) -> None:
    """Write the picture of a run's losses into its folder. Mutates: the picture."""
    import leather

    from freehold.recipes.metrics import read_metrics

    lines = list(read_metrics(folder))
    chart = leather.Chart(f"{folder.name}: loss in nats per token")
    chart.add_line(trained_on(lines), name="trained on", width=1, stroke_color=TRAINED_COLOR)
    if measured := held_out(lines):
        chart.add_line(measured, name="held out", stroke_color=HELD_OUT_COLOR)
    chart.add_x_axis(name="step")
    (folder / PICTURE).write_text(chart.to_svg(width=WIDTH, height=HEIGHT), encoding="utf-8")


def trained_on(lines: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the last step of each stretch, and the mean of its losses."""
    size = -(-len(lines) // MOST_POINTS)
    stretches = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [(stretch[-1]["step"], sum(line["loss"] for line in stretch) / len(stretch)) for stretch in stretches]


def held_out(lines: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the steps after which held-out data was measured, and its losses."""
    return [(line["step"], line["held_out_loss"]) for line in lines if line["held_out_loss"] is not None]
