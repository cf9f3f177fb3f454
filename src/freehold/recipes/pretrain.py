"""Pre-training: a new model from a config, its first weights as its family was published, learns from texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from freehold.checkpoint.dtypes import parse_dtype
from freehold.checkpoint.safetensors import parse_json_object
from freehold.checkpoint.save import save_checkpoint
from freehold.checkpoint.text_side import TextSide, text_side_of_folder
from freehold.engine.model import parse_device
from freehold.errors import BadInput
from freehold.models.decoder import build_decoder
from freehold.models.families import family_of_config
from freehold.models.init import InitSettings, initialize
from freehold.parallel.processes import ALONE, Processes
from freehold.recipes.data import open_streams
from freehold.recipes.loop import MODEL, NOBODY, Outcome, Watch, begin_folder, train, trained_decoder, use_threads
from freehold.recipes.plan import RunPlan, check_run, plan_of
from freehold.recipes.settings import SCHEDULE_KEY, DataSettings, TrainSettings
from freehold.recipes.toml import Key
from freehold.train.optim import OptimizerSettings, train_all
from freehold.train.schedule import NEMOTRON_3, Schedule
from freehold.train.step import Objective
from freehold.trust.identity import digest_config

# A model that two cores train in minutes.
SMALL_MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WARM_STABLE_DECAY = Schedule(peak=1e-3, end=1e-5, warmup=20, decay=200, total=1000, shape="minus_sqrt")
NEMOTRON_3_TOKENS_PER_STEP = 3072 * 8192


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """What pre-training may be told."""

    tokenizer: Annotated[
        Path, Key(says="A folder with the tokenizer.json that the data is built with.", example=Path("./tokenizer"))
    ]
    model: Annotated[
        Path | dict[str, Any],
        Key(
            says="The new model: a config.json of any family as a path, or its keys in this table. Without vocab_size "
            "it is the tokenizer's.",
            example=SMALL_MODEL,
        ),
    ]
    schedule: Annotated[Schedule, SCHEDULE_KEY] = WARM_STABLE_DECAY


def presets() -> dict[str, PretrainSettings]:
    """Return the pre-training of Nemotron 3 as published, but for data and model: batch, rates, optimizer, balance.

    Nano has no MTP. Ultra's batch is not known; it is given that of the others.
    """
    data = DataSettings(
        train=(Path("./texts"),), sequence_tokens=8192, budget_tokens=8192, tokens_per_step=NEMOTRON_3_TOKENS_PER_STEP
    )
    mtp_weights = {"nano": 0.0, "super": 0.3, "ultra": 0.1}
    return {
        f"nemotron-3-{size}": PretrainSettings(
            out=Path("./my-run"),
            tokenizer=Path("./tokenizer"),
            model=Path("./config.json"),
            data=data,
            dtype="bfloat16",
            schedule=schedule.scaled(round(schedule.total / NEMOTRON_3_TOKENS_PER_STEP)),
            optimizer=OptimizerSettings(),
            objective=Objective(mtp_weight=mtp_weights[size]),
        )
        for size, schedule in NEMOTRON_3.items()
    }


def plan(settings: PretrainSettings, num_processes: int | None = None) -> RunPlan:
    """Return what one process of a run takes. num_processes: see `run_plan`."""
    _, config = _described(settings)
    return plan_of(family_of_config(config).read_config(config), settings, num_processes)


def run(settings: PretrainSettings, watch: Watch = NOBODY, processes: Processes = ALONE) -> Outcome:
    """Train a new model; at the end the run's folder holds `model`, a checkpoint of its family.

    Mutates: the run's folder, torch's number of threads.
    Raises: BadInput, before the first step where it can be known; Diverged.
    """
    device = parse_device(settings.device)
    text, config = _described(settings)
    family, first = family_of_config(config), InitSettings.from_config(config)
    spec = family.read_config(config)
    begin_folder(settings.out)
    assert text.tokenizer is not None, "a folder without one was refused"
    streams = open_streams(
        settings.data,
        tokenizer=text.tokenizer,
        template=text.template,
        max_positions=spec.max_positions,
        seed=settings.seed,
        note=watch.note,
    )
    check_run(plan_of(spec, settings, processes.count), device, processes)
    use_threads(settings)
    decoder = build_decoder(spec, dtype=parse_dtype(settings.dtype)).to_empty(device=device)
    decoder.tie_embeddings()
    initialize(decoder, first, seed=settings.seed)
    train_all(decoder)
    began_with = {"recipe": "pretrain", "config": digest_config(config)}
    outcome = train(decoder, settings, streams, recipe=began_with, watch=watch, processes=processes)
    if made := trained_decoder(decoder, settings.out / MODEL, outcome, processes):
        save_checkpoint(settings.out / MODEL, made, family=family, config=config, write_text_files=text.write_files)
    return outcome


def _described(settings: PretrainSettings) -> tuple[TextSide, Mapping[str, Any]]:
    """Return the text side and the config of the new model. Raises: BadInput."""
    given = settings.model
    config = _read_json(given) if isinstance(given, Path) else given
    text = text_side_of_folder(settings.tokenizer, family_of_config(config).name)
    if text.tokenizer is None:
        raise BadInput(f"{settings.tokenizer} has no tokenizer.json", hint="`tokenizer` is a folder with one")
    num_ids = text.tokenizer.vocab_size
    config = {"vocab_size": num_ids, **config}
    if type(config["vocab_size"]) is int and config["vocab_size"] < num_ids:
        raise BadInput(f"`model.vocab_size` is {config['vocab_size']:,}, the tokenizer has {num_ids:,} ids")
    return text, config


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        return parse_json_object(file.read_bytes(), file=file.name)
    except OSError as error:
        raise BadInput(f"`model`: {file} cannot be read: {error.strerror}") from None
