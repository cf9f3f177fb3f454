"""`freehold train`: a run of a recipe, followed line by line, stopped and taken up again."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from freehold.cli.numbers import bytes_text, count_text
from freehold.cli.picture import BarCell, draw_table, write_picture
from freehold.cli.progress import waiting
from freehold.cli.terminal import show_line, show_note, show_table
from freehold.errors import BadInput, NotFound

if TYPE_CHECKING:
    from freehold.recipes.loop import Outcome, Watch
    from freehold.recipes.metrics import StepLine
    from freehold.recipes.plan import RunPlan
    from freehold.recipes.settings import TrainSettings

Settings = TypeVar("Settings", bound="TrainSettings")

app = typer.Typer(name="train", rich_markup_mode=None, add_completion=False)

Preset = Literal["nemotron-3-nano", "nemotron-3-super", "nemotron-3-ultra"]
PICTURE = "loss.svg"
PICTURE_ROWS = 32
BAR_COLOR = "#76b900"

File = Annotated[
    Path | None, typer.Argument(metavar="RUN.toml", help="What to do; --example writes one.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the file; may be given again.", show_default=False
    ),
]
Example = Annotated[bool, typer.Option("--example", help="Print a file with every key and what it means, and end.")]
ShowPlan = Annotated[bool, typer.Option("--plan", help="Print what the run takes of memory, and end.")]


@app.callback(invoke_without_command=True)
def train(context: typer.Context) -> None:
    """Train a model on data that `freehold data build` made, and get a checkpoint that run and serve take.

    Everything that decides a run stands in one TOML file. Ctrl-C finishes the step, saves and ends; the same command
    goes on from there, also after a crash, as the run that never stopped.

    Examples:

    \b
      freehold train sft --example > run.toml
      freehold train sft run.toml
    """
    if context.invoked_subcommand is None:
        show_line(context.get_help())


@app.command()
def sft(
    file: File = None,
    changes: Set = None,
    example: Example = False,
    show_plan: ShowPlan = False,
) -> int:
    """Fine-tune every weight of a checkpoint on conversations or texts.

    Examples:

    \b
      freehold train sft --example > run.toml
      freehold train sft run.toml --plan
      freehold train sft run.toml --set schedule.total=50 --set out=./second
    """
    with waiting("Starting"):
        from freehold.recipes import sft as recipe
    return _train(recipe.SftSettings, recipe.plan, recipe.run, file, changes, example, show_plan)


@app.command()
def lora(
    file: File = None,
    changes: Set = None,
    example: Example = False,
    show_plan: ShowPlan = False,
) -> int:
    """Train an adapter beside a checkpoint that stays as it is stored, quantized too.

    Examples:

    \b
      freehold train lora --example > run.toml
      freehold train lora run.toml
      freehold run smollm2-135m-instruct "Hello" --adapter ./my-run/adapter
    """
    with waiting("Starting"):
        from freehold.recipes import lora as recipe
    return _train(recipe.LoraRunSettings, recipe.plan, recipe.run, file, changes, example, show_plan)


@app.command()
def pretrain(
    file: File = None,
    changes: Set = None,
    example: Example = False,
    preset: Annotated[
        Preset | None, typer.Option(help="Print the file of a published pre-training, and end.", show_default=False)
    ] = None,
    show_plan: ShowPlan = False,
) -> int:
    """Train a new model from its first weights on.

    Examples:

    \b
      freehold train pretrain --example > run.toml
      freehold train pretrain run.toml
      freehold train pretrain --preset nemotron-3-nano > nano.toml
    """
    with waiting("Starting"):
        from freehold.recipes import pretrain as recipe
        from freehold.recipes.toml import write_settings
    if preset:
        show_line(write_settings(recipe.presets()[preset]).rstrip())
        return 0
    return _train(recipe.PretrainSettings, recipe.plan, recipe.run, file, changes, example, show_plan)


def _train(
    kind: type[Settings],
    plan: Callable[[Settings], "RunPlan"],
    run: "Callable[[Settings, Watch], Outcome]",
    file: Path | None,
    changes: list[str] | None,
    example: bool,
    show_plan: bool,
) -> int:
    """Do what was asked for with a recipe, and return the exit code."""
    from freehold.recipes.toml import read_settings, write_example

    if example:
        show_line(write_example(kind).rstrip())
        return 0
    settings = read_settings(_text_of(file), kind, changes=changes or ())
    planned = plan(settings)
    if show_plan:
        _show_plan(planned)
        return 0
    return _follow(run, settings, planned.operations_per_token)


def _text_of(file: Path | None) -> str:
    if file is None:
        raise BadInput("which run? a TOML file is wanted", hint="--example prints one")
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}", hint="--example prints one") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInput(f"{file} is no text file") from None


def _show_plan(plan: "RunPlan") -> None:
    from freehold.engine.machine import main_memory

    rows = [(bytes_text(line.num_bytes), line.name, line.why) for line in plan.lines]
    show_table([*rows, (bytes_text(plan.total_bytes), "at its peak", "")])
    show_line(f"{bytes_text(main_memory().available_bytes)} are free on this machine")


def _follow(run: "Callable[[Settings, Watch], Outcome]", settings: Settings, operations_per_token: float) -> int:
    """Run a recipe, show its steps, and return the exit code."""
    from freehold.evaluate.limits import product_rate
    from freehold.recipes.loop import ADAPTER, MODEL, Watch, use_threads

    peak = product_rate("float32", use_threads(settings)) if settings.device == "cpu" else None
    ledger = _Ledger(total=settings.schedule.total, operations_per_token=operations_per_token, peak=peak)
    with _signals() as received:
        outcome = run(
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
