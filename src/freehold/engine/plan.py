"""What a model takes: its parameters by part, its states, and how many sequences a memory holds beside its weights.

Everything is counted from a spec and from headers; no weight is read. Not here: what memory a machine has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from freehold.checkpoint.load import Described
from freehold.checkpoint.pack import is_packable, is_quantized, packed_size
from freehold.engine.runner import SCORED_ROWS
from freehold.engine.scheduler import Limits
from freehold.errors import BadInput
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.layout import kv_bytes_per_token, recurrent_bytes_per_sequence
from freehold.models.spec import AttentionSpec, BlockSpec, DecoderSpec, Mamba2Spec, MoeSpec

# For the interpreter with torch (about 0.4 GB), and what a step of some hundred tokens works on.
RESERVED_BYTES = 1 << 30
# Of a server: the interpreter with its libraries, a tokenizer, and the requests that come and wait. tests/serve/
# test_memory.py holds real processes to it.
PROGRAM_BYTES = 600 << 20
# Bodies of requests that have not ended: this share of the memory, at least two of the largest, at most enough for any
# load. A server refuses what would exceed it.
BODIES_SHARE = 1 / 64
LEAST_BODIES_BYTES, MOST_BODIES_BYTES = 8 << 20, 256 << 20
# What a step makes of each value that is widest on its way: the value itself, its rounded form and its result; of each
# logit: the row, a copy with penalties, and what the draw sorts.
COPIES_IN_STEP = 3
FIRST_CONTEXT = 2048
# Of what a machine has free beside what a server must have: the rest is for whatever else runs there.
SHARE_FOR_STATES = 0.5
SERVED_PAGE_TOKENS = 64  # small, so that a short request takes little; the kernels' bits do not depend on it

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


def step_bytes(spec: DecoderSpec, *, num_sequences: int, budget_tokens: int) -> int:
    """Return what a step works on where the kernels run, at most: its tokens on their way through the widest block, and
    logits of all sequences and of a prompt that is scored."""
    widest = max(inner_width(block, spec.width) for block in spec.blocks)
    num_rows = num_sequences + SCORED_ROWS
    return 4 * COPIES_IN_STEP * (budget_tokens * (spec.width + widest) + num_rows * spec.vocab_size)


def inner_width(block: BlockSpec, width: int) -> int:
    """Return how many values a token has within a block."""
    match block:
        case AttentionSpec():
            return (block.num_heads + 2 * block.num_kv_heads) * block.head_dim
        case Mamba2Spec():
            return block.inner_width + block.conv_width + block.num_heads
        case MoeSpec():
            return block.num_chosen * (block.width + (block.latent_width or width)) + block.shared_width
        case _:
            return block.width


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What a server's process takes: weights, states, what a step works on, bodies of requests, and the program itself.

    notes: what was asked for and cannot be, each with the option that would change it.
    """

    limits: Limits
    kv_dtype: torch.dtype
    weight_bytes: int
    recurrent_bytes: int
    kv_bytes: int
    step_bytes: int
    bodies_bytes: int
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        states = self.recurrent_bytes + self.kv_bytes
        return self.weight_bytes + states + self.step_bytes + self.bodies_bytes + PROGRAM_BYTES


def serving_plan(
    spec: DecoderSpec,
    *,
    weight_bytes: int,
    dtype: torch.dtype,
    memory_bytes: int | None,
    free_bytes: int,
    num_sequences: int = 64,
    context: int | None = None,
    kv_dtype: torch.dtype | None = None,
    budget_tokens: int = 512,
) -> ServingPlan:
    """Return the plan for a memory: `num_sequences` at once, and pages for that many of `context` tokens if they fit.

    Recurrent states come first, for a sequence cannot do with less of them, and take at most half of what is left
    beside the weights; pages take the rest, for sequences share them.
    weight_bytes: what the loaded weights take. memory_bytes: for the whole process; None for all that must be, and
        SHARE_FOR_STATES of what the machine then has of `free_bytes`. context: None for the model's own. kv_dtype: of
        keys and values, None for `dtype`, which is the model's.
    Raises: BadInput where not even one page fits.
    """
    kv_dtype = kv_dtype or dtype
    working_bytes = step_bytes(spec, num_sequences=num_sequences, budget_tokens=budget_tokens)
    share_for_bodies = int(BODIES_SHARE * (free_bytes if memory_bytes is None else memory_bytes))
    bodies_bytes = min(max(share_for_bodies, LEAST_BODIES_BYTES), MOST_BODIES_BYTES)
    fixed_bytes = weight_bytes + working_bytes + bodies_bytes + PROGRAM_BYTES
    if memory_bytes is None:
        memory_bytes = fixed_bytes + int(SHARE_FOR_STATES * max(0, free_bytes - fixed_bytes))
    free = memory_bytes - fixed_bytes
    slot_bytes = recurrent_bytes_per_sequence(spec.blocks, dtype)
    num_slots = min(num_sequences, free // 2 // slot_bytes) if slot_bytes else num_sequences
    page_bytes = SERVED_PAGE_TOKENS * kv_bytes_per_token(spec.blocks, kv_dtype)
    context = min(context or spec.max_positions, spec.max_positions)
    wanted = num_sequences * -(-context // SERVED_PAGE_TOKENS)
    num_pages = min(wanted, (free - num_slots * slot_bytes) // page_bytes) if page_bytes else wanted
    if free < 0 or num_slots < 1 or num_pages < 1:
        raise BadInput(
            f"{memory_bytes / 1e9:.1f} GB of memory hold the weights ({weight_bytes / 1e9:.1f} GB) and "
            f"{(working_bytes + bodies_bytes + PROGRAM_BYTES) / 1e9:.1f} GB to work in, but no states beside them",
            hint="give it more with --memory, or take a smaller model",
        )
    longest = min(context, num_pages * SERVED_PAGE_TOKENS)
    limits = Limits(
        num_slots=num_slots,
        num_pages=num_pages,
        page_size=SERVED_PAGE_TOKENS,
        budget_tokens=budget_tokens,
        max_positions=longest,
    )
    return ServingPlan(
        limits=limits,
        kv_dtype=kv_dtype,
        weight_bytes=weight_bytes,
        recurrent_bytes=num_slots * slot_bytes,
        kv_bytes=num_pages * page_bytes,
        step_bytes=working_bytes,
        bodies_bytes=bodies_bytes,
        notes=tuple(_notes(limits, num_sequences=num_sequences, context=context)),
    )


def _notes(limits: Limits, *, num_sequences: int, context: int) -> Iterator[str]:
    """Yield what was asked for and cannot be, each with the option that would change it."""
    num_pages, longest = limits.num_pages, limits.max_positions
    if limits.num_slots < num_sequences:
        yield f"{limits.num_slots} sequences at once, not {num_sequences}, for their states: --memory"
    if longest < context:
        yield f"a context of {longest} tokens, not {context}, for keys and values: --memory, --kv-dtype int8"
    elif num_pages < num_sequences * -(-context // SERVED_PAGE_TOKENS):
        full = num_pages * SERVED_PAGE_TOKENS // context
        yield f"keys and values of {full} of {num_sequences} full contexts; those who wait, wait: --memory"
