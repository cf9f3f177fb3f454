"""What processes tell each other within a forward pass, each with the gradient that belongs to it.

    shared      forward: nothing, all have the same    backward: the sum of all gradients
    summed      forward: the sum over all              backward: nothing, all have the same
    exchanged   forward: rows to whom they belong      backward: their gradients, the way back

Every process of a group has to come to each call, and comes to its backward, also with no rows at all: a result without
rows still hangs on what it was made of.
Paper: Shoeybi et al., 2019, arXiv 1909.08053, section 3, where the first two are f and g.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def shared(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return what all processes of a group have alike, for uses that differ: gradients of all uses are summed."""
    out: Tensor = _Shared.apply(values, group)  # type: ignore[no-untyped-call]
    return out


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over a group, for a use that is the same in all of its processes."""
    out: Tensor = _Summed.apply(values, group)  # type: ignore[no-untyped-call]
    return out


def exchanged(rows: Tensor, *, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows that were sent to this process, in the order of those that sent them.

    sent, received: how many of the rows go to each process of the group, in their order, and how many come from each.
    """
    out: Tensor = _Exchanged.apply(rows, tuple(sent), tuple(received), group)  # type: ignore[no-untyped-call]
    return out


def total(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of tensors without a gradient over a group."""
    out = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return total(gradients[0], ctx.group), None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        return total(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Exchanged(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    assert len(rows) == sum(sent), f"{len(rows)} rows, of which {sent} are sent"
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out
