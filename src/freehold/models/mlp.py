"""The feed-forward mixers: gated SiLU (Llama, Qwen) and squared ReLU (Nemotron)."""

from torch import Tensor, nn
from torch.nn.functional import relu, silu

from freehold.models.layout import Layout
from freehold.models.linear import Linear
from freehold.models.spec import MlpSpec
from freehold.ops.mixers import Norm, Program, can_run
from freehold.ops.native import keeps_rows_apart
from freehold.ops.weight import is_quantized


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)). Paper: Shazeer, 2020, arXiv 2002.05202, section 2 (SwiGLU)."""

    def __init__(self, spec: MlpSpec, width: int):
        super().__init__()
        self.gate_proj = Linear(width, spec.width)
        self.up_proj = Linear(width, spec.width)
        self.down_proj = Linear(spec.width, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: None) -> Tensor:
        """Return the mixed tokens [T, D]; each token on its own."""
        gate_TF, up_TF = self.gate_proj(hidden_TD), self.up_proj(hidden_TD)
        if gate_TF.requires_grad:
            return self.down_proj(silu(gate_TF) * up_TF)
        for rows_F in gate_TF if keeps_rows_apart(gate_TF) else (gate_TF,):
            silu(rows_F, inplace=True)  # fresh memory costs more than the arithmetic
        return self.down_proj(gate_TF.mul_(up_TF))

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer."""
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return is_quantized(gate) == is_quantized(up) and can_run((gate, up, down))

    def add_to(self, program: Program, norm: Norm, state: None) -> None:
        """Add this mixer's block to a program. Mutates: program."""
        program.add_mlp(norm, gate=self.gate_proj.weight, up=self.up_proj.weight, down=self.down_proj.weight)


class SquaredReluMlp(nn.Module):
    """down(relu(up(x)) ** 2). Paper: So et al., 2021, arXiv 2109.08668, section 4.2."""

    def __init__(self, inner_width: int, width: int):
        super().__init__()
        self.up_proj = Linear(width, inner_width)
        self.down_proj = Linear(inner_width, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: None) -> Tensor:
        """Return the mixed tokens [T, D]; each token on its own."""
        up_TF = self.up_proj(hidden_TD)
        if up_TF.requires_grad:
            return self.down_proj(relu(up_TF).square())
        return self.down_proj(up_TF.relu_().square_())

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer."""
        return can_run((self.up_proj.weight, self.down_proj.weight))

    def add_to(self, program: Program, norm: Norm, state: None) -> None:
        """Add this mixer's block to a program. Mutates: program."""
        program.add_mlp(norm, gate=None, up=self.up_proj.weight, down=self.down_proj.weight)


def build_mlp(spec: MlpSpec, width: int) -> GatedMlp | SquaredReluMlp:
    """Return the module of an MLP spec."""
    match spec.activation:
        case "silu_gated":
            return GatedMlp(spec, width)
        case "relu2":
            return SquaredReluMlp(spec.width, width)
