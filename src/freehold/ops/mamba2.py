"""What lies between the projections of a Mamba-2 mixer, with a gradient: convolution, scan, gate and grouped norm.

Belongs here: the kernels' forward and backward as one op. Its parts, and what each means, are in conv.py, ssm.py and
norm.py; `mix_reference` puts them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freehold.ops.conv import causal_conv_anew
from freehold.ops.native import Batch, extension, is_native, kernels
from freehold.ops.norm import gated_group_rms_norm
from freehold.ops.pieces import whole
from freehold.ops.ssm import scan_anew, step_sizes

# What native/mamba2.h says of the sizes that kernels take.
LANES = 16
MAX_TAPS = 8


@dataclass(frozen=True, kw_only=True)
class Mamba2Sizes:
    """The sizes of a mixer, and its two numbers that are no weights."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    norm_eps: float
    step_limit: tuple[float, float]

    @property
    def inner_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        return self.inner_width + 2 * self.num_groups * self.state_size

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the columns of the input projection's output: gate; x, b and c; dt."""
        return self.inner_width, self.conv_width, self.num_heads


def mix_reference(
    projected: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor,
    norm_weight_I: Tensor,
    a_log_H: Tensor,
    d_H: Tensor,
    dt_bias_H: Tensor,
    *,
    sizes: Mamba2Sizes,
    starts: Sequence[int],
) -> Tensor:
    """Return what the output projection reads, [T, I], of sequences that all begin anew.

    Shapes: projected [T, I + C + H]: gate; x, b and c before the convolution; dt.
    starts: the first token of each sequence, and the end of the last.
    Precision: that of the parts, which lie in conv.py, ssm.py and norm.py.
    Paper: Dao and Gu, 2024, arXiv 2405.21060, section 7.
    """
    gate_TI, xbc_TC, dt_TH = projected.split(sizes.widths, dim=-1)
    whole_sequences = whole(tuple(starts), projected.device)
    positions_T = whole_sequences.places_T % whole_sequences.length
    shared = sizes.num_groups * sizes.state_size
    xbc_TC = causal_conv_anew(xbc_TC, conv_weight_CW, conv_bias_C, positions_T)
    x_TI, b_TN, c_TN = xbc_TC.split((sizes.inner_width, shared, shared), dim=-1)
    y_THP = scan_anew(
        x_TI.unflatten(-1, (sizes.num_heads, sizes.head_dim)),
        step_sizes(dt_TH, dt_bias_H, limit=sizes.step_limit),
        -torch.exp(a_log_H.float()),
        b_TN.unflatten(-1, (sizes.num_groups, sizes.state_size)),
        c_TN.unflatten(-1, (sizes.num_groups, sizes.state_size)),
        d_H,
        starts=starts,
    )
    y_TI = y_THP.flatten(1)
    return gated_group_rms_norm(y_TI, gate_TI, norm_weight_I, num_groups=sizes.num_groups, eps=sizes.norm_eps)


def can_take(weights: Sequence[Tensor], sizes: Mamba2Sizes) -> bool:
    """Return whether there are kernels, and they can take a mixer of these weights and sizes."""
    matrices, vectors = weights[:3], weights[3:]
    return (
        kernels() is not None
        and all(is_native(weight) for weight in weights)
        and len({weight.dtype for weight in matrices}) == 1
        and all(vector.dtype is torch.float32 for vector in vectors)
        and sizes.head_dim % LANES == 0
        and sizes.state_size % LANES == 0
        and sizes.conv_kernel <= MAX_TAPS
    )


