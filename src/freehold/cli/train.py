"""`freehold train`: a run of a recipe, followed line by line, stopped and taken up again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from freehold.cli.numbers import count_text
from freehold.cli.picture import BarCell, draw_table, write_picture
from freehold.cli.progress import waiting
from freehold.cli.run_file import RecipeName, Set, read_run
from freehold.cli.terminal import show_line, show_note
from freehold.errors import BadInput

if TYPE_CHECKING:
    from freehold.recipes.metrics import StepLine
    from freehold.recipes.recipe import Recipe
    from freehold.recipes.settings import TrainSettings

Preset = Literal["nemotron-3-nano", "nemotron-3-super", "nemotron-3-ultra"]
PICTURE = "loss.svg"
PICTURE_ROWS = 32
BAR_COLOR = "#76b900"


def train(
    recipe: RecipeName,
    file: Annotated[
        Path | None, typer.Argument(metavar="RUN.toml", help="What to do; --example writes one.", show_default=False)
    ] = None,
    changes: Set = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print a file with every key and what it means, and end.")
    ] = False,
    preset: Annotated[
        Preset | None, typer.Option(help="Print the file of a published pre-training, and end.", show_default=False)
    ] = None,
) -> int:
    """Train a model on data that `freehold data build` made, and get a checkpoint that run and serve take.

    Everything that decides a run stands in one TOML file. Ctrl-C finishes the step, saves and ends; the same command
    goes on from there, also after a crash, as the run that never stopped.

    Examples:

    \b
      freehold train sft --example > run.toml
      freehold train sft run.toml
      freehold train sft run.toml --set schedule.total=50 --set out=./second
      freehold train pretrain --preset nemotron-3-nano > nano.toml
    """
    with waiting("Starting"):
        from freehold.recipes.recipe import RECIPES
        from freehold.recipes.toml import write_example, write_settings
    chosen = RECIPES[recipe]
    if preset:
        if preset not in chosen.presets():
            raise BadInput(f"{recipe} has no preset {preset}", hint="pretrain has it")
        show_line(write_settings(chosen.presets()[preset]).rstrip())
        return 0
    if example:
        show_line(write_example(chosen.settings).rstrip())
        return 0
    if file is None:
        raise BadInput("which run? a TOML file is wanted", hint="--example prints one")
    return _follow(chosen, read_run(chosen, file, changes))


def _follow(recipe: "Recipe[TrainSettings]", settings: "TrainSettings") -> int:
    """Run a recipe, show its steps, and return the exit code."""
    from freehold.evaluate.limits import product_rate
    from freehold.recipes.loop import ADAPTER, MODEL, Watch, use_threads

    peak = product_rate("float32", use_threads(settings)) if settings.device == "cpu" else None
    ledger = _Ledger(
        total=settings.schedule.total, operations_per_token=recipe.plan(settings).operations_per_token, peak=peak
    )
    with _signals() as received:
        outcome = recipe.run(
            settings,
            Watch(
                progress=ledger.show,
                note=lambda text: show_note(f"note: {text}"),
                should_stop=lambda: bool(received),
            ),
        )
    if not outcome.is_done:
        show_note(f"saved after step {outcome.step:,} in {settings.out}; the same command goes on from there")
        return 128 + received[0]
    if outcome.num_taken and not (settings.out / PICTURE).exists():
        _draw(settings.out)
    made = next(path for path in (settings.out / ADAPTER, settings.out / MODEL) if path.exists())
    show_line(f"done: {made}")
    return 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list to which the first Ctrl-C or SIGTERM is added; the second ends the program at once, as always."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note_first(number: int, frame: FrameType | None) -> None:
        received.append(number)
        show_note("stopping after this step; once more stops at once, without saving")
        for each, was in before.items():
            signal.signal(each, was)

    try:
        for number in before:
            signal.signal(number, note_first)
        yield received
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@dataclass(kw_only=True)
class _Ledger:
    """Shows steps as lines.

    operations_per_token: see `RunPlan`. peak: operations per second that the machine can do, None where unknown.
    """

    total: int
    operations_per_token: float
    peak: float | None
    seconds: float = 0.0
    num_steps: int = 0

    def show(self, line: "StepLine") -> None:
        self.seconds, self.num_steps = self.seconds + line.seconds, self.num_steps + 1
        rate = line.step_tokens / line.seconds
        cells = [
            f"step {line.step:>{len(str(self.total))}}/{self.total}",
            f"loss {line.loss:.4f}",
            *([f"held out {line.held_out_loss:.4f}"] if line.held_out_loss is not None else []),
            f"gradient {line.gradient_norm:.2f}",
            f"rate {line.learning_rate:.2e}",
            f"{count_text(round(rate))} tokens/s",
            *([f"{rate * self.operations_per_token / self.peak:.0%} of peak"] if self.peak else []),
            f"{_duration((self.total - line.step) * self.seconds / self.num_steps)} left",
        ]
        show_line("  ".join(cells))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _draw(folder: Path) -> None:
    """Write the picture of a run's losses: each row is a stretch of steps, and the mean of its losses."""
    from freehold.recipes.metrics import read_metrics

    lines = list(read_metrics(folder))
    size = -(-len(lines) // PICTURE_ROWS)
    stretches = [lines[start : start + size] for start in range(0, len(lines), size)]
    losses = [sum(line["loss"] for line in stretch) / len(stretch) for stretch in stretches]
    rows: list[list[str | BarCell]] = []
    for stretch, loss in zip(stretches, losses, strict=True):
        held_out = [line["held_out_loss"] for line in stretch if line["held_out_loss"] is not None]
        bar = BarCell(text=f"{loss:.4f}", share=loss / max(losses) if max(losses) else 0.0, color=BAR_COLOR)
        rows.append(
            [
                f"{stretch[-1]['step']:,}",
                bar,
                f"{held_out[-1]:.4f}" if held_out else "",
                f"{stretch[-1]['learning_rate']:.2e}",
            ]
        )
    write_picture(
        folder / PICTURE,
        draw_table([f"{folder.name}: loss in nats per token"], ["step", "loss", "held out", "rate"], rows),
    )
