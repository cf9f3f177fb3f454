"""One residual block: x + mixer(norm(x)), whatever the mixer."""

import torch
from torch import Tensor, nn

from freehold.models.attention import Attention
from freehold.models.layout import Layout, State
from freehold.models.mamba2 import Mamba2
from freehold.models.mlp import GatedMlp, SquaredReluMlp, build_mlp
from freehold.models.moe import Moe
from freehold.models.spec import AttentionSpec, BlockSpec, Mamba2Spec, MlpSpec, MoeSpec
from freehold.ops.norm import NormOrder, rms_norm

Mixer = Attention | Mamba2 | GatedMlp | SquaredReluMlp | Moe


class RmsNorm(nn.Module):
    """RMSNorm with a weight [D]."""

    def __init__(self, width: int, eps: float, order: NormOrder):
        super().__init__()
        self.eps, self.order = eps, order
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return rms_norm(hidden_TD, self.weight, eps=self.eps, order=self.order)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, spec: BlockSpec, width: int, *, norm_eps: float, norm_order: NormOrder):
        super().__init__()
        self.norm = RmsNorm(width, norm_eps, norm_order)
        self.mixer = build_mixer(spec, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: State) -> Tensor:
        """Return the block's output [T, D]. Mutates: `state`."""
        mixed_TD = self.mixer(self.norm(hidden_TD), layout, state)
        return hidden_TD + mixed_TD if mixed_TD.requires_grad else mixed_TD.add_(hidden_TD)


def build_mixer(spec: BlockSpec, width: int) -> Mixer:
    """Return the mixer of a block spec."""
    match spec:
        case AttentionSpec():
            return Attention(spec, width)
        case Mamba2Spec():
            return Mamba2(spec, width)
        case MlpSpec():
            return build_mlp(spec, width)
        case MoeSpec():
            return Moe(spec, width)
