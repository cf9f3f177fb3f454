"""Fine-tuning by adapters (LoRA): a checkpoint stays as it is stored, quantized too; small matrices beside it learn."""

from dataclasses import dataclass
from typing import Annotated

from freehold.adapt.lora import LoraSettings, wrap
from freehold.checkpoint.dtypes import parse_dtype
from freehold.checkpoint.fetch import find
from freehold.checkpoint.load import Described, load_decoder, open_described
from freehold.checkpoint.pack import is_packable, packed_size
from freehold.checkpoint.text_side import load_text_side
from freehold.engine.adapter import save_adapter
from freehold.engine.machine import memory_of
from freehold.engine.model import parse_device
from freehold.errors import BadInput
from freehold.models.decoder import build_decoder
from freehold.ops.native import kernels
from freehold.recipes.data import open_streams
from freehold.recipes.loop import ADAPTER, NOBODY, Outcome, Watch, begin_folder, train, use_threads
from freehold.recipes.plan import RunPlan, check_memory, run_plan
from freehold.recipes.settings import SCHEDULE_KEY, TrainSettings
from freehold.recipes.toml import Key
from freehold.settings import Settings
from freehold.train.schedule import Schedule
from freehold.train.step import Objective
from freehold.trust.identity import digest_config, digest_files

FALLING = Schedule(peak=2e-4, end=2e-5, warmup=10, decay=190, total=200, shape="cosine")
ADAPTERS = LoraSettings()
# An adapter holds no corrections of routers and no MTP, so neither is trained.
OBJECTIVE = Objective(mtp_weight=0.0, mtp_depths=0, balance_weight=0.0, correction_rate=0.0)


@dataclass(frozen=True, kw_only=True)
class LoraRunSettings(TrainSettings):
    """What fine-tuning by adapters may be told."""

    model: Annotated[
        str,
        Key(
            says="A folder, a file or a name: the checkpoint beside which is trained.", example="smollm2-135m-instruct"
        ),
    ]
    lora: Annotated[
        LoraSettings,
        Key(
            says="Rank and alpha of the adapters, the ends of the names of projections that get one (all-linear is all "
            "of them), and their dtype."
        ),
    ] = ADAPTERS
    schedule: Annotated[Schedule, SCHEDULE_KEY] = FALLING
    objective: Annotated[Objective, Key(says="Where gradients are clipped; MTP and routers do not learn.")] = OBJECTIVE

    def __post_init__(self) -> None:
        """Refuse what does not fit together. Raises: BadInput."""
        super().__post_init__()
        if self.objective.correction_rate or self.objective.mtp_depths:
            raise BadInput(
                "`objective.correction_rate` and `objective.mtp_depths` are 0 for adapters, which hold neither"
            )


def plan(settings: LoraRunSettings) -> RunPlan:
    """Return what a run takes, from headers alone."""
    source, described = open_described(find(settings.model, Settings().models_dir))
    source.close()
    return _plan(described, settings)


def run(settings: LoraRunSettings, watch: Watch = NOBODY) -> Outcome:
    """Train adapters; at the end the run's folder holds `adapter`, as PEFT writes one.

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
        check_memory(_plan(described, settings), memory_of(device).available_bytes)
        use_threads(settings)
        decoder, _ = load_decoder(
            source,
            described,
            dtype=parse_dtype(settings.dtype),
            device=device,
            keep_packed=_keeps_packed(settings),
        )
    wrap(decoder, settings.lora, seed=settings.seed)
    base = digest_files(source.files)
    began_with = {"recipe": "lora", "weights": base, "config": digest_config(described.config)}
    outcome = train(decoder, settings, streams, recipe=began_with, watch=watch)
    if outcome.is_done and not (settings.out / ADAPTER).exists():
        save_adapter(settings.out / ADAPTER, decoder, family=described.family, base_sha256=base)
    return outcome


def _keeps_packed(settings: LoraRunSettings) -> bool:
    return settings.device == "cpu" and kernels() is not None


def _plan(described: Described, settings: LoraRunSettings) -> RunPlan:
    decoder = build_decoder(described.spec, dtype=parse_dtype(settings.dtype))
    sizes = {name: parameter.nbytes for name, parameter in decoder.named_parameters()}
    if _keeps_packed(settings):
        sizes |= {m.name: packed_size(m) for m in described.matches.matches if is_packable(m)}
    wrap(decoder, settings.lora, seed=settings.seed)
    return run_plan(decoder, settings, base_bytes=sum(sizes.values()))
