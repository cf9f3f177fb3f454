"""What one process of a run takes, before it begins: memory line by line, and operations; what cannot fit is refused.

Counted from a spec and from settings. Estimates are those of activations and of what FSDP2 gathers;
tests/recipes/test_plan.py holds them to what processes took.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul

import torch
from torch import Tensor

from freehold.adapt.lora import adapted
from freehold.checkpoint.dtypes import parse_dtype
from freehold.engine.machine import memory_of
from freehold.engine.plan import count_parts, inner_width
from freehold.errors import BadInput
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.spec import AttentionSpec, BlockSpec, DecoderSpec, Mamba2Spec, MlpSpec, MoeSpec
from freehold.ops.loss import CHUNK_BYTES, GPU_CHUNK_BYTES
from freehold.ops.native import kernels
from freehold.ops.ssm import CHUNK_LENGTH
from freehold.ops.weight import Adapted
from freehold.parallel.data import BUCKET_BYTES
from freehold.parallel.model import divide_model
from freehold.parallel.processes import TOKENS, Imagined, Processes
from freehold.recipes.settings import TrainSettings
from freehold.train.balance import all_blocks
from freehold.train.optim import matrix_names, train_all

# The interpreter with torch and what it has of files.
PROGRAM_BYTES = 500 << 20
# What the backward of a block works on of each value that a token has within it, where the kernels compute it.
COPIES_IN_BACKWARD = 3
# The same where torch records the references, and what a block keeps of each value until then: not measured.
COPIES_RECORDED_IN_BACKWARD = 6
COPIES_RECORDED = 3
# Copies of a chunk of logits that live at once.
LOGITS_COPIES = 3
# Muon's: all matrices of one shape ahead of their momentum, stacked, and before and after an iteration.
MUON_COPIES = 4
# How often FSDP2 holds weights at one time: those of embeddings and head, with their gradients; those of a block, with
# the next one's on their way, and gradients on theirs.
ENDS_GATHERED = 3
BLOCKS_GATHERED = 4
# A save in parts: the copy that steps leave alone, and its bytes twice.
COPIES_SAVED = 3
# The lines of what a run is when it is saved.
SAVED: tuple[str, ...] = ("weights", "masters", "moments")
# Of what steps work on: memory that is free again, and that the allocator (glibc's) keeps in pieces that do not fit.
SHARE_HELD_BACK = 1.25
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """One kind of memory that a process takes, and why it is as much."""

    name: str
    num_bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a process of a run takes of memory at its peak, line by line, and the operations that a token is worth.

    num_processes: of the run; the lines are of the first, which holds as much as any other or more.
    operations_per_token: six for each weight that a token meets, as is usual; attention, MTP and what is computed anew
    do not count.
    """

    lines: tuple[MemoryLine, ...]
    num_processes: int
    operations_per_token: float

    @property
    def total_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines)


def plan_of(spec: DecoderSpec, settings: TrainSettings, num_processes: int | None = None) -> RunPlan:
    """Return what a run takes that trains every weight of a model. num_processes: see `run_plan`."""
    decoder = build_decoder(spec, dtype=parse_dtype(settings.dtype))
    train_all(decoder)
    return run_plan(decoder, settings, base_bytes=0, num_processes=num_processes)


def run_plan(
    decoder: Decoder,
    settings: TrainSettings,
    *,
    base_bytes: int,
    base_is_float32: bool = True,
    num_processes: int | None = None,
) -> RunPlan:
    """Return what a run takes that trains what asks for a gradient in a decoder on the meta device.

    base_bytes: of frozen weights as they are held. base_is_float32: whether all of these are plain float32; others
    become that one at a time. num_processes: None for the least that `parallel` can do with.
    Mutates: decoder, of which the first process's part is left.
    Raises: BadInput, UnsupportedModel where so many cannot share it.
    """
    count = num_processes or settings.parallel.least_processes
    processes = Imagined(count=count, shape=settings.parallel.sizes.mesh_shape(count))
    whole = _sizes(_state_lines(decoder, settings))
    is_divided = bool(divide_model(decoder, processes).cuts)
    num_parts = _count_parts(settings, processes)
    state = _state_lines(decoder, settings, num_parts)
    saved_bytes = sum(_sizes(state)[name] for name in SAVED)
    lines = [
        *state,
        *_activation_lines(decoder, settings, processes, base_is_float32=base_is_float32),
        _loss_line(decoder, settings, processes, base_is_float32=base_is_float32),
        *_part_lines(decoder, processes, num_parts, saved_bytes),
    ]
    if is_divided or num_parts > 1:
        lines.append(_whole_line(_sizes(lines), whole, is_divided=is_divided))
    program = MemoryLine(name="program", num_bytes=PROGRAM_BYTES, why="the interpreter with torch")
    base = MemoryLine(name="base", num_bytes=base_bytes, why="frozen weights as they are held")
    return RunPlan(
        lines=tuple(line for line in (program, base, *lines) if line.num_bytes),
        num_processes=count,
        operations_per_token=6.0 * sum(part.num_active for part in count_parts(decoder.spec)),
    )


