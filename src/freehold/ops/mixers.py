"""Residual blocks as native calls, hidden = hidden + mixer(norm(hidden)) in place, and a whole decoder as one.

The twins are the mixers of `models`, which are put together from the ops beside this file. Belongs here: what a call
takes, and whether the kernels can take it. Not here: modules, specs, and what to do where they cannot.

Precision of all: float32 inside, rounded where the hidden states and the states of sequences are bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freehold.ops.mamba2 import Mamba2Sizes, native_mamba2
from freehold.ops.native import Batch, extension, is_native, kernels
from freehold.ops.norm import NormOrder, native_norm
from freehold.ops.weight import Adapted, Packed, Weight, bare, matrix_of

# What native/*.h say of the sizes that kernels take.
LANES = 16
MAX_HEAD_DIM = 256


def can_run(tensors: Sequence[Weight | None]) -> bool:
    """Return whether there are kernels, and they can take a block's matrices and vectors as they are.

    They know no adapters: a block with one that adds anything runs op by op.
    """
    return kernels() is not None and all(_can_take(bare(tensor)) for tensor in tensors if tensor is not None)


def _can_take(weight: Weight) -> bool:
    return is_native(weight) if isinstance(weight, Tensor) else isinstance(weight, Packed)


class Program:
    """Blocks in order, added one by one, then run as often as one likes.

    It holds the weights and states that it was given: what is written into those tensors later counts, what is put in
    their place does not.
    """

    def __init__(self) -> None:
        self._native = extension().Program()
        self._kept: list[Any] = []  # whose addresses the native side has
        self._left_out: list[Adapted] = []  # adapters that added nothing when their weights were given

    @property
    def is_current(self) -> bool:
        """Whether adapters that were left out still add nothing."""
        return all(bare(weight) is weight.base for weight in self._left_out)

    def run(self, hidden_TD: Tensor, batch: Batch) -> None:
        """Run all blocks on hidden states. Mutates: hidden_TD, the states."""
        num_tokens, width = hidden_TD.shape
        is_bfloat16 = hidden_TD.dtype is torch.bfloat16
        self._native.run(
            kernels(), torch.get_num_threads(), hidden_TD.data_ptr(), is_bfloat16, num_tokens, width, batch.native
        )

    def set_ends(self, *, embeddings: Weight, norm: "Norm", head: Weight) -> None:
        """Say what comes before the blocks and after them, so that `read` and `predict` can go from tokens."""
        self._width = embeddings.shape[1]
        self._vocab_size = head.shape[0]
        self._native.set_ends(self._matrix(embeddings), self._norm(norm), self._matrix(head))

    def read(self, tokens_T: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Return the hidden states after the final norm, [T, D]. Mutates: the states.

        Raises: IndexError for a token that the table has not.
        """
        hidden_TD = torch.empty(len(tokens_T), self._width, dtype=dtype)
        self._native.read(*self._step(tokens_T, hidden_TD, batch))
        return hidden_TD

    def predict(self, tokens_T: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Return the logits of what follows each sequence's last token, [B, V]. Mutates: the states.

        Raises: IndexError for a token that the table has not.
        """
        hidden_TD = torch.empty(len(tokens_T), self._width, dtype=dtype)
        logits_BV = torch.empty(batch.num_sequences, self._vocab_size, dtype=dtype)
        self._native.predict(*self._step(tokens_T, hidden_TD, batch), logits_BV.data_ptr())
        return logits_BV

    def _step(self, tokens_T: Tensor, hidden_TD: Tensor, batch: Batch) -> tuple[Any, ...]:
        assert tokens_T.dtype is torch.int64, "tokens are ids"
        assert tokens_T.is_contiguous(), "ids lie one after the other"
        is_bfloat16 = hidden_TD.dtype is torch.bfloat16
        addresses = tokens_T.data_ptr(), hidden_TD.data_ptr()
        return kernels(), torch.get_num_threads(), *addresses, is_bfloat16, *hidden_TD.shape, batch.native

    def add_mlp(self, norm: "Norm", *, gate: Weight | None, up: Weight, down: Weight) -> None:
        """Add down(silu(gate(x)) * up(x)), or down(relu(up(x)) ** 2) without a gate."""
        self._native.add_mlp(self._norm(norm), *map(self._matrix, (gate, up, down)))

    def add_attention(
        self,
        norm: "Norm",
        *,
        qkv: Sequence[Weight],
        biases: Sequence[Tensor | None],
        output: Weight,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotation: Tensor | None,
        key_pages: Tensor,
        value_pages: Tensor,
        key_scales: Tensor | None,
        value_scales: Tensor | None,
    ) -> None:
        """Add attention over pages, which gain each step's keys and values.

        Shapes: rotation [positions, K], float32: K / 2 cosines, then K / 2 sines; pages as in `ops.attention`, with
            scales where they are int8.
        """
        bias_dtype = next((bias.dtype for bias in biases if bias is not None), torch.float32)
        self._native.add_attention(
            self._norm(norm),
            *map(self._matrix, qkv),
            *map(self._address, biases),
            bias_dtype is torch.bfloat16,
            self._matrix(output),
            num_heads,
            num_kv_heads,
            head_dim,
            *map(self._address, (rotation, key_pages, value_pages)),
            getattr(extension().PageElement, str(key_pages.dtype).removeprefix("torch.")),
            *map(self._address, (key_scales, value_scales)),
        )

    def add_mamba2(
        self,
        norm: "Norm",
        *,
        input: Weight,
        output: Weight,
        sizes: Mamba2Sizes,
        weights: Sequence[Tensor],
        conv_tail: Tensor,
        ssm: Tensor,
    ) -> None:
        """Add a Mamba-2 mixer with the states of all slots.

        weights: those of `ops.mamba2.mix`, in its order.
        """
        self._kept.extend(weights)
        self._native.add_mamba2(
            self._norm(norm),
            *map(self._matrix, (input, output)),
            native_mamba2(sizes, weights, row_dtype=conv_tail.dtype),
            *map(self._address, (conv_tail, ssm)),
        )

    def add_moe(
        self,
        norm: "Norm",
        *,
        gate_ED: Tensor,
        correction_E: Tensor,
        num_chosen: int,
        num_groups: int,
        num_chosen_groups: int,
        normalize_weights: bool,
        scale: float,
        up: Weight,
        down: Weight,
        shared_up: Weight,
        shared_down: Weight,
        latent_in: Weight | None,
        latent_out: Weight | None,
    ) -> None:
        """Add routed experts and the shared one."""
        self._native.add_moe(
            self._norm(norm),
            self._matrix(gate_ED),
            self._address(correction_E),
            len(gate_ED),
            num_chosen,
            num_groups,
            num_chosen_groups,
            normalize_weights,
            scale,
            self._matrix(up),
            _stride(up),
            self._matrix(down),
            _stride(down),
            *map(self._matrix, (shared_up, shared_down, latent_in, latent_out)),
        )

    def _norm(self, norm: "Norm") -> Any:
        self._kept.append(norm.weight_D)
        return native_norm(norm.weight_D, eps=norm.eps, order=norm.order)

    def _matrix(self, weight: Weight | None) -> Any:
        self._kept.append(weight)
        if isinstance(weight, Adapted):
            self._left_out.append(weight)
        return extension().Matrix() if weight is None else matrix_of(bare(weight))

    def _address(self, tensor: Tensor | None) -> int:
        self._kept.append(tensor)
        return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The RMSNorm that a block reads the hidden states through."""

    weight_D: Tensor
    eps: float
    order: NormOrder


def can_attend(head_dim: int) -> bool:
    """Return whether the attention kernel takes heads of this size."""
    return head_dim % LANES == 0 and head_dim <= MAX_HEAD_DIM


def _stride(stacked: Weight) -> int:
    """Return the bytes from one expert's matrix to the next."""
    stacked = bare(stacked)
    assert not isinstance(stacked, Adapted), "`can_run` was asked"
    return stacked.matrix_bytes if isinstance(stacked, Packed) else stacked[0].nbytes
