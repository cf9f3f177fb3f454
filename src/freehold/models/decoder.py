"""The one decoder of all families: embeddings, residual blocks, a final norm, an output head."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from freehold.models.block import Block, RmsNorm
from freehold.models.layout import Capacity, Layout, State, allocate_states
from freehold.models.linear import Linear
from freehold.models.mtp import Mtp
from freehold.models.spec import DecoderSpec


class Decoder(nn.Module):
    """A language model as its spec describes it, uninitialised; build it on the meta device to measure it for free."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.spec = spec
        self.embeddings = nn.Embedding(spec.vocab_size, spec.width, _weight=torch.empty(spec.vocab_size, spec.width))
        self.blocks = nn.ModuleList(
            Block(block, spec.width, norm_eps=spec.norm_eps, norm_order=spec.norm_order) for block in spec.blocks
        )
        self.norm = RmsNorm(spec.width, spec.norm_eps, spec.norm_order)
        self.lm_head = Linear(spec.width, spec.vocab_size)
        self.tie_embeddings()
        self.mtp = Mtp(spec.mtp, spec) if spec.mtp else None

    def tie_embeddings(self) -> None:
        """Make the output head share the embeddings' weight, where the spec says so."""
        if self.spec.tied_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.embeddings.weight)

    def forward(self, tokens_T: Tensor, layout: Layout, states: Sequence[State] | None = None) -> Tensor:
        """Return the hidden states after the final norm, [T, D].

        Mutates: `states`, one entry per block; without them every sequence starts anew and nothing is kept.
        """
        hidden_TD = self.embeddings(tokens_T)
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            hidden_TD = block(hidden_TD, layout, state)
        return self.norm(hidden_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return float32 logits [T, V] of hidden states after the final norm."""
        return self.lm_head(hidden_TD).float()

    def allocate_states(self, capacity: Capacity) -> list[State]:
        """Return fresh states for this model, in its dtype and on its device."""
        return allocate_states(self.spec.blocks, capacity, dtype=self.dtype, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device


def build_decoder(spec: DecoderSpec, *, dtype: torch.dtype) -> Decoder:
    """Return a decoder on the meta device, in `dtype` but for `float32_parameter`s."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not hasattr(parameter, "stays_float32"):
                setattr(module, name, nn.Parameter(parameter.to(dtype)))
    decoder.tie_embeddings()
    return decoder