def check_run(plan: RunPlan, device: torch.device, processes: Processes) -> None:
    """Refuse a run whose processes on this machine cannot fit, before any of them loads a weight. Raises: BadInput."""
    num_here = processes.num_here if device.type == "cpu" else 1
    check_memory(plan, memory_of(device).available_bytes // num_here)
    processes.any(False)  # what one loads would not be free for the next to look


def check_memory(plan: RunPlan, free_bytes: int) -> None:
    """Refuse a run that cannot fit. free_bytes: for each process. Raises: BadInput."""
    wanted = plan.total_bytes - PROGRAM_BYTES  # which this process has already
    if wanted > free_bytes:
        largest = sorted(plan.lines[1:], key=lambda line: -line.num_bytes)[:4]
        parts = ", ".join(f"{line.name} {line.num_bytes / 1e9:.1f}" for line in largest)
        raise BadInput(
            f"{_subject(plan)} takes {wanted / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} are free ({parts})",
            hint="`freehold plan` shows all of it; fewer budget_tokens, a smaller model or bfloat16 take less",
        )


def _subject(plan: RunPlan) -> str:
    return "the run" if plan.num_processes == 1 else f"each of {plan.num_processes} processes"


def _count_parts(settings: TrainSettings, processes: Imagined) -> int:
    """Return over how many processes each weight is sharded. Raises: BadInput."""
    copies, num_data = settings.parallel.copies, processes.size("data")
    if settings.parallel.weights == "replicate" or processes.count == 1:
        return 1
    if num_data % copies:
        raise BadInput(f"{num_data} processes cannot hold {copies} copies of a model, in parts of the same size")
    return num_data // copies


def _state_lines(decoder: Decoder, settings: TrainSettings, num_parts: int = 1) -> list[MemoryLine]:
    """Return the lines of what is trained, and of what moves it."""
    trained = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    held = {name: _num_held(parameter, decoder, num_parts) for name, parameter in trained.items()}
    by_muon = matrix_names(decoder) if settings.optimizer.matrices == "muon" else frozenset()
    num_held, matrices = sum(held.values()), [p for name, p in trained.items() if name in by_muon]
    return [
        MemoryLine(
            name="weights",
            num_bytes=sum(count * trained[name].itemsize for name, count in held.items()),
            why=f"{num_held:,} that are trained",
        ),
        MemoryLine(
            name="masters",
            num_bytes=FLOAT32_BYTES * sum(n for name, n in held.items() if trained[name].dtype is not torch.float32),
            why="float32 of what is bfloat16",
        ),
        MemoryLine(name="gradients", num_bytes=FLOAT32_BYTES * num_held, why="float32"),
        MemoryLine(
            name="moments",
            num_bytes=FLOAT32_BYTES * (2 * num_held - sum(matrix.numel() for matrix in matrices)),
            why=f"of {settings.optimizer.matrices}, float32",
        ),
        MemoryLine(name="muon", num_bytes=_muon_bytes(matrices), why="all matrices of one shape, while they move"),
    ]


def _sizes(lines: Iterable[MemoryLine]) -> dict[str, int]:
    return {line.name: line.num_bytes for line in lines}


def _num_held(parameter: Tensor, decoder: Decoder, num_parts: int) -> int:
    """Return how many values of a parameter a process has, as `parallel.data.shard` divides it: by rows."""
    if num_parts == 1 or parameter.dtype is not decoder.dtype:
        return parameter.numel()
    return -(-len(parameter) // num_parts) * parameter[0].numel()


def _muon_bytes(matrices: Sequence[Tensor]) -> int:
    """Return what Muon works on where there are most matrices of one shape, products of each with itself included."""
    alike = Counter[tuple[int, ...]]()
    for matrix in matrices:
        alike[tuple(matrix.shape[-2:])] += matrix.numel()
    return FLOAT32_BYTES * max(
        (MUON_COPIES * count + 2 * count * min(shape) // max(shape) for shape, count in alike.items()), default=0
    )


def _activation_lines(
    decoder: Decoder, settings: TrainSettings, processes: Imagined, *, base_is_float32: bool
) -> list[MemoryLine]:
    """Return what blocks keep from forward to backward, and what the backward of one works on."""
    spec, num_tensor = decoder.spec, processes.size("tensor")
    blocks = [*spec.blocks, *(spec.mtp.blocks if spec.mtp else ())]
    passes = [1] * len(spec.blocks) + [settings.objective.mtp_depths] * (len(blocks) - len(spec.blocks))
    num_tokens = -(-settings.data.budget_tokens // processes.size("context"))
    width, is_anew = decoder.spec.width, settings.recompute
    is_native = settings.device == "cpu" and kernels() is not None and processes.size("context") == 1
    adapters = _adapters_of(decoder)
    inputs = (sum(passes) + 2) * num_tokens * width * parse_dtype(settings.dtype).itemsize
    per_token = [
        2 * width
        + (_values_kept(block, width) if is_native else _values_recorded(block, width)) // num_tensor
        + _values_kept_adapted(block, adapters.get(index, []), decoder)
        for index, block in enumerate(blocks)
    ]
    inner = max(2 * width + inner_width(block, width) // num_tensor for block in blocks)
    again = _matrix_bytes(decoder, base_is_float32=base_is_float32)
    computed = FLOAT32_BYTES * num_tokens * sum(map(mul, passes, per_token))
    kept = inputs + (0 if is_anew else computed)
    copies = COPIES_IN_BACKWARD if is_native else COPIES_RECORDED_IN_BACKWARD
    working = FLOAT32_BYTES * num_tokens * copies * inner + again
    one_block = is_anew * FLOAT32_BYTES * num_tokens * max(per_token)
    # What adapters add is gone at once, block after block: pieces of all that is computed stay, anew or not. Measured.
    held_back = inputs + computed + working if adapters else kept + working + one_block
    why = "what enters each block; the rest is computed anew" if is_anew else "all that blocks compute"
    return [
        MemoryLine(name="activations", num_bytes=kept, why=f"{why}, {num_tokens:,} tokens"),
        MemoryLine(
            name="backward", num_bytes=working + one_block, why="of the widest block, and a matrix or its gradient"
        ),
        MemoryLine(
            name="allocator",
            num_bytes=int(SHARE_HELD_BACK * held_back) if settings.device == "cpu" else 0,
            why="free again, and kept in pieces that do not fit",
        ),
    ]


def _adapters_of(decoder: Decoder) -> dict[int, list[Adapted]]:
    """Return the adapted weights of each block that has any, by its number."""
    found: dict[int, list[Adapted]] = {}
    for name, weight in adapted(decoder):
        found.setdefault(int(name.split(".")[1]), []).append(weight)
    return found


def _matrix_bytes(decoder: Decoder, *, base_is_float32: bool) -> int:
    """Return what a backward makes of one module's matrices: gradients to add, or float32 values of a frozen matrix."""
    trained = (sum(p.nbytes for p in m.parameters(recurse=False) if p.requires_grad) for m in decoder.modules())
    bases = (weight.shape[-2] * weight.shape[-1] for _, weight in adapted(decoder))
    frozen = (p.numel() for block in all_blocks(decoder) for p in block.parameters() if not p.requires_grad)
    wide = 0 if base_is_float32 else FLOAT32_BYTES * max((*bases, *frozen), default=0)
    return max(trained) + wide


def _values_kept_adapted(block: BlockSpec, adapters: Sequence[Adapted], decoder: Decoder) -> int:
    """Return how many values of a token a block keeps for its adapters: their thin products, and the rows that they
    read where these are of another dtype. Adapted experts are mixed by the reference, which keeps each product.
    """
    width, kept = decoder.spec.width, 0
    for weight in adapters:
        reads_another = weight.a.dtype is not decoder.dtype and weight.shape[-1] == width
        kept += _times_met(block, weight) * (weight.a.shape[-2] + reads_another * width)
    if isinstance(block, MoeSpec) and any(len(weight.shape) == 3 for weight in adapters):
        kept += block.num_chosen * (block.width + 2 * (block.latent_width or width))
    return kept


def _times_met(block: BlockSpec, weight: Adapted) -> int:
    """Return how many matrices of a weight a token meets."""
    return block.num_chosen if isinstance(block, MoeSpec) and len(weight.shape) == 3 else 1


def _values_kept(block: BlockSpec, width: int) -> int:
    """Return how many values of a token a block keeps between its norm and its sum, where the kernels compute it."""
    match block:
        case AttentionSpec():
            return inner_width(block, width) + block.num_heads * (block.head_dim + 1)
        case Mamba2Spec():
            return inner_width(block, width) + block.conv_width + block.inner_width
        case MoeSpec():
            routed = block.num_chosen * block.width + 2 * (block.latent_width or width)
            return routed + 2 * block.shared_width + 4 * block.num_experts
        case MlpSpec():
            return (3 if block.activation == "silu_gated" else 2) * block.width


def _values_recorded(block: BlockSpec, width: int) -> int:
    """Return the same where torch records the references."""
    scanned = CHUNK_LENGTH * block.num_heads if isinstance(block, Mamba2Spec) else 0
    return COPIES_RECORDED * (2 * width + inner_width(block, width) + scanned)


def _loss_line(decoder: Decoder, settings: TrainSettings, processes: Imagined, *, base_is_float32: bool) -> MemoryLine:
    spec = decoder.spec
    depths = settings.objective.mtp_depths if spec.mtp else 0
    num_rows = spec.vocab_size // processes.size("tensor")
    chunk_bytes = CHUNK_BYTES if settings.device == "cpu" else GPU_CHUNK_BYTES
    logits = min(chunk_bytes, FLOAT32_BYTES * settings.data.budget_tokens * num_rows)
    is_trained = any(parameter.requires_grad for parameter in decoder.lm_head.parameters())
    copies = 2 + depths if is_trained else int(not base_is_float32)
    return MemoryLine(
        name="loss",
        num_bytes=LOGITS_COPIES * logits + copies * FLOAT32_BYTES * num_rows * spec.width,
        why="a chunk of logits, and the head's gradients or values",
    )


def _part_lines(decoder: Decoder, processes: Imagined, num_parts: int, saved_bytes: int) -> list[MemoryLine]:
    """Return what a process has of others, or for them, where several share a run."""
    if num_parts > 1:
        blocks = [sum(p.nbytes for p in block.parameters()) for block in all_blocks(decoder)]
        ends = sum(p.nbytes for p in decoder.parameters()) - sum(blocks)
        gathered = ENDS_GATHERED * ends + BLOCKS_GATHERED * max(blocks)
        return [
            MemoryLine(name="gathered", num_bytes=gathered, why="whole weights of a block at a time, and gradients"),
            MemoryLine(name="save", num_bytes=COPIES_SAVED * saved_bytes, why="written beside the steps that follow"),
        ]
    sizes = [FLOAT32_BYTES * p.numel() for p in decoder.parameters() if p.requires_grad]
    summed = min(sum(sizes), max(BUCKET_BYTES, *sizes)) if processes.size(*TOKENS) > 1 else 0
    return [MemoryLine(name="sums", num_bytes=summed, why="gradients on their way to other processes")]


def _whole_line(lines: Mapping[str, int], whole: Mapping[str, int], *, is_divided: bool) -> MemoryLine:
    """Return what the whole takes beyond these lines: at first the model, where it is divided also the run when it is
    saved. What a step works on is not there then, but for what the allocator keeps of it.
    """
    kept, why = SAVED[:1], "the whole model, before there are parts of it"
    if is_divided:
        kept, why = SAVED, "the whole run, when it is saved"
    free = sum(lines.values()) - sum(lines[name] for name in (*kept, "allocator"))
    return MemoryLine(name="whole", num_bytes=max(0, sum(whole[name] for name in kept) - free), why=why)
