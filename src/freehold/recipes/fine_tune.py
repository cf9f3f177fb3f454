"""What all fine-tuning begins with: a checkpoint, opened once, met with its data and the machine's memory, and loaded.

Belongs here: what fine-tuning every weight and fine-tuning by adapters have in common. Not here: what of it is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from freehold.checkpoint.dtypes import parse_dtype
from freehold.checkpoint.fetch import find
from freehold.checkpoint.load import Described, load_decoder, open_described
from freehold.checkpoint.text_side import TextSide, load_text_side
from freehold.engine.model import parse_device
from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.parallel.processes import Processes
from freehold.recipes.data import Note, Streams, open_streams
from freehold.recipes.loop import begin_folder, use_threads
from freehold.recipes.plan import RunPlan, check_run
from freehold.recipes.settings import TrainSettings
from freehold.recipes.toml import Key
from freehold.settings import Settings
from freehold.trust.identity import digest_config, digest_files


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings(TrainSettings):
    """What all fine-tuning may be told."""

    model: Annotated[
        str,
        Key(says="A folder, a file or a name: the checkpoint that is fine-tuned.", example="smollm2-135m-instruct"),
    ]


Chosen = TypeVar("Chosen", bound=FineTuneSettings)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A checkpoint as a run finds it, and its data. sha256: of the checkpoint's weights."""

    described: Described
    text: TextSide
    decoder: Decoder
    streams: Streams
    sha256: str

    @property
    def digests(self) -> dict[str, str]:
        """What a saved run remembers of the checkpoint."""
        return {"weights": self.sha256, "config": digest_config(self.described.config)}


def describe_model(settings: FineTuneSettings) -> Described:
    """Return what the checkpoint of a run holds, from headers alone."""
    source, described = open_described(find(settings.model, Settings().models_dir))
    source.close()
    return described


def begin(
    settings: Chosen,
    plan: Callable[[Described, Chosen, int], RunPlan],
    *,
    processes: Processes,
    keep_packed: bool = False,
    note: Note,
) -> Beginning:
    """Return the loaded checkpoint of a run that can begin; quantized weights become tensors, or are kept packed.

    Mutates: the run's folder, torch's number of threads.
    Raises: BadInput, where data, tokenizer, folder or memory do not let the run begin.
    """
    device = parse_device(settings.device)
    source, described = open_described(find(settings.model, Settings().models_dir))
    with source:
        text = load_text_side(source, described)
        if text.tokenizer is None:
            raise BadInput(f"{settings.model} has no tokenizer", hint="put its tokenizer.json beside the weights")
        begin_folder(settings.out)
        streams = open_streams(
            settings.data,
            tokenizer=text.tokenizer,
            template=text.template,
            max_positions=described.spec.max_positions,
            seed=settings.seed,
            note=note,
        )
        check_run(plan(described, settings, processes.count), device, processes)
        use_threads(settings)
        decoder, _ = load_decoder(
            source, described, dtype=parse_dtype(settings.dtype), device=device, keep_packed=keep_packed
        )
        sha256 = digest_files(source.files)
    return Beginning(described=described, text=text, decoder=decoder, streams=streams, sha256=sha256)
