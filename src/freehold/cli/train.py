"""`freehold train`: a run of a recipe, followed line by line, stopped and taken up again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from freehold.cli.curve import PICTURE, draw_losses
from freehold.cli.numbers import count_text
from freehold.cli.progress import waiting
from freehold.cli.run_file import RecipeName, Set, read_run
from freehold.cli.terminal import show_line, show_note
from freehold.errors import BadInput
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.parallel.processes import Processes
    from freehold.recipes.metrics import StepLine
    from freehold.recipes.recipe import Recipe
    from freehold.recipes.settings import TrainSettings

Preset = Literal["nemotron-3-nano", "nemotron-3-super", "nemotron-3-ultra"]


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
        from freehold.parallel.processes import said_once
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
    launch = Settings().launch
    with said_once(launch):
        settings = read_run(chosen, file, changes)
        settings.parallel.sizes.mesh_shape(launch.count if launch else 1)  # refuses what does not divide
    return _follow(chosen, settings)


def _follow(recipe: "Recipe[TrainSettings]", settings: "TrainSettings") -> int:
    """Run a recipe, show its steps, and return the exit code."""
    from freehold.parallel.processes import joined
    from freehold.recipes.loop import ADAPTER, MODEL, Watch

    device_type = settings.device.partition(":")[0]
    joining = joined(Settings().launch, settings.parallel.sizes, device_type=device_type)
    with joining as processes, _signals(processes) as received:
        watch = Watch(should_stop=lambda: bool(received))
        if processes.is_first:
            ledger = _new_ledger(recipe, settings, processes)
            watch = replace(watch, progress=ledger.show, note=lambda text: show_note(f"note: {text}"))
        outcome = recipe.run(settings, watch, processes)
    if not outcome.is_done:
        if processes.is_first:
            show_note(f"saved after step {outcome.step:,} in {settings.out}; the same command goes on from there")
        return 128 + (received or [signal.SIGTERM])[0]  # a process may stop for another's signal
    if not processes.is_first:
        return 0
    if outcome.num_taken and not (settings.out / PICTURE).exists():
        draw_losses(settings.out)
    made = next(path for path in (settings.out / ADAPTER, settings.out / MODEL) if path.exists())
    show_line(f"done: {made}")
    return 0


def _new_ledger(recipe: "Recipe[TrainSettings]", settings: "TrainSettings", processes: "Processes") -> "_Ledger":
    from freehold.checkpoint.dtypes import parse_dtype
    from freehold.engine.model import parse_device
    from freehold.evaluate.limits import device_product_rate, product_rate
    from freehold.recipes.loop import use_threads

    device, num_threads = parse_device(settings.device), use_threads(settings)
    is_cpu = device.type == "cpu"
    rate = product_rate("float32", num_threads) if is_cpu else device_product_rate(device, parse_dtype(settings.dtype))
    return _Ledger(
        total=settings.schedule.total,
        operations_per_token=recipe.plan(settings).operations_per_token,
        peak=rate * processes.count,
    )


@contextmanager
def _signals(processes: "Processes") -> Iterator[list[int]]:
    """Yield a list to which the first Ctrl-C or SIGTERM is added; the second ends the program at once, as always.

    Not where torchrun is above: it passes Ctrl-C on by a signal of its own, and sees to it that all end.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note_first(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if processes.count > 1:
            return
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

    operations_per_token: see `RunPlan`. peak: operations per second that the machine can do.
    """

    total: int
    operations_per_token: float
    peak: float
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
            f"{rate * self.operations_per_token / self.peak:.0%} of peak",
            f"{_duration((self.total - line.step) * self.seconds / self.num_steps)} left",
        ]
        show_line("  ".join(cells))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
