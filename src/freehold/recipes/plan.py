"""What a run takes, before it begins: memory line by line, and operations; what cannot fit is refused.

Counted from a spec and from settings. Estimates are those of activations; tests/recipes/test_plan.py holds them to
what processes took. Not here: what memory a machine has (engine/machine.py).
"""

from dataclasses import dataclass

import torch

from freehold.checkpoint.dtypes import parse_dtype
from freehold.engine.plan import count_parts, inner_width
from freehold.errors import BadInput
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.spec import BlockSpec, DecoderSpec, Mamba2Spec
from freehold.ops.loss import CHUNK_BYTES
from freehold.ops.ssm import CHUNK_LENGTH
from freehold.recipes.settings import TrainSettings
from freehold.train.balance import all_blocks
from freehold.train.optim import matrix_names, train_all

# The interpreter with torch and what it has of files.
PROGRAM_BYTES = 500 << 20
# What a block keeps for its gradient of each value that a token has within it, and what backward adds to that.
COPIES_KEPT = 3
COPIES_IN_BACKWARD = 6
# Copies of a chunk of logits that live at once.
LOGITS_COPIES = 3
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """One kind of memory that a run takes, and why it is as much."""

    name: str
    num_bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run takes of memory at its peak, line by line, and the operations that a token is worth.

    operations_per_token: six for each weight that a token meets, as is usual; attention, MTP and what is computed anew
    do not count.
    """

    lines: tuple[MemoryLine, ...]
    operations_per_token: float

    @property
    def total_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines)


def plan_of(spec: DecoderSpec, settings: TrainSettings) -> RunPlan:
    """Return what a run takes that trains every weight of a model."""
    decoder = build_decoder(spec, dtype=parse_dtype(settings.dtype))
    train_all(decoder)
    return run_plan(decoder, settings, base_bytes=0)


def run_plan(decoder: Decoder, settings: TrainSettings, *, base_bytes: int) -> RunPlan:
    """Return what a run takes that trains what asks for a gradient in a decoder, which may be on the meta device.

    base_bytes: of frozen weights as they are held.
    """
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    rounded = sum(parameter.numel() for parameter in trained if parameter.dtype is not torch.float32)
    by_muon = matrix_names(decoder) if settings.optimizer.matrices == "muon" else frozenset()
    with_one = sum(p.numel() for name, p in decoder.named_parameters() if p.requires_grad and name in by_muon)
    lines = [
        MemoryLine(name="program", num_bytes=PROGRAM_BYTES, why="the interpreter with torch"),
        MemoryLine(name="base", num_bytes=base_bytes, why="frozen weights as they are held"),
        MemoryLine(name="weights", num_bytes=sum(p.nbytes for p in trained), why=f"{num_trained:,} that are trained"),
        MemoryLine(name="masters", num_bytes=FLOAT32_BYTES * rounded, why="float32 of what is bfloat16"),
        MemoryLine(name="gradients", num_bytes=FLOAT32_BYTES * num_trained, why="float32"),
        MemoryLine(
            name="moments",
            num_bytes=FLOAT32_BYTES * (2 * num_trained - with_one),
            why=f"of {settings.optimizer.matrices}, float32",
        ),
        *_activation_lines(decoder, settings),
        _loss_line(decoder, settings),
    ]
    return RunPlan(
        lines=tuple(line for line in lines if line.num_bytes),
        operations_per_token=6.0 * sum(part.num_active for part in count_parts(decoder.spec)),
    )


def check_memory(plan: RunPlan, free_bytes: int) -> None:
    """Refuse a run that cannot fit. Raises: BadInput."""
    wanted = plan.total_bytes - PROGRAM_BYTES  # which this process has already
    if wanted > free_bytes:
        largest = sorted(plan.lines[1:], key=lambda line: -line.num_bytes)[:4]
        parts = ", ".join(f"{line.name} {line.num_bytes / 1e9:.1f}" for line in largest)
        raise BadInput(
            f"the run takes {wanted / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} are free ({parts})",
            hint="`freehold plan` shows all of it; fewer budget_tokens, a smaller model or bfloat16 take less",
        )


def _activation_lines(decoder: Decoder, settings: TrainSettings) -> list[MemoryLine]:
    """Return what blocks keep from forward to backward, and what the backward of one works on."""
    blocks, num_tokens = [block.spec for block in all_blocks(decoder)], settings.data.budget_tokens
    width, dtype = decoder.spec.width, parse_dtype(settings.dtype)
    inputs = (len(blocks) + 2) * num_tokens * width * dtype.itemsize
    inner = [FLOAT32_BYTES * num_tokens * _values_per_token(block, width) for block in blocks]
    is_anew = settings.recompute
    kept = inputs if is_anew else inputs + COPIES_KEPT * sum(inner)
    working = (COPIES_KEPT * is_anew + COPIES_IN_BACKWARD) * max(inner)
    why = "what enters each block; the rest is computed anew" if is_anew else "all that blocks compute"
    return [
        MemoryLine(name="activations", num_bytes=kept, why=f"{why}, {num_tokens:,} tokens"),
        MemoryLine(name="backward", num_bytes=working, why="of the widest block"),
    ]


def _values_per_token(block: BlockSpec, width: int) -> int:
    """Return how many values a token has in a block, the norm and the sum around it included."""
    scanned = CHUNK_LENGTH * block.num_heads if isinstance(block, Mamba2Spec) else 0
    return 2 * width + inner_width(block, width) + scanned


def _loss_line(decoder: Decoder, settings: TrainSettings) -> MemoryLine:
    spec = decoder.spec
    depths = settings.objective.mtp_depths if spec.mtp else 0
    logits = min(CHUNK_BYTES, FLOAT32_BYTES * settings.data.budget_tokens * spec.vocab_size)
    head = FLOAT32_BYTES * spec.vocab_size * spec.width
    return MemoryLine(
        name="loss",
        num_bytes=LOGITS_COPIES * logits + (2 + depths) * head,
        why="a chunk of logits, and the head's gradients or values",
    )
