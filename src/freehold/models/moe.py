"""The mixture-of-experts mixer of Nemotron 3, with and without a latent space."""

import torch
from torch import Tensor, nn

from freehold.models.layout import ExpertLoad, Layout
from freehold.models.linear import Linear, float32_parameter
from freehold.models.mlp import SquaredReluMlp
from freehold.models.spec import MoeSpec
from freehold.ops.mixers import Norm, Program, can_run
from freehold.ops.moe import MAX_EXPERTS, balance_loss, count_chosen, mix_experts, route, router_logits
from freehold.ops.native import inner_dtype
from freehold.ops.weight import Weight


class Router(nn.Module):
    """Weight [E, D] and correction bias [E] of the sigmoid router; both float32."""

    def __init__(self, num_experts: int, width: int):
        super().__init__()
        self.weight = float32_parameter(num_experts, width)
        self.e_score_correction_bias = float32_parameter(num_experts)


class Experts(nn.Module):
    """The routed experts' weights, stacked: up [E, F, Z] and down [E, Z, F]."""

    up_proj: Weight
    down_proj: Weight

    def __init__(self, num_experts: int, inner_width: int, width: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner_width, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner_width))

    def forward(self, input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor) -> Tensor:
        return mix_experts(input_TZ, experts_TX, weights_TX, self.up_proj, self.down_proj)


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
        experts_TX, weights_TX = self._route(router_logits(hidden_TD, self.gate.weight))
        dtype = inner_dtype(hidden_TD)
        input_TZ = self.fc1_latent_proj(hidden_TD, dtype) if spec.latent_width else hidden_TD.to(dtype)
        mixed_TZ = self.experts(input_TZ, experts_TX, weights_TX)
        mixed_TD = self.fc2_latent_proj(mixed_TZ) if spec.latent_width else mixed_TZ
        return mixed_TD + self.shared_experts(hidden_TD, layout, state)

    def add_load(self, hidden_TD: Tensor, layout: Layout, load: ExpertLoad) -> None:
        """Add what tokens ask of the experts, as the reference of the router chooses. Mutates: load."""
        logits_TE = router_logits(hidden_TD, self.gate.weight)
        experts_TX, _ = self._route(logits_TE.detach())
        load.counts = (
            load.counts + count_chosen(experts_TX, num_experts=self.spec.num_experts, spans=((0, len(experts_TX)),))[0]
        )
        choices_BE = self._choices(experts_TX, layout)
        load.balance = load.balance + balance_loss(logits_TE.sigmoid(), choices_BE, spans=layout.spans)

    def _choices(self, experts_TX: Tensor, layout: Layout) -> Tensor:
        """Return how often each sequence, all of it, chose each expert, int64 [B, E]."""
        return count_chosen(experts_TX, num_experts=self.spec.num_experts, spans=layout.spans)

    def has_native_ops(self) -> bool:
        """Return whether kernels can take what lies between the products: the choice of experts."""
        vectors = (self.gate.weight, self.gate.e_score_correction_bias)
        return self.spec.num_experts <= MAX_EXPERTS and all(vector.dtype is torch.float32 for vector in vectors)

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer as one."""
        vectors, shared = (self.gate.weight, self.gate.e_score_correction_bias), self.shared_experts
        matrices = (self.experts.up_proj, self.experts.down_proj, shared.up_proj.weight, shared.down_proj.weight)
        return self.has_native_ops() and can_run((*matrices, *self._latent(), *vectors))

    def add_to(self, program: Program, norm: Norm, state: None) -> None:
        """Add this mixer's block to a program. Mutates: program."""
        spec = self.spec
        latent_in, latent_out = self._latent()
        program.add_moe(
            norm,
            gate_ED=self.gate.weight,
            correction_E=self.gate.e_score_correction_bias,
            num_chosen=spec.num_chosen,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            normalize_weights=spec.normalize_weights,
            scale=spec.scale,
            up=self.experts.up_proj,
            down=self.experts.down_proj,
            shared_up=self.shared_experts.up_proj.weight,
            shared_down=self.shared_experts.down_proj.weight,
            latent_in=latent_in,
            latent_out=latent_out,
        )

    def _route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.spec
        return route(
            logits_TE,
            self.gate.e_score_correction_bias,
            num_chosen=spec.num_chosen,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            normalize_weights=spec.normalize_weights,
            scale=spec.scale,
        )

    def _latent(self) -> tuple[Weight | None, Weight | None]:
        if not self.spec.latent_width:
            return None, None
        return self.fc1_latent_proj.weight, self.fc2_latent_proj.weight
