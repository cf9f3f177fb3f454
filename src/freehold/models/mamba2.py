"""The Mamba-2 mixer: projection, convolution, scan, gate and grouped norm.

Paper: Dao and Gu, 2024, arXiv 2405.21060, section 7.
"""

import torch
from torch import Tensor, nn

from freehold.models.layout import Layout, Recurrent, allocate_state
from freehold.models.linear import Linear, float32_parameter
from freehold.models.spec import Mamba2Spec
from freehold.ops.conv import causal_conv, causal_conv_step
from freehold.ops.mamba2 import Mamba2Sizes, can_take, mix, mix_on, mix_reference
from freehold.ops.mixers import Norm, Program, can_run
from freehold.ops.native import has_kernels, inner_dtype, keeps_rows_apart
from freehold.ops.norm import gated_group_rms_norm
from freehold.ops.ssm import scan, scan_step, step_sizes


class Convolution(nn.Module):
    """Weight [C, W] and bias [C] of the causal convolution."""

    def __init__(self, num_channels: int, num_taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, num_taps))
        self.bias = nn.Parameter(torch.empty(num_channels))


class GatedNorm(nn.Module):
    """Weight [I] of the gated norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class Mamba2(nn.Module):
    """A state-space mixer whose state is the last W-1 rows before the convolution and S [H, P, N] per sequence.

    sees_all: whether every sequence without a state is whole.
    """

    sees_all = True

    def __init__(self, spec: Mamba2Spec, width: int):
        super().__init__()
        self.spec = spec
        self.in_proj = Linear(width, spec.inner_width + spec.conv_width + spec.num_heads)
        self.conv1d = Convolution(spec.conv_width, spec.conv_kernel)
        self.A_log = float32_parameter(spec.num_heads)
        self.D = float32_parameter(spec.num_heads)
        self.dt_bias = float32_parameter(spec.num_heads)
        self.norm = GatedNorm(spec.inner_width)
        self.out_proj = Linear(spec.inner_width, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: Recurrent | None) -> Tensor:
        """Return the mixed tokens [T, D]. Mutates: the slots of `state` that the layout names."""
        projected_TP = self.in_proj(hidden_TD, inner_dtype(hidden_TD))
        if has_kernels(hidden_TD) and self._runs_its_kernels(state):
            return self.out_proj(self._mix_natively(projected_TP, layout, state, dtype=hidden_TD.dtype))
        if state is not None:
            projected_TP = projected_TP.to(hidden_TD.dtype)  # as its rows are kept
        mix_here = self._mix_rows if keeps_rows_apart(hidden_TD) else self._mix
        return self.out_proj(mix_here(projected_TP, layout, state))

    def _mix_natively(
        self, projected_TP: Tensor, layout: Layout, state: Recurrent | None, *, dtype: torch.dtype
    ) -> Tensor:
        """Return `_mix` by the kernels, with rows of the convolution rounded to the model's dtype."""
        if state is None:
            return mix(projected_TP, *self.weights, sizes=self.sizes, starts=layout.starts, row_dtype=dtype)
        tail, ssm = state.conv_tail, state.ssm
        return mix_on(projected_TP, *self.weights, sizes=self.sizes, batch=layout.batch, conv_tail=tail, ssm=ssm)

    def _runs_its_kernels(self, state: Recurrent | None) -> bool:
        """Return whether kernels mix: where a gradient is recorded, or the block is no single call."""
        is_recorded = state is None and torch.is_grad_enabled()
        return self.has_native_ops() and (is_recorded or not self.is_native())

    def _mix_rows(self, projected_TP: Tensor, layout: Layout, state: Recurrent | None) -> Tensor:
        """Return `_mix` of each token in a step of its own."""
        if state is None:
            layout = layout.with_own_states
            found = allocate_state(self.spec, layout.own_capacity, dtype=projected_TP.dtype, device="cpu")
            assert isinstance(found, Recurrent), "a Mamba-2 block has a recurrent state"
            state = found
        rows = []
        for slot, (start, stop) in zip(layout.slots, layout.spans, strict=True):
            alone = Layout(starts=(0, 1), contexts=(0,), slots=(slot,))
            rows += [self._mix(row_1P, alone, state) for row_1P in projected_TP[start:stop].split(1)]
        return torch.cat(rows)

    def _mix(self, projected_TP: Tensor, layout: Layout, state: Recurrent | None) -> Tensor:
        """Return what lies between the projections, [T, I]: convolution, scan, gate and norm."""
        if state is None and self.sees_all:
            return mix_reference(projected_TP, *self.weights, sizes=self.sizes, starts=layout.starts)
        spec = self.spec
        gate_TI, xbc_TC, dt_TH = projected_TP.split(self.sizes.widths, dim=-1)
        dt_TH = step_sizes(dt_TH, self.dt_bias, limit=spec.time_step_limit)
        if state is not None and layout.is_decode:
            y_THP = self._mix_step(xbc_TC, dt_TH, layout, state)
        else:
            y_THP = self._mix_spans(xbc_TC, dt_TH, layout, state)
        return gated_group_rms_norm(
            y_THP.flatten(1), gate_TI, self.norm.weight, num_groups=spec.num_groups, eps=spec.norm_eps
        )

    @property
    def sizes(self) -> Mamba2Sizes:
        """What ops have to know beside the weights."""
        spec = self.spec
        return Mamba2Sizes(
            num_heads=spec.num_heads,
            head_dim=spec.head_dim,
            state_size=spec.state_size,
            num_groups=spec.num_groups,
            conv_kernel=spec.conv_kernel,
            norm_eps=spec.norm_eps,
            step_limit=spec.time_step_limit,
        )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weights between the projections, as `ops.mamba2.mix` takes them."""
        return self.conv1d.weight, self.conv1d.bias, self.norm.weight, self.A_log, self.D, self.dt_bias

    def has_native_ops(self) -> bool:
        """Return whether kernels can take what lies between the products."""
        return self.sees_all and can_take(self.weights, self.sizes)

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer as one."""
        return can_take(self.weights, self.sizes) and can_run((self.in_proj.weight, self.out_proj.weight))

    def add_to(self, program: Program, norm: Norm, state: Recurrent) -> None:
        """Add this mixer's block to a program. Mutates: program."""
        program.add_mamba2(
            norm,
            input=self.in_proj.weight,
            output=self.out_proj.weight,
            sizes=self.sizes,
            weights=self.weights,
            conv_tail=state.conv_tail,
            ssm=state.ssm,
        )

    def _mix_step(self, xbc_BC: Tensor, dt_BH: Tensor, layout: Layout, state: Recurrent) -> Tensor:
        slots_B = layout.slots_B
        tail_BYC = state.conv_tail[slots_B]
        xbc_BC, tail_BYC = causal_conv_step(xbc_BC, tail_BYC, self.conv1d.weight, self.conv1d.bias)
        x_BHP, b_BGN, c_BGN = self._split(xbc_BC)
        y_BHP, ssm_BHPN = scan_step(x_BHP, dt_BH, self._a_H(), b_BGN, c_BGN, self.D, state.ssm[slots_B].mT)
        state.conv_tail.index_copy_(0, slots_B, tail_BYC)
        state.ssm.index_copy_(0, slots_B, ssm_BHPN.mT)
        return y_BHP

    def _mix_spans(self, xbc_TC: Tensor, dt_TH: Tensor, layout: Layout, state: Recurrent | None) -> Tensor:
        assert state is not None, "sequences that begin anew, and are whole, go another way"
        outputs = []
        for slot, (start, stop) in zip(layout.slots, layout.spans, strict=True):
            xbc_LC, tail_YC = causal_conv(
                xbc_TC[start:stop], state.conv_tail[slot], self.conv1d.weight, self.conv1d.bias
            )
            x_LHP, b_LGN, c_LGN = self._split(xbc_LC)
            y_LHP, ssm_HPN = scan(x_LHP, dt_TH[start:stop], self._a_H(), b_LGN, c_LGN, self.D, state.ssm[slot].mT)
            outputs.append(y_LHP)
            state.conv_tail[slot] = tail_YC
            state.ssm[slot] = ssm_HPN.mT
        return torch.cat(outputs)

    def _split(self, xbc_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        shared = spec.num_groups * spec.state_size
        x_TI, b_TN, c_TN = xbc_TC.split((spec.inner_width, shared, shared), dim=-1)
        return (
            x_TI.unflatten(-1, (spec.num_heads, spec.head_dim)),
            b_TN.unflatten(-1, (spec.num_groups, spec.state_size)),
            c_TN.unflatten(-1, (spec.num_groups, spec.state_size)),
        )

    def _a_H(self) -> Tensor:
        return -torch.exp(self.A_log.float())
