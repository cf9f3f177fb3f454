"""Products with weights that live in the model, and rows of the embedding table."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from freehold.ops.gradient import wants_gradient
from freehold.ops.native import is_native, kernels
from freehold.ops.weight import Adapted, Packed, Weight, dense, matrix_of


def linear_reference(
    hidden_TD: Tensor, weight: Weight, bias_F: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return `hidden @ weight.T + bias` in `dtype`, by default that of `hidden_TD`.

    Shapes: [T, D] by [F, D] gives [T, F].
    """
    dtype = dtype or hidden_TD.dtype
    bias_F = None if bias_F is None else bias_F.to(dtype)
    return functional.linear(hidden_TD.to(dtype), dense(weight, dtype), bias_F)


def linear(hidden_TD: Tensor, weight: Weight, bias_F: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return `linear_reference` of the same arguments, by the native kernel where it applies.

    Precision: float weights meet float32 rows, with sums in blocks of 256 columns; quantized ones meet rows quantized
        to int8 in groups of 32, with exact integer sums per group. Either way an output's order of summation depends on
        D alone. The gradient's products are torch's, in float32, whatever the dtypes.
    """
    dtype = dtype or hidden_TD.dtype
    if isinstance(weight, Adapted):
        return _linear_adapted(hidden_TD, weight, bias_F, dtype)
    hidden_TD = hidden_TD.contiguous()
    if kernels() is None or not is_native(hidden_TD) or matrix_of(weight) is None:
        return linear_reference(hidden_TD, weight, bias_F, dtype)
    if wants_gradient(hidden_TD, weight, bias_F):
        out_TF: Tensor = _Linear.apply(hidden_TD, weight, bias_F, dtype)  # type: ignore[no-untyped-call]
        return out_TF
    return _linear_native(hidden_TD, weight, bias_F, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight: Weight, bias_F: Tensor | None, dtype: torch.dtype) -> Tensor:
        is_packed = isinstance(weight, Packed)
        ctx.packed, ctx.bias_dtype = weight if is_packed else None, None if bias_F is None else bias_F.dtype
        ctx.save_for_backward(hidden_TD, None if is_packed else weight)
        return _linear_native(hidden_TD, weight, bias_F, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TF,), (hidden_TD, weight) = gradients, ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        gradient_TF = gradient_TF.float()
        hidden = weight_gradient = bias = None
        if wants_hidden:
            wide = dense(weight if ctx.packed is None else ctx.packed, torch.float32)
            hidden = (gradient_TF @ wide).to(hidden_TD.dtype)
        if wants_weight:
            weight_gradient = (gradient_TF.T @ hidden_TD.float()).to(weight.dtype)
        if wants_bias:
            bias = gradient_TF.sum(dim=0).to(ctx.bias_dtype)
        return hidden, weight_gradient, bias, None


def _linear_adapted(hidden_TD: Tensor, weight: Adapted, bias_F: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The adapter's products are in its own dtype, their sum with the base's in the wider one, rounded once."""
    base_TF = linear(hidden_TD, weight.base, bias_F, dtype)
    low_TR = linear(hidden_TD.to(weight.a.dtype), weight.a) * weight.scale
    added_TF = linear(low_TR, weight.b)
    if added_TF.dtype is base_TF.dtype:
        return base_TF.add_(added_TF)
    return (base_TF + added_TF).to(base_TF.dtype)


def _linear_native(hidden_TD: Tensor, weight: Weight, bias_F: Tensor | None, dtype: torch.dtype) -> Tensor:
    out_TF = hidden_TD.new_empty(len(hidden_TD), weight.shape[-2], dtype=dtype)
    write_product(hidden_TD, weight, out_TF, bias_F)
    return out_TF


def write_product(hidden_TD: Tensor, weight: Weight, out_TF: Tensor, bias_F: Tensor | None = None) -> None:
    """Write `linear` of tensors that the kernels can take, without a gradient. Mutates: out_TF."""
    form, (num_tokens, width) = kernels(), hidden_TD.shape
    assert form is not None, "the caller has asked"
    assert weight.shape[-1] == width, f"a weight of {tuple(weight.shape)} for rows of {width}"
    form.linear(
        torch.get_num_threads(),
        out_TF.data_ptr(),
        out_TF.dtype is torch.bfloat16,
        hidden_TD.data_ptr(),
        hidden_TD.dtype is torch.bfloat16,
        num_tokens,
        matrix_of(weight),
        0 if bias_F is None else bias_F.data_ptr(),
        bias_F is not None and bias_F.dtype is torch.bfloat16,
    )


def embed(tokens_T: Tensor, weight: Weight) -> Tensor:
    """Return the rows of an embedding table [V, D] that belong to tokens: [T, D]; float32 where it is packed."""
    assert not isinstance(weight, Adapted), "tables have no adapters"
    return weight.rows(tokens_T) if isinstance(weight, Packed) else functional.embedding(tokens_T, weight)
