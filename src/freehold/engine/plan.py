"""What a model takes: its parameters by part, its states, and how many sequences a memory holds beside its weights.

Everything is counted from a spec and from headers; no weight is read. Not here: what memory a machine has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from freehold.checkpoint.load import Described
from freehold.checkpoint.pack import is_packable, is_quantized, packed_size
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.layout import kv_bytes_per_token, recurrent_bytes_per_sequence
from freehold.models.spec import AttentionSpec, DecoderSpec, Mamba2Spec, MoeSpec

# For the interpreter with torch (about 0.4 GB), and what a step of some hundred tokens works on.
RESERVED_BYTES = 1 << 30
FIRST_CONTEXT = 2048

# In the order of a forward. A tied head is part of the embeddings.
PARTS = ("embeddings", "attention", "mamba", "mlp", "routed experts", "shared experts, router", "norms", "head", "mtp")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A kind of weights: how many, how many of them one token meets, and their bytes in the file.

    stored_bytes: None where there is no file.
    """

    name: str
    num_parameters: int
    num_active: int
    stored_bytes: int | None


def count_parts(spec: DecoderSpec, described: Described | None = None) -> list[Part]:
    """Return the parts that a model has.

    A token meets each weight but those of experts that are not chosen for it, of the embedding table, where it only
    looks up a row (a tied head is met as the head), and of the MTP module, which drafts.
    """
    num_parameters = dict.fromkeys(PARTS, 0)
    num_active = dict.fromkeys(PARTS, 0)
    stored_bytes = dict.fromkeys(PARTS, 0)
    stored = _stored_bytes(described) if described else {}
    for name, parameter in build_decoder(spec, dtype=torch.float32).named_parameters():
        part = part_of(name, spec)
        num_parameters[part] += parameter.numel()
        num_active[part] += _active(name, parameter.numel(), spec)
        stored_bytes[part] += stored.get(name, 0)
    return [
        Part(
            name="embeddings and head" if name == "embeddings" and spec.tied_embeddings else name,
            num_parameters=num_parameters[name],
            num_active=num_active[name],
            stored_bytes=stored_bytes[name] if described else None,
        )
        for name in PARTS
        if num_parameters[name]
    ]


def part_of(parameter: str, spec: DecoderSpec) -> str:
    """Return the part that a parameter belongs to, by its name."""
    owner, *rest = parameter.split(".")
    if owner != "blocks":
        return {"embeddings": "embeddings", "lm_head": "head", "mtp": "mtp", "norm": "norms"}[owner]
    index, inner, *path = rest
    if inner == "norm":
        return "norms"
    match spec.blocks[int(index)]:
        case AttentionSpec():
            return "attention"
        case Mamba2Spec():
            return "mamba"
        case MoeSpec():
            return "routed experts" if path[0] == "experts" else "shared experts, router"
        case _:
            return "mlp"


def _active(parameter: str, count: int, spec: DecoderSpec) -> int:
    match part_of(parameter, spec):
        case "routed experts":
            block = spec.blocks[int(parameter.split(".")[1])]
            assert isinstance(block, MoeSpec), "only such a block has experts"
            return count // block.num_experts * block.num_chosen
        case "embeddings":
            return count if spec.tied_embeddings else 0
        case "mtp":
            return 0
        case _:
            return count


def _stored_bytes(described: Described) -> Mapping[str, int]:
    return {match.name: sum(t.num_bytes for t in match.stored) for match in described.matches.matches}


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a model takes in one dtype: its weights once, recurrent states per sequence, keys and values per token."""

    dtype: str
    weight_bytes: int
    recurrent_bytes_per_sequence: int
    kv_bytes_per_token: int

    def sequence_bytes(self, context: int) -> int:
        """Return the bytes of one sequence's states when it has so many tokens."""
        return self.recurrent_bytes_per_sequence + context * self.kv_bytes_per_token

    def sequences_in(self, memory_bytes: int, context: int) -> int:
        """Return how many sequences of so many tokens a memory holds at once, beside the weights and what is reserved.

        -1 stands for weights that do not fit themselves.
        """
        left = memory_bytes - RESERVED_BYTES - self.weight_bytes
        return -1 if left < 0 else left // max(1, self.sequence_bytes(context))


def need_of(spec: DecoderSpec, dtype: torch.dtype) -> Need:
    """Return what a model takes in a dtype; some of its parameters stay float32 in any."""
    decoder: Decoder = build_decoder(spec, dtype=dtype)
    return Need(
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=sum(parameter.nbytes for parameter in decoder.parameters()),
        recurrent_bytes_per_sequence=recurrent_bytes_per_sequence(spec.blocks, dtype),
        kv_bytes_per_token=kv_bytes_per_token(spec.blocks, dtype),
    )


def need_as_stored(described: Described) -> Need | None:
    """Return what a model takes whose quantized weights stay as they are stored, None where it has none."""
    matches = described.matches.matches
    if not any(is_packable(match) and is_quantized(match) for match in matches):
        return None
    need = need_of(described.spec, torch.float32)
    saved = sum(match.parameter.nbytes - packed_size(match) for match in matches if is_packable(match))
    return replace(need, dtype="as stored", weight_bytes=need.weight_bytes - saved)


def contexts_up_to(max_positions: int) -> list[int]:
    """Return the contexts to plan for: 2K, doubled while that is less than the model's own, and that."""
    contexts = []
    context = FIRST_CONTEXT
    while context < max_positions:
        contexts.append(context)
        context *= 2
    return [*contexts, max_positions]
