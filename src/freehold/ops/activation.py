"""What stands between the two products of an MLP: gated SiLU, squared ReLU.

Belongs here: the references, the choice of kernel, the gradient. Not here: the products (linear.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, silu

from freehold.ops.gradient import wants_gradient
from freehold.ops.native import is_native, keeps_rows_apart, kernels


def gated_silu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up. Mutates: gate_TF, where no gradient is wanted.

    Paper: Shazeer, 2020, arXiv 2002.05202, section 2 (SwiGLU).
    """
    if _is_native(up_TF):
        return _activated(gate_TF, up_TF)
    if wants_gradient(gate_TF, up_TF):
        return silu(gate_TF) * up_TF
    for rows_F in gate_TF if keeps_rows_apart(gate_TF) else (gate_TF,):
        silu(rows_F, inplace=True)  # fresh memory costs more than the arithmetic
    return gate_TF.mul_(up_TF)


def squared_relu(up_TF: Tensor) -> Tensor:
    """Return relu(up) ** 2. Mutates: up_TF, where no gradient is wanted.

    Paper: So et al., 2021, arXiv 2109.08668, section 4.2.
    """
    if _is_native(up_TF):
        return _activated(None, up_TF)
    if wants_gradient(up_TF):
        return relu(up_TF).square()
    return up_TF.relu_().square_()


def _is_native(up_TF: Tensor) -> bool:
    return kernels() is not None and up_TF.dtype is torch.float32 and is_native(up_TF)


def _activated(gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
    out_TF: Tensor = _Activation.apply(gate_TF, up_TF)  # type: ignore[no-untyped-call]
    return out_TF


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
        form, out_TF = kernels(), torch.empty_like(up_TF)
        assert form is not None, "the caller has asked"
        ctx.save_for_backward(gate_TF, up_TF)
        form.activate(torch.get_num_threads(), _address(gate_TF), up_TF.data_ptr(), up_TF.numel(), out_TF.data_ptr())
        return out_TF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_TF, up_TF = ctx.saved_tensors
        form, gradient_TF = kernels(), gradients[0].contiguous()
        assert form is not None, "the forward ran on it"
        gate, up = None if gate_TF is None else torch.empty_like(gate_TF), torch.empty_like(up_TF)
        form.activation_gradient(
            torch.get_num_threads(),
            _address(gate_TF),
            up_TF.data_ptr(),
            up_TF.numel(),
            gradient_TF.data_ptr(),
            _address(gate),
            up.data_ptr(),
        )
        return gate, up


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
