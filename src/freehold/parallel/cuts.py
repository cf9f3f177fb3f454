"""Which part of a parameter a process has, and how parts become the whole again.

    a parameter of three segments   z z z z | x x x x | dt dt
    process 0 of two                z z | x x | dt
    process 1                       z z | x x | dt

Belongs here: the arithmetic of parts, and a module's parameters replaced by them. Not here: which parameters are cut
where.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from freehold.ops.weight import Weight


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One axis of a tensor, each segment of which is divided evenly. segments: their lengths in the whole."""

    axis: int
    segments: tuple[int, ...]

    def part(self, whole: Tensor, *, index: int, count: int) -> Tensor:
        """Return the part of process `index` of `count`, a tensor of its own."""
        segments = whole.split(self.segments, dim=self.axis)
        pieces = [segment.chunk(count, dim=self.axis)[index] for segment in segments]
        return torch.cat(pieces, dim=self.axis).contiguous()

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what `part` made these of, for each process in their order."""
        lengths = [length // len(parts) for length in self.segments]
        pieces = [part.split(lengths, dim=self.axis) for part in parts]
        segments = [torch.cat(piece, dim=self.axis) for piece in zip(*pieces, strict=True)]
        return torch.cat(segments, dim=self.axis)


def plain(weight: Weight) -> Tensor:
    """Return a weight that is a tensor, as all that are divided are."""
    assert isinstance(weight, Tensor), "a model with others is refused"
    return weight


def cut_parameter(module: nn.Module, name: str, cut: Cut, *, index: int, count: int) -> None:
    """Have a module keep only a part of one of its parameters. Mutates: module."""
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    whole = plain(getattr(owner, last))
    part = nn.Parameter(cut.part(whole.detach(), index=index, count=count), requires_grad=whole.requires_grad)
    part.__dict__.update(whole.__dict__)  # what was noted on it: that it stays float32
    setattr(owner, last, part)
