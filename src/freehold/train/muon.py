"""Muon in float32, matrices of one shape at a time (Jordan, 2024; Liu et al., 2025, arXiv 2502.16982).

torch.optim.Muon orthogonalizes in bfloat16, matrix by matrix. Processors without bfloat16 instructions take a hundred
times as long for such a product, and a model with experts has hundreds of small matrices; so they are stacked here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of the polynomial that brings all singular values near one: steeper at zero than one that converges to it.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7
# The mean size of an entry of AdamW's steps, to which Muon's are scaled: one learning rate serves both (section 2.2).
ADAMW_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """Moves matrices [M, N] along orthogonalized Nesterov momentum, by steps of the size of AdamW's.

    State: `momentum_buffer`, as large as the matrix. Weight decay is AdamW's: apart from the gradient.
    """

    def __init__(self, matrices: Iterable[Tensor], *, weight_decay: float, momentum: float):
        super().__init__(matrices, {"lr": 1e-3, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure here
        """Move all matrices that have a gradient. Mutates: the matrices, the state."""
        assert closure is None, "a step is taken on gradients that are there"
        for group in self.param_groups:
            alike = defaultdict[tuple[int, ...], list[Tensor]](list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[tuple(matrix.shape)].append(matrix)
            for matrices in alike.values():
                self._move(matrices, group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]  # all have one: see `step`
        buffers = [self._momentum_of(matrix) for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        steps = orthogonalized(torch.stack(ahead)).unbind()
        size = group["lr"] * ADAMW_SIZE * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, steps, alpha=-size)

    def _momentum_of(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalized(matrices_SMN: Tensor) -> Tensor:
    """Return U @ V.T of each matrix U @ diag(s) @ V.T, roughly: its singular values are 0.7 to 1.2 or so.

    By Newton and Schulz's iteration with a polynomial of degree five (Jordan, 2024); float32.
    """
    is_tall = matrices_SMN.shape[-2] > matrices_SMN.shape[-1]
    wide = matrices_SMN.mT if is_tall else matrices_SMN
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if is_tall else wide
