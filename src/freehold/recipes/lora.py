"""Fine-tuning by adapters (LoRA): a checkpoint stays as it is stored, quantized too; small matrices beside it learn."""

from dataclasses import dataclass
from typing import Annotated

import torch

from freehold.adapt.lora import LoraSettings, wrap
from freehold.checkpoint.dtypes import parse_dtype
from freehold.checkpoint.load import Described
from freehold.checkpoint.pack import is_packable, packed_size
from freehold.engine.adapter import save_adapter
from freehold.errors import BadInput
from freehold.models.decoder import build_decoder
from freehold.ops.native import kernels
from freehold.parallel.processes import ALONE, Processes
from freehold.recipes.fine_tune import FineTuneSettings, begin, describe_model
from freehold.recipes.loop import ADAPTER, NOBODY, Outcome, Watch, train, trained_decoder
from freehold.recipes.plan import RunPlan, run_plan
from freehold.recipes.settings import SCHEDULE_KEY
from freehold.recipes.toml import Key
from freehold.train.schedule import Schedule
from freehold.train.step import Objective

FALLING = Schedule(peak=2e-4, end=2e-5, warmup=10, decay=190, total=200, shape="cosine")
ADAPTERS = LoraSettings()
# An adapter holds no corrections of routers and no MTP, so neither is trained.
OBJECTIVE = Objective(mtp_weight=0.0, mtp_depths=0, balance_weight=0.0, correction_rate=0.0)


@dataclass(frozen=True, kw_only=True)
class LoraRunSettings(FineTuneSettings):
    """What fine-tuning by adapters may be told."""

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
        if self.optimizer.matrices == "muon":
            raise BadInput(
                '`optimizer.matrices = "muon"` moves matrices of blocks, and adapters leave these as they are',
                hint='"adamw" moves adapters',
            )
        if self.parallel.weights == "shard":
            raise BadInput('`parallel.weights = "shard"` is for every weight; adapters are not sharded: "replicate"')


def plan(settings: LoraRunSettings, num_processes: int | None = None) -> RunPlan:
    """Return what one process of a run takes, from headers alone. num_processes: see `run_plan`."""
    return _plan(describe_model(settings), settings, num_processes)


def run(settings: LoraRunSettings, watch: Watch = NOBODY, processes: Processes = ALONE) -> Outcome:
    """Train adapters; at the end the run's folder holds `adapter`, as PEFT writes one.

    Mutates: the run's folder, torch's number of threads.
    Raises: BadInput, before the first step where it can be known; Diverged.
    """
    start = begin(settings, _plan, processes=processes, keep_packed=_keeps_packed(settings), note=watch.note)
    wrap(start.decoder, settings.lora, seed=settings.seed)
    began_with = {"recipe": "lora", **start.digests}
    outcome = train(start.decoder, settings, start.streams, recipe=began_with, watch=watch, processes=processes)
    if made := trained_decoder(start.decoder, settings.out / ADAPTER, outcome, processes):
        save_adapter(settings.out / ADAPTER, made, family=start.described.family, base_sha256=start.sha256)
    return outcome


def _keeps_packed(settings: LoraRunSettings) -> bool:
    return settings.device == "cpu" and kernels() is not None


def _plan(described: Described, settings: LoraRunSettings, num_processes: int | None = None) -> RunPlan:
    decoder = build_decoder(described.spec, dtype=parse_dtype(settings.dtype))
    sizes = {name: parameter.nbytes for name, parameter in decoder.named_parameters()}
    packed: dict[str, int] = {}
    if _keeps_packed(settings):
        packed = {m.name: packed_size(m) for m in described.matches.matches if is_packable(m)}
    with torch.device("meta"):  # as the decoder: no adapter is drawn for its size
        wrap(decoder, settings.lora, seed=settings.seed)
    return run_plan(
        decoder,
        settings,
        base_bytes=sum((sizes | packed).values()),
        base_is_float32=decoder.dtype is torch.float32 and not packed,
        num_processes=num_processes,
    )
