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
from freehold.ops.native import keep_freed_memory, native_report
from freehold.parallel.checkpoint import Saver
from freehold.parallel.data import shard
from freehold.parallel.model import Divided, divide_model
from freehold.parallel.processes import ALONE, OWN_SEQUENCES, Processes
from freehold.recipes.data import Note, Streams, held_out_loss, share_of
from freehold.recipes.metrics import METRICS, Metrics, StepLine
from freehold.recipes.settings import TrainSettings
from freehold.train.balance import all_blocks
from freehold.train.optim import Optimizer
from freehold.train.packing import Cursor
from freehold.train.state import Run, finish_saving, resume_run, save_run
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
    """How a call ended: at which step, and whether it was the last. num_taken: steps of this call.

    divided: which part of the model this process has.
    """

    step: int
    num_taken: int
    is_done: bool
    divided: Divided


def train(
    decoder: Decoder,
    settings: TrainSettings,
    streams: Streams,
    *,
    recipe: Mapping[str, Any],
    watch: Watch,
    processes: Processes = ALONE,
) -> Outcome:
    """Train what asks for a gradient in a decoder, from where its folder is on, to the end or until asked to stop.

    recipe: what else decides the run, as JSON: which recipe, digests of what it began with. processes: those that make
        it together; the first alone writes metrics.
    Mutates: decoder, torch's random numbers, the run's folder.
    Raises: BadInput where the folder holds another run, or something else; Diverged.
    """
    torch.manual_seed(settings.seed)
    keep_freed_memory()
    for block in all_blocks(decoder):
        block.recomputes = settings.recompute
    begin_folder(settings.out)
    processes.any(False)  # nobody writes there before all have seen what is there
    run = _new_run(decoder, settings, streams, recipe, processes)
    for text in resume_run(settings.out, run):
        watch.note(text)
    streams.train.take(Cursor.from_json(dict(run.cursor)), 0)  # refuses other data before anything is written
    if run.step:
        watch.note(f"goes on after step {run.step:,}")
    first, total = run.step, settings.schedule.total
    metrics = (
        Metrics(settings.out, after_step=run.step, tensorboard=settings.tensorboard) if processes.is_first else None
    )
    try:
        is_stopped = False
        while run.step < total and not is_stopped:
            line = _take_step(run, settings, streams)
            if metrics:
                metrics.add(line)
            watch.progress(line)
            is_stopped = processes.any(watch.should_stop())
            if is_stopped or run.step % settings.save_every == 0 or run.step == total:
                save_run(settings.out, run, num_kept=settings.num_kept)
        finish_saving(run)
    finally:
        if metrics:
            metrics.close()
    return Outcome(step=run.step, num_taken=run.step - first, is_done=run.step >= total, divided=run.divided)


def trained_decoder(decoder: Decoder, folder: Path, outcome: Outcome, processes: Processes) -> Decoder | None:
    """Return a decoder with all weights where a run is done and `folder` is not there yet: in the first process.

    None in the others, which come to this call, too, and where nothing is left to write.
    """
    if not processes.any(processes.is_first and outcome.is_done and not folder.exists()):
        return None
    return outcome.divided.whole_decoder(decoder)


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


def _new_run(
    decoder: Decoder, settings: TrainSettings, streams: Streams, recipe: Mapping[str, Any], processes: Processes
) -> Run:
    """Return a run that has taken no step, its weights where they belong. Mutates: decoder."""
    shares = processes.size(*OWN_SEQUENCES)
    if settings.packs_per_step % shares:
        raise BadInput(
            f"a step has {settings.packs_per_step} portions of `data.budget_tokens`, which {shares} processes cannot "
            "share evenly",
            hint=f"start a number of processes that divides {settings.packs_per_step}, or change data.tokens_per_step",
        )
    parallel = settings.parallel
    divided = divide_model(decoder, processes)
    is_sharded = parallel.weights == "shard" and processes.count > 1
    if is_sharded:
        shard(decoder, processes, copies=parallel.copies)
    gradients = divided.gradients(decoder, copies=parallel.copies)
    return Run(
        decoder=decoder,
        optimizer=Optimizer(decoder, settings.optimizer, gradients),
        config=_config(settings, recipe),
        machine=_machine(settings, processes),
        cursor=asdict(streams.train.start),
        divided=divided,
        saver=Saver() if is_sharded else None,
    )


def _take_step(run: Run, settings: TrainSettings, streams: Streams) -> StepLine:
    """Take the next step. Mutates: run."""
    start = time.perf_counter()
    number, schedule = run.step + 1, settings.schedule
    packs, cursor = streams.train.take(Cursor.from_json(dict(run.cursor)), settings.packs_per_step)
    mine = packs[run.processes.index(*OWN_SEQUENCES) :: run.processes.size(*OWN_SEQUENCES)]
    report = train_step(
        run.decoder,
        run.optimizer,
        [share_of(streams.train.batch(pack, run.decoder.device), run.processes) for pack in mine],
        number=number,
        learning_rate=schedule.at(number),
        objective=settings.objective,
        sum_over_processes=run.processes.sum,
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
        held_out_loss=held_out_loss(run.decoder, streams.held_out, run.processes)
        if is_measured and streams.held_out
        else None,
        seconds=seconds,
    )


def _config(settings: TrainSettings, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run goes on with only, as JSON gives it back."""
    config: dict[str, Any] = json.loads(json.dumps({**settings.remembered(), **recipe}, default=str))
    return config


def _machine(settings: TrainSettings, processes: Processes) -> dict[str, Any]:
    """Return what a run goes on with bit for bit only."""
    together = "1 process"
    if processes.count > 1:
        parallel = settings.parallel
        weights = (
            "with whole weights" if parallel.weights == "replicate" else f"with {parallel.copies} x weights in parts"
        )
        sizes = ", ".join(f"{name} {size}" for name, size in vars(parallel.sizes).items() if size > 1)
        together = f"{processes.count} processes {weights}{' and ' if sizes else ''}{sizes}"
    return {
        "processes": together,
        "threads": torch.get_num_threads(),
        "kernels": native_report(),
        "torch": str(torch.__version__),
    }
