"""Supervised fine-tuning: every weight of a checkpoint learns from conversations, or from texts."""

from dataclasses import dataclass

from freehold.checkpoint.load import Described
from freehold.checkpoint.save import save_checkpoint
from freehold.parallel.processes import ALONE, Processes
from freehold.recipes.fine_tune import FineTuneSettings, begin, describe_model
from freehold.recipes.loop import MODEL, NOBODY, Outcome, Watch, train, trained_decoder
from freehold.recipes.plan import RunPlan, plan_of
from freehold.train.optim import train_all


@dataclass(frozen=True, kw_only=True)
class SftSettings(FineTuneSettings):
    """What fine-tuning every weight may be told."""


def plan(settings: SftSettings, num_processes: int | None = None) -> RunPlan:
    """Return what one process of a run takes, from headers alone. num_processes: see `run_plan`."""
    return _plan(describe_model(settings), settings, num_processes)


def run(settings: SftSettings, watch: Watch = NOBODY, processes: Processes = ALONE) -> Outcome:
    """Fine-tune a checkpoint; at the end the run's folder holds `model`, a checkpoint like it.

    Mutates: the run's folder, torch's number of threads.
    Raises: BadInput, before the first step where it can be known; Diverged.
    """
    start = begin(settings, _plan, processes=processes, note=watch.note)
    train_all(start.decoder)
    began_with = {"recipe": "sft", **start.digests}
    outcome = train(start.decoder, settings, start.streams, recipe=began_with, watch=watch, processes=processes)
    if made := trained_decoder(start.decoder, settings.out / MODEL, outcome, processes):
        save_checkpoint(
            settings.out / MODEL,
            made,
            family=start.described.family,
            config=start.described.config,
            write_text_files=start.text.write_files,
        )
    return outcome


def _plan(described: Described, settings: SftSettings, num_processes: int | None = None) -> RunPlan:
    return plan_of(described.spec, settings, num_processes)