def mix(
    projected: Tensor, *weights: Tensor, sizes: Mamba2Sizes, starts: Sequence[int], row_dtype: torch.dtype
) -> Tensor:
    """Return `mix_reference` of the same arguments by the kernels, forward and backward, in float32.

    The forward is the one that serving runs, bit for bit. The gradients of weights are summed over tokens in an order
    that does not depend on the number of threads.

    row_dtype: what rows are rounded to before the convolution, as a state of this dtype would keep them.
    Precision: float32 inside; each gradient is rounded once to the dtype of what it belongs to.
    """
    projected = projected.float().contiguous()
    out: Tensor = _Mix.apply(projected, sizes, tuple(starts), row_dtype, *weights)  # type: ignore[no-untyped-call]
    return out


def mix_on(
    projected: Tensor, *weights: Tensor, sizes: Mamba2Sizes, batch: Batch, conv_tail: Tensor, ssm: Tensor
) -> Tensor:
    """Return what `mix` does of sequences that go on from states, which are those of all slots; there is no gradient.

    Mutates: conv_tail, ssm.
    """
    _, out_TI = _mix_natively(projected.float().contiguous(), weights, sizes, batch, conv_tail, ssm)
    return out_TI


def _mix_natively(
    projected: Tensor, weights: Sequence[Tensor], sizes: Mamba2Sizes, batch: Batch, conv_tail: Tensor, ssm: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x, b and c as the scan leaves them, its output in place of x, and the output [T, I]. Mutates: states."""
    form, num_tokens = kernels(), len(projected)
    assert form is not None, "the caller has asked"
    mixed, out_TI = torch.empty(num_tokens * sizes.conv_width), torch.empty(num_tokens, sizes.inner_width)
    form.mamba2_inner(
        torch.get_num_threads(),
        native_mamba2(sizes, weights, row_dtype=conv_tail.dtype),
        batch.native,
        *(tensor.data_ptr() for tensor in (projected, conv_tail, ssm, mixed, out_TI)),
    )
    return mixed, out_TI


def native_mamba2(sizes: Mamba2Sizes, weights: Sequence[Tensor], *, row_dtype: torch.dtype) -> Any:
    """Return a mixer's inside as kernels take it; its weights must outlive it."""
    conv_weight, conv_bias, norm_weight, *vectors = weights
    return extension().mamba2(
        sizes.num_heads,
        sizes.head_dim,
        sizes.state_size,
        sizes.num_groups,
        sizes.conv_kernel,
        sizes.norm_eps,
        *sizes.step_limit,
        *(weight.data_ptr() for weight in (conv_weight, conv_bias, norm_weight)),
        conv_weight.dtype is torch.bfloat16,
        *(vector.data_ptr() for vector in vectors),
        row_dtype is torch.bfloat16,
    )


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        sizes: Mamba2Sizes,
        starts: tuple[int, ...],
        row_dtype: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        num_sequences = len(starts) - 1
        ctx.sizes, ctx.row_dtype = sizes, row_dtype
        ctx.batch = Batch(
            starts=starts, contexts=[0] * num_sequences, slots=range(num_sequences), pages=[], page_size=0
        )
        tail = torch.zeros(num_sequences, sizes.conv_kernel - 1, sizes.conv_width, dtype=row_dtype)
        states = torch.zeros(num_sequences, sizes.num_heads, sizes.state_size, sizes.head_dim)
        mixed, out_TI = _mix_natively(projected, weights, sizes, ctx.batch, tail, states)
        ctx.save_for_backward(projected, mixed, *weights)
        return out_TI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        projected, mixed, *weights = ctx.saved_tensors
        out_TI = gradients[0].contiguous()
        found = [torch.empty(tensor.shape) for tensor in (projected, *weights)]
        form = kernels()
        assert form is not None, "it has run forward"
        form.mamba2_gradient(
            torch.get_num_threads(),
            native_mamba2(ctx.sizes, weights, row_dtype=ctx.row_dtype),
            ctx.batch.native,
            *(tensor.data_ptr() for tensor in (projected, mixed, out_TI)),
            [tensor.data_ptr() for tensor in found],
        )
        of_weights = (of.to(weight.dtype) for of, weight in zip(found[1:], weights, strict=True))
        return found[0], None, None, None, *of_weights
