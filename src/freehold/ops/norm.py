"""RMSNorm, plain and gated per group.

Belongs here: the references and the choice of kernel. Not here: modules and parameters.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as rms_norm_of_torch
from torch.nn.functional import silu

from freehold.ops.gradient import wants_gradient
from freehold.ops.native import extension, is_native, kernels

NormOrder = Literal["cast_then_multiply", "multiply_then_cast"]


def rms_norm_reference(hidden_TD: Tensor, weight_D: Tensor, *, eps: float, order: NormOrder) -> Tensor:
    """Return each row over its root mean square, times the weight, in the dtype of `hidden_TD`.

        out = hidden / sqrt(mean(hidden²) + eps) * weight

    Shapes: [T, D].
    Precision: float32 up to the cast. Llama and Qwen cast first and multiply in the model's dtype; Nemotron multiplies
        in float32 and then casts. The difference is one rounding, and checkpoints were trained with theirs.
    Paper: Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4.
    """
    wide_TD = hidden_TD.float()
    unit_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(dim=-1, keepdim=True) + eps)
    if order == "cast_then_multiply":
        unit_TD = unit_TD.to(hidden_TD.dtype)
    return (unit_TD * weight_D.float()).to(hidden_TD.dtype)


def rms_norm(hidden_TD: Tensor, weight_D: Tensor, *, eps: float, order: NormOrder) -> Tensor:
    """Return `rms_norm_reference` of the same arguments, by the native kernel where it applies, by torch's on a GPU.

    The kernel takes contiguous float32 and bfloat16 on the CPU. Its rows have a fixed order of summation: the bits of a
    row depend on nothing else. In the gradient the roundings count for nothing.
    """
    if hidden_TD.is_cuda and hidden_TD.dtype is weight_D.dtype:
        return rms_norm_fused(hidden_TD, weight_D, eps=eps, order=order)
    if kernels() is None or not is_native(hidden_TD) or not is_native(weight_D):
        return rms_norm_reference(hidden_TD, weight_D, eps=eps, order=order)
    if wants_gradient(hidden_TD, weight_D):
        out_TD: Tensor = _RmsNorm.apply(hidden_TD, weight_D, eps, order)  # type: ignore[no-untyped-call]
        return out_TD
    return _rms_norm_native(hidden_TD, weight_D, eps=eps, order=order)


def rms_norm_fused(hidden_TD: Tensor, weight_D: Tensor, *, eps: float, order: NormOrder) -> Tensor:
    """Return `rms_norm_reference` of the same arguments by torch's own kernel: on a GPU one pass over memory."""
    if order == "multiply_then_cast":
        return rms_norm_of_torch(hidden_TD, weight_D.shape, weight_D, eps)
    return rms_norm_of_torch(hidden_TD, weight_D.shape, None, eps) * weight_D


def _rms_norm_native(hidden_TD: Tensor, weight_D: Tensor, *, eps: float, order: NormOrder) -> Tensor:
    form, (num_tokens, width) = kernels(), hidden_TD.shape
    assert form is not None, "the caller has asked"
    assert weight_D.shape == (width,), f"a weight of {tuple(weight_D.shape)} for rows of {width}"
    out_TD = torch.empty_like(hidden_TD)
    form.rms_norm(
        torch.get_num_threads(),
        out_TD.data_ptr(),
        hidden_TD.data_ptr(),
        hidden_TD.dtype is torch.bfloat16,
        num_tokens,
        width,
        native_norm(weight_D, eps=eps, order=order),
    )
    return out_TD


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_D: Tensor, eps: float, order: NormOrder) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_D)
        ctx.eps, ctx.order = eps, order
        return _rms_norm_native(hidden_TD, weight_D, eps=eps, order=order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TD,), (hidden_TD, weight_D) = gradients, ctx.saved_tensors
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        form, gradient_TD = kernels(), gradient_TD.float().contiguous()
        assert form is not None, "the forward ran on it"
        hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        weight = torch.empty_like(weight_D, dtype=torch.float32) if wants_weight else None
        form.norm_gradient(
            torch.get_num_threads(),
            hidden_TD.data_ptr(),
            hidden_TD.dtype is torch.bfloat16,
            *hidden_TD.shape,
            native_norm(weight_D, eps=ctx.eps, order=ctx.order),
            gradient_TD.data_ptr(),
            0 if hidden is None else hidden.data_ptr(),
            0 if weight is None else weight.data_ptr(),
        )
        return hidden, None if weight is None else weight.to(weight_D.dtype), None, None


def native_norm(weight_D: Tensor, *, eps: float, order: NormOrder) -> Any:
    """Return a norm as kernels take it; its weight must outlive it."""
    is_bfloat16 = weight_D.dtype is torch.bfloat16
    return extension().Norm(weight_D.data_ptr(), is_bfloat16, eps, order == "cast_then_multiply")


def gated_group_rms_norm(value_TI: Tensor, gate_TI: Tensor, weight_I: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """Return the gated RMSNorm of Mamba-2 in the dtype of `gate_TI`: the gate first, then each group on its own.

        gated = value * silu(gate);  out = gated / sqrt(mean over its group(gated²) + eps) * weight

    Shapes: I is the inner width, all heads side by side; U = I / num_groups is the width of one group.
    Precision: float32 up to the last cast; `value_TI` is usually float32 already, as the scan leaves it.
    Paper: Dao and Gu, 2024, arXiv 2405.21060, section 7.
    """
    gated_TI = value_TI.float() * silu(gate_TI.float())
    gated_TGU = gated_TI.view(len(gated_TI), num_groups, -1)
    unit_TGU = gated_TGU * torch.rsqrt(gated_TGU.square().mean(dim=-1, keepdim=True) + eps)
    return (unit_TGU.flatten(-2) * weight_I.float()).to(gate_TI.dtype)
