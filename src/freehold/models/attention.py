"""The attention mixer: projections, positions, pages."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from freehold.models.layout import Layout, PagedKV
from freehold.models.linear import Linear
from freehold.models.spec import AttentionSpec, Llama3Scaling, RopeSpec, YarnScaling
from freehold.ops.attention import attention, attention_anew, attention_over, attention_over_pages
from freehold.ops.mixers import Norm, Program, can_attend, can_run
from freehold.ops.native import has_kernels, inner_dtype
from freehold.ops.rope import llama3_frequencies, rope_frequencies, rotate, yarn_frequencies
from freehold.ops.weight import Weight

MIN_TABLE_POSITIONS = 2048


class Attention(nn.Module):
    """Causal attention with grouped key/value heads; positions by RoPE or not at all.

    sees_all: whether every sequence without a state is whole.
    """

    sees_all = True

    def __init__(self, spec: AttentionSpec, width: int):
        super().__init__()
        self.spec = spec
        self.q_proj = Linear(width, spec.num_heads * spec.head_dim, has_bias=spec.qkv_bias)
        self.k_proj = Linear(width, spec.num_kv_heads * spec.head_dim, has_bias=spec.qkv_bias)
        self.v_proj = Linear(width, spec.num_kv_heads * spec.head_dim, has_bias=spec.qkv_bias)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: PagedKV | None) -> Tensor:
        """Return the mixed tokens [T, D]. Mutates: the pages of `state`, which gain this step's keys and values."""
        spec, dtype = self.spec, inner_dtype(hidden_TD)
        q_THK = self.q_proj(hidden_TD, dtype).unflatten(1, (spec.num_heads, spec.head_dim))
        k_TJK = self.k_proj(hidden_TD, dtype).unflatten(1, (spec.num_kv_heads, spec.head_dim))
        v_TJK = self.v_proj(hidden_TD, dtype).unflatten(1, (spec.num_kv_heads, spec.head_dim))
        if has_kernels(hidden_TD) and self._runs_its_kernel(state):
            mixed_THK = self._attend_natively(q_THK, k_TJK, v_TJK, layout, state, dtype=hidden_TD.dtype)
            return self.o_proj(mixed_THK.flatten(1))
        if spec.rope is not None:
            cos_TK, sin_TK = _angles(spec.rope, spec.head_dim, layout, dtype)
            q_THK, k_TJK = rotate(q_THK, cos_TK, sin_TK), rotate(k_TJK, cos_TK, sin_TK)
        return self.o_proj(self._attend(q_THK, k_TJK, v_TJK, layout, state).flatten(1))

    def _attend_natively(
        self,
        q_THK: Tensor,
        k_TJK: Tensor,
        v_TJK: Tensor,
        layout: Layout,
        state: PagedKV | None,
        *,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return what rotation and attention make of sequences, by the kernels.

        dtype: the model's, in which keys and values without a state are held.
        """
        spec, rotation = self.spec, None
        if spec.rope is not None:
            rotation = _native_table(spec.rope, spec.head_dim, _table_size(max(layout.ends)), dtype)
        if state is None:
            return attention_anew(q_THK, k_TJK, v_TJK, rotation, starts=layout.starts, page_dtype=dtype)
        pages = state.key_pages, state.value_pages, state.key_scales, state.value_scales
        return attention_over_pages(q_THK, k_TJK, v_TJK, rotation, batch=layout.batch, pages=pages)

    def _attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, layout: Layout, state: PagedKV | None) -> Tensor:
        if state is None:
            return attention(q_THK, k_TJK, v_TJK, spans=layout.spans)
        state.write(k_TJK, v_TJK, layout.rows_T)
        owned = [state.read(row) for row in layout.pages]
        return attention_over(q_THK, owned, spans=layout.spans, ends=layout.ends)

    def _runs_its_kernel(self, state: PagedKV | None) -> bool:
        """Return whether attention runs on its kernel: where a gradient is recorded, or the block is no single call."""
        is_recorded = state is None and torch.is_grad_enabled()
        return self.has_native_ops() and (is_recorded or not self.is_native())

    def has_native_ops(self) -> bool:
        """Return whether kernels can take what lies between the products."""
        return self.sees_all and can_attend(self.spec.head_dim)

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer as one."""
        biases = (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)
        same_biases = len({bias.dtype for bias in biases if bias is not None}) <= 1
        return can_attend(self.spec.head_dim) and same_biases and can_run((*self._qkv(), self.o_proj.weight, *biases))

    def add_to(self, program: Program, norm: Norm, state: PagedKV) -> None:
        """Add this mixer's block to a program. Mutates: program."""
        spec, rotation = self.spec, None
        if spec.rope is not None:
            num_positions = _table_size(state.num_tokens)
            rotation = _native_table(spec.rope, spec.head_dim, num_positions, norm.weight_D.dtype)
        program.add_attention(
            norm,
            qkv=self._qkv(),
            biases=(self.q_proj.bias, self.k_proj.bias, self.v_proj.bias),
            output=self.o_proj.weight,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            rotation=rotation,
            key_pages=state.key_pages,
            value_pages=state.value_pages,
            key_scales=state.key_scales,
            value_scales=state.value_scales,
        )

    def _qkv(self) -> tuple[Weight, Weight, Weight]:
        return self.q_proj.weight, self.k_proj.weight, self.v_proj.weight


def _angles(rope: RopeSpec, head_dim: int, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each token's position, [T, K], from a table that doubles as contexts grow."""
    table = _rotation_table(rope, head_dim, _table_size(max(layout.ends)), layout.positions_T.device, dtype)
    cos_TK, sin_TK = table[:, layout.positions_T]
    return cos_TK, sin_TK


def _table_size(num_positions: int) -> int:
    return max(MIN_TABLE_POSITIONS, 1 << (num_positions - 1).bit_length())


@lru_cache(maxsize=8)
def _native_table(rope: RopeSpec, head_dim: int, num_positions: int, dtype: torch.dtype) -> Tensor:
    """Return the rotation table as kernels read it: float32 [positions, K], K / 2 cosines, then K / 2 sines."""
    cos, sin = _rotation_table(rope, head_dim, num_positions, torch.device("cpu"), dtype)
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat((cos[:, : head_dim // 2], sin[:, : head_dim // 2]), dim=1).float().contiguous()


@lru_cache(maxsize=8)
def _rotation_table(
    rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return cosine and sine for positions from 0, [2, positions, K]; computed in float32, rounded once."""
    with torch.inference_mode(False), torch.no_grad():  # the table outlives this step and may meet a gradient later
        frequencies, factor = rope_table_frequencies(rope, head_dim)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies).repeat(1, 2)
        return (torch.stack((angles.cos(), angles.sin())) * factor).to(device=device, dtype=dtype)


def rope_table_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Return the frequencies [K / 2] that a rope spec describes, and what multiplies cosine and sine."""
    plain = rope_frequencies(head_dim, rope.theta)
    match rope.scaling:
        case None:
            return plain, 1.0
        case Llama3Scaling() as scaling:
            frequencies = llama3_frequencies(
                plain,
                factor=scaling.factor,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_positions=scaling.original_max_positions,
            )
            return frequencies, 1.0
        case YarnScaling() as scaling:
            frequencies = yarn_frequencies(
                plain,
                theta=rope.theta,
                factor=scaling.factor,
                beta_fast=scaling.beta_fast,
                beta_slow=scaling.beta_slow,
                original_max_positions=scaling.original_max_positions,
            )
            return frequencies, scaling.attention_factor
