"""Supervised fine-tuning: every weight of a checkpoint learns from conversations, or from texts."""

from dataclasses import dataclass
from typing import Annotated

from freehold.checkpoint.dtypes import parse_dtype
from freehold.checkpoint.fetch import find
from freehold.checkpoint.load import load_decoder, open_described
from freehold.checkpoint.save import save_checkpoint
from freehold.checkpoint.text_side import load_text_side
from freehold.engine.machine import memory_of
from freehold.engine.model import parse_device
from freehold.errors import BadInput
from freehold.recipes.data import open_streams
from freehold.recipes.loop import MODEL, NOBODY, Outcome, Watch, begin_folder, train, use_threads
from freehold.recipes.plan import RunPlan, check_memory, plan_of
from freehold.recipes.settings import TrainSettings
from freehold.recipes.toml import Key
from freehold.settings import Settings
from freehold.train.optim import train_all
from freehold.trust.identity import digest_config, digest_files


@dataclass(frozen=True, kw_only=True)
class SftSettings(TrainSettings):
    """What fine-tuning may be told."""

    model: Annotated[
        str,
        Key(says="A folder, a file or a name: the checkpoint that is trained.", example="smollm2-135m-instruct"),
    ]


def plan(settings: SftSettings) -> RunPlan:
    """Return what a run takes, from headers alone."""
    source, described = open_described(find(settings.model, Settings().models_dir))
    source.close()
    return plan_of(described.spec, settings)


def run(settings: SftSettings, watch: Watch = NOBODY) -> Outcome:
    """Fine-tune a checkpoint; at the end the run's folder holds `model`, a checkpoint like it.

    Mutates: the run's folder, torch's number of threads.
    Raises: BadInput, before the first step where it can be known; Diverged.
    """
    device = parse_device(settings.device)
    source, described = open_described(find(settings.model, Settings().models_dir))
    with source:
        text = load_text_side(source, described)
        if text.tokenizer is None:
            raise BadInput(f"{settings.model} has no tokenizer", hint="put its tokenizer.json beside the weights")
        begin_folder(settings.out)
        streams = open_streams(
            settings.data, tokenizer=text.tokenizer, template=text.template, seed=settings.seed, note=watch.note
        )
        check_memory(plan_of(described.spec, settings), memory_of(device).available_bytes)
        use_threads(settings)
        decoder, _ = load_decoder(source, described, dtype=parse_dtype(settings.dtype), device=device)
    train_all(decoder)
    began_with = {"recipe": "sft", "weights": digest_files(source.files), "config": digest_config(described.config)}
    outcome = train(decoder, settings, streams, recipe=began_with, watch=watch)
    if outcome.is_done and not (settings.out / MODEL).exists():
        save_checkpoint(
            settings.out / MODEL,
            decoder,
            family=described.family,
            config=described.config,
            write_text_files=text.write_files,
        )
    return outcome
