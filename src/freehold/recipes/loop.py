"""The loop of every recipe: batches from where the data goes on, a step, and now and then a measurement or a save.

Belongs here: what happens in which order, so that a run that is killed at any moment goes on bit for bit. Not here:
which model is trained, and what becomes of it; each recipe says that.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from freehold.engine.machine import usable_threads
from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.ops.native import native_report
from freehold.recipes.data import Note, Streams, held_out_loss
from freehold.recipes.metrics import METRICS, Metrics, StepLine
from freehold.recipes.settings import TrainSettings
from freehold.train.balance import all_blocks
from freehold.train.optim import Optimizer
from freehold.train.packing import Cursor
from freehold.train.state import Run, resume_run, save_run
from freehold.train.step import train_step

MODEL, ADAPTER = "model", "adapter"  # in a run's folder, what a run that came to its end made

Progress = Callable[[StepLine], None]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who follows a run: told of each step and of what is worth a note, asked after each step whether to stop."""

    progress: Progress = lambda line: None
    note: Note = lambda text: None
    should_stop: Callable[[], bool] = lambda: False


NOBODY = Watch()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended: at which step, and whether it was the last. num_taken: steps of this call."""

    step: int
    num_taken: int
    is_done: bool


def train(
    decoder: Decoder, settings: TrainSettings, streams: Streams, *, recipe: Mapping[str, Any], watch: Watch
) -> Outcome:
    """Train what asks for a gradient in a decoder, from where its folder is on, to the end or until asked to stop.

    recipe: what else decides the run, as JSON: which recipe, digests of what it began with.
    Mutates: decoder, torch's random numbers, the run's folder.
    Raises: BadInput where the folder holds another run, or something else; Diverged.
    """
    torch.manual_seed(settings.seed)
    for block in all_blocks(decoder):
        block.recomputes = settings.recompute
    optimizer = Optimizer(decoder, settings.optimizer)
    run = Run(
        decoder=decoder, optimizer=optimizer, config=_config(settings, recipe), cursor=asdict(streams.train.start)
    )
    begin_folder(settings.out)
    for text in resume_run(settings.out, run):
        watch.note(text)
    streams.train.take(Cursor.from_json(dict(run.cursor)), 0)  # refuses other data before anything is written
    if run.step:
        watch.note(f"goes on after step {run.step:,}")
    first, total = run.step, settings.schedule.total
    metrics = Metrics(settings.out, after_step=run.step, tensorboard=settings.tensorboard)
    try:
        is_stopped = False
        while run.step < total and not is_stopped:
            line = _take_step(run, settings, streams)
            metrics.add(line)
            watch.progress(line)
            is_stopped = watch.should_stop()
            if is_stopped or run.step % settings.save_every == 0 or run.step == total:
                save_run(settings.out, run, num_kept=settings.num_kept)
    finally:
        metrics.close()
    return Outcome(step=run.step, num_taken=run.step - first, is_done=run.step >= total)


def use_threads(settings: TrainSettings) -> int:
    """Set and return how many threads torch uses. Mutates: torch's number of threads."""
    torch.set_num_threads(settings.threads or min(torch.get_num_threads(), usable_threads()))
    return torch.get_num_threads()


def begin_folder(folder: Path) -> None:
    """Make a run's folder, unless it is one. Raises: BadInput."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder.name} is a file where a run's folder is wanted")
    names = {path.name for path in folder.glob("[!.]*")} if folder.is_dir() else set()
    if names and METRICS not in names:
        raise BadInput(f"{folder.name} holds something else than a run", hint="name another folder as `out`")
    folder.mkdir(parents=True, exist_ok=True)


def _take_step(run: Run, settings: TrainSettings, streams: Streams) -> StepLine:
    """Take the next step. Mutates: run."""
    start = time.perf_counter()
    number, schedule = run.step + 1, settings.schedule
    packs, cursor = streams.train.take(Cursor.from_json(dict(run.cursor)), settings.packs_per_step)
    report = train_step(
        run.decoder,
        run.optimizer,
        [streams.train.batch(pack, run.decoder.device) for pack in packs],
        number=number,
        learning_rate=schedule.at(number),
        objective=settings.objective,
    )
    run.step, run.num_tokens, run.cursor = number, run.num_tokens + report.num_tokens, asdict(cursor)
    seconds = time.perf_counter() - start
    is_measured = streams.held_out and (number % settings.evaluate_every == 0 or number == schedule.total)
    return StepLine(
        step=number,
        tokens=run.num_tokens,
        step_tokens=report.num_tokens,
        supervised_tokens=report.num_supervised,
        loss=report.loss,
        mtp_losses=report.mtp_losses,
        balance=report.balance,
        worst_violation=report.worst_violation,
        gradient_norm=report.gradient_norm,
        learning_rate=report.learning_rate,
        held_out_loss=held_out_loss(run.decoder, streams.held_out) if is_measured and streams.held_out else None,
        seconds=seconds,
    )


def _config(settings: TrainSettings, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run goes on with only, as JSON gives it back."""
    machine = {"threads": torch.get_num_threads(), "kernels": native_report(), "torch": str(torch.__version__)}
    config: dict[str, Any] = json.loads(json.dumps({**settings.remembered(), **recipe, **machine}, default=str))
    return config
