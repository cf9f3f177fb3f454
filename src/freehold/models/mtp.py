"""The multi-token prediction module of Nemotron 3 Super, Ultra and 3.5 Lightning.

Paper: DeepSeek-V3 technical report, 2024, arXiv 2412.19437, section 2.2, with one physical module used recursively.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freehold.models.block import Block, RmsNorm
from freehold.models.layout import Layout, State
from freehold.models.linear import Linear
from freehold.models.spec import DecoderSpec, MtpSpec


class Mtp(nn.Module):
    """From the state at token i and the embedding of token i + 1, the state that predicts token i + 2.

    eh_proj takes the embedding's half first. The attention block keeps keys and values of its own.
    """

    def __init__(self, spec: MtpSpec, decoder: DecoderSpec):
        super().__init__()
        width, eps, order = decoder.width, decoder.norm_eps, decoder.norm_order
        self.enorm = RmsNorm(width, eps, order)
        self.hnorm = RmsNorm(width, eps, order)
        self.eh_proj = Linear(2 * width, width)
        self.blocks = nn.ModuleList(Block(b, width, norm_eps=eps, norm_order=order) for b in spec.blocks)
        self.final_layernorm = RmsNorm(width, eps, order)

    def forward(
        self, hidden_TD: Tensor, next_embedding_TD: Tensor, layout: Layout, states: Sequence[State] | None = None
    ) -> Tensor:
        """Return the hidden states [T, D] after the final norm: the output head's input, and the next draft's `hidden`.

        hidden_TD is the decoder's output after its final norm, or this module's own output for a further draft.
        Mutates: `states`, one entry per block of the module.
        """
        mixed_TD = self.eh_proj(torch.cat((self.enorm(next_embedding_TD), self.hnorm(hidden_TD)), dim=-1))
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            mixed_TD = block(mixed_TD, layout, state)
        return self.final_layernorm(mixed_TD)
