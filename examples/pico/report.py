"""What became of a training of freehold-pico: `python report.py FOLDER` writes report.md there, figures and samples.

Every figure is measured here or read from the runs' own metrics.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import freehold
from freehold.engine.model import Model
from freehold.engine.plan import count_parts
from freehold.recipes.metrics import read_metrics

PROMPTS = (
    *("Hello!", "Who are you?", "What can you do?", "Tell me a story.", "Tell me a story about a fox and a lamp."),
    *("Write a short story about a shy dragon named Ben.", "Tell me a story about sharing with others."),
    *(
        "Continue this story: One snowy morning, Mia the mouse found a key.",
        "What is a mirror?",
        "What does a cow eat?",
    ),
    *("I am sad.", "What is two plus three?", "What is the opposite of cold?", "What is the capital of France?"),
)
DRAWS = ({"temperature": 0.0}, {"temperature": 0.7, "seed": 1})


def figures(folder: Path, model: Model) -> Iterator[tuple[str, str]]:
    """Yield what was measured, each with its name."""
    parts = count_parts(model.described.spec)
    yield "parameters", f"{sum(part.num_parameters for part in parts):,}"
    yield "of them met by one token", f"{sum(part.num_active for part in parts):,}"
    yield "bytes in the wheel", f"{sum(file.stat().st_size for file in (folder / 'freehold-pico').iterdir()):,}"
    for run in ("pretrained", "tuned"):
        lines = list(read_metrics(folder / run))
        yield f"{run}: steps", f"{len(lines):,}"
        yield f"{run}: tokens", f"{lines[-1]['tokens']:,}"
        yield f"{run}: minutes of steps", f"{sum(line['seconds'] for line in lines) / 60:.1f}"
        yield f"{run}: loss of the first and of the last 20 steps", f"{_mean(lines[:20]):.3f}, {_mean(lines[-20:]):.3f}"
        yield f"{run}: held-out loss at the end", f"{lines[-1]['held_out_loss']:.4f}"


def _mean(lines: list[Mapping[str, Any]]) -> float:
    return sum(line["loss"] for line in lines) / len(lines)


def samples(model: Model) -> Iterator[str]:
    """Yield what the model answers to each prompt."""
    for prompt in PROMPTS:
        yield f"\n**{prompt}**\n"
        for draw in DRAWS:
            answer = model.chat([{"role": "user", "content": prompt}], max_tokens=200, **draw)
            yield f"- ({', '.join(f'{name} {value}' for name, value in draw.items())}) {answer.text}"


def main(folder: Path) -> None:
    """Write the report of a folder that pico.sh filled."""
    model = freehold.load(folder / "freehold-pico")
    table = ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures(folder, model))]
    (folder / "report.md").write_text("\n".join([*table, *samples(model)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
