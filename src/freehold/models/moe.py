"""The mixture-of-experts mixer of Nemotron 3, with and without a latent space."""

import torch
from torch import Tensor, nn

from freehold.models.layout import Layout
from freehold.models.linear import Linear, float32_parameter
from freehold.models.mlp import SquaredReluMlp
from freehold.models.spec import MoeSpec
from freehold.ops.moe import mix_experts, route


class Router(nn.Module):
    """Weight [E, D] and correction bias [E] of the sigmoid router; both float32."""

    def __init__(self, num_experts: int, width: int):
        super().__init__()
        self.weight = float32_parameter(num_experts, width)
        self.e_score_correction_bias = float32_parameter(num_experts)


class Experts(nn.Module):
    """The routed experts' weights, stacked: up [E, F, Z] and down [E, Z, F]."""

    def __init__(self, num_experts: int, inner_width: int, width: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner_width, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner_width))


class Moe(nn.Module):
    """Routed experts plus one shared expert; the routed ones may work in a latent space (LatentMoE)."""

    def __init__(self, spec: MoeSpec, width: int):
        super().__init__()
        self.spec = spec
        self.gate = Router(spec.num_experts, width)
        self.experts = Experts(spec.num_experts, spec.width, spec.latent_width or width)
        self.shared_experts = SquaredReluMlp(spec.shared_width, width)
        if spec.latent_width:
            self.fc1_latent_proj = Linear(width, spec.latent_width)
            self.fc2_latent_proj = Linear(spec.latent_width, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: None) -> Tensor:
        """Return the mixed tokens [T, D]; each token on its own."""
        spec = self.spec
        experts_TX, weights_TX = route(
            hidden_TD,
            self.gate.weight,
            self.gate.e_score_correction_bias,
            num_chosen=spec.num_chosen,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            normalize_weights=spec.normalize_weights,
            scale=spec.scale,
        )
        input_TZ = self.fc1_latent_proj(hidden_TD) if spec.latent_width else hidden_TD
        mixed_TZ = mix_experts(input_TZ, experts_TX, weights_TX, self.experts.up_proj, self.experts.down_proj)
        mixed_TD = self.fc2_latent_proj(mixed_TZ) if spec.latent_width else mixed_TZ
        return mixed_TD + self.shared_experts(hidden_TD, layout, state)
