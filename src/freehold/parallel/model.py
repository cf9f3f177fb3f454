"""A decoder divided over the processes of a run: applied from outside, after it is built.

    divided = divide_model(decoder, processes)     this process keeps its parts, and knows the way to the others
    divided.whole(name, gradient)                  a parameter, or a gradient, of the decoder that was
    divided.gradients(decoder)                     what becomes of gradients: summed over whom, their norm

Along `tensor` a gradient is whole where its parameter is, or that of the part that is there: nothing has to be summed.
Along `data`, `expert` and `context` processes see other tokens, and sum what these say of parameters that they share.

A divided block runs op by op. Sums over processes have another order than those of one process: results are equal
within rounding, not bit for bit, and the same bits for the same division.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from freehold.errors import UnsupportedModel
from freehold.models.block import Block
from freehold.models.decoder import Decoder
from freehold.models.moe import Moe
from freehold.parallel.context import divide_context
from freehold.parallel.cuts import Cut
from freehold.parallel.data import Gradients, whole_decoder
from freehold.parallel.expert import divide_experts
from freehold.parallel.processes import ALONE, Dimension, Processes
from freehold.parallel.tensor import divide_mixer
from freehold.parallel.vocabulary import divide_vocabulary


@dataclass(frozen=True, kw_only=True)
class Divided:
    """Which part of each parameter a process has; cuts: by name, in the order in which they were made."""

    processes: Processes = ALONE
    cuts: Mapping[str, Mapping[Dimension, Cut]] = field(default_factory=dict)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's part of a parameter, or of anything of its shape."""
        for dimension, cut in self.cuts.get(name, {}).items():
            index, count = self.processes.index(dimension), self.processes.size(dimension)
            whole = cut.part(whole, index=index, count=count)
        return whole

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return what all processes' parts are parts of, in all of them."""
        for dimension, cut in reversed(list(self.cuts.get(name, {}).items())):
            parts = [torch.empty_like(part) for _ in range(self.processes.size(dimension))]
            dist.all_gather(parts, part.contiguous(), group=self.processes.group(dimension))
            part = cut.whole(parts)
        return part

    def whole_decoder(self, decoder: Decoder) -> Decoder | None:
        """Return the decoder that was divided, on the CPU, in the first process; None in the others, which call too."""
        return whole_decoder(decoder, self.processes, join=self.whole if self.cuts else None)

    def gradients(self, decoder: Decoder, *, copies: int = 1) -> Gradients:
        """Return what becomes of the gradients of a decoder that was divided, and may have been sharded after that."""
        of_data = Gradients.of(decoder, self.processes, copies=copies)
        names = {**of_data.divided, **self.cuts}
        divided = {name: (*of_data.divided.get(name, ()), *self.cuts.get(name, ())) for name in names}
        return replace(of_data, divided=divided)


WHOLE = Divided()


def divide_model(decoder: Decoder, processes: Processes) -> Divided:
    """Leave a decoder what this process has of it, and have it ask others for the rest.

    Mutates: decoder, which is of no use where this fails.
    Raises: BadInput where heads, groups, channels, experts or the vocabulary do not divide evenly; UnsupportedModel for
        weights that are quantized or have adapters.
    """
    cuts: dict[str, dict[Dimension, Cut]] = {}

    def note(prefix: str, dimension: Dimension, found: Mapping[str, Cut]) -> None:
        for name, cut in found.items():
            cuts.setdefault(prefix + name, {})[dimension] = cut

    has = {dimension: processes.size(dimension) > 1 for dimension in ("expert", "context", "tensor")}
    if (has["tensor"] or has["expert"]) and (decoder.has_adapter or decoder.packed_weights()):
        raise UnsupportedModel(
            "weights that are quantized, or have adapters, cannot be divided over processes",
            hint="merge or dequantize them first (`freehold merge`, `freehold convert`), or divide `context` alone",
        )
    if has["tensor"]:
        note("", "tensor", divide_vocabulary(decoder, processes.group("tensor")))
    for path, block in _blocks(decoder):
        where, has_experts = f"`{path}`", has["expert"] and isinstance(block.mixer, Moe)
        if has_experts:
            note(f"{path}.mixer.", "expert", divide_experts(block, processes.group("expert"), where=where))
        if has["tensor"]:
            note(f"{path}.mixer.", "tensor", divide_mixer(block, processes.group("tensor"), where=where))
        if has["context"]:
            divide_context(block)
        block.is_divided = has_experts or has["tensor"] or has["context"]
    return Divided(processes=processes, cuts=cuts)


def _blocks(decoder: Decoder) -> Iterator[tuple[str, Block]]:
    """Yield all blocks by their paths, those of MTP too."""
    for path, blocks in (("blocks", decoder.blocks), ("mtp.blocks", decoder.mtp.blocks if decoder.mtp else ())):
        for index, block in enumerate(blocks):
            yield f"{path}.{index}", cast(Block, block)
