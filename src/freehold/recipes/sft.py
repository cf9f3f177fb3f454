"""Supervised fine-tuning: every weight of a checkpoint learns from conversations, or from texts."""

from dataclasses import dataclass

from freehold.checkpoint.load import Described
from freehold.checkpoint.save import save_checkpoint
from freehold.recipes.fine_tune import FineTuneSettings, begin, describe_model
from freehold.recipes.loop import MODEL, NOBODY, Outcome, Watch, train
from freehold.recipes.plan import RunPlan, plan_of
from freehold.train.optim import train_all


@dataclass(frozen=True, kw_only=True)
class SftSettings(FineTuneSettings):
    """What fine-tuning every weight may be told."""


def plan(settings: SftSettings) -> RunPlan:
    """Return what a run takes, from headers alone."""
    return _plan(describe_model(settings), settings)


def run(settings: SftSettings, watch: Watch = NOBODY) -> Outcome:
    """Fine-tune a checkpoint; at the end the run's folder holds `model`, a checkpoint like it.

    Mutates: the run's folder, torch's number of threads.
    Raises: BadInput, before the first step where it can be known; Diverged.
    """
    start = begin(settings, _plan, note=watch.note)
    train_all(start.decoder)
    outcome = train(start.decoder, settings, start.streams, recipe={"recipe": "sft", **start.digests}, watch=watch)
    if outcome.is_done and not (settings.out / MODEL).exists():
        save_checkpoint(
            settings.out / MODEL,
            start.decoder,
            family=start.described.family,
            config=start.described.config,
            write_text_files=start.text.write_files,
        )
    return outcome


def _plan(described: Described, settings: SftSettings) -> RunPlan:
    return plan_of(described.spec, settings)
