"""Native forward, reference backward: training sees the bits that serving computes.

Belongs here: the one autograd function that joins a kernel without a gradient to the torch reference that has one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def wants_gradient(*arguments: object) -> bool:
    """Return whether a gradient may be asked for with respect to any of the arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def with_reference_gradient(
    native: Callable[..., Tensor], reference: Callable[..., Tensor], *arguments: object
) -> Tensor:
    """Return `native(*arguments)`, with the gradient of `reference(*arguments)` where one is asked for."""
    out: Tensor = _NativeForward.apply(native, reference, *arguments)  # type: ignore[no-untyped-call]
    return out


class _NativeForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, native: Callable[..., Tensor], reference: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.reference = reference
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in arguments))
        return native(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A leaf stays itself: the reference of a module reaches its parameters by other ways than the arguments.
        arguments = [
            other if saved is None else saved if saved.is_leaf else saved.detach().requires_grad_()
            for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.reference(*arguments)
        wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, gradients, allow_unused=True))
        return None, None, *(next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in arguments)
