"""The feed-forward mixers: gated SiLU (Llama, Qwen) and squared ReLU (Nemotron)."""

from torch import Tensor, nn

from freehold.models.layout import Layout
from freehold.models.linear import Linear
from freehold.models.spec import MlpSpec
from freehold.ops.activation import gated_silu, squared_relu
from freehold.ops.mixers import Norm, Program, can_run
from freehold.ops.native import inner_dtype
from freehold.ops.weight import is_quantized


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: MlpSpec, width: int):
        super().__init__()
        self.gate_proj = Linear(width, spec.width)
        self.up_proj = Linear(width, spec.width)
        self.down_proj = Linear(spec.width, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: None) -> Tensor:
        """Return the mixed tokens [T, D]; each token on its own."""
        dtype = inner_dtype(hidden_TD)
        return self.down_proj(gated_silu(self.gate_proj(hidden_TD, dtype), self.up_proj(hidden_TD, dtype)))

    def has_native_ops(self) -> bool:
        """Return whether kernels can take what lies between the products."""
        return True

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer as one."""
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return is_quantized(gate) == is_quantized(up) and can_run((gate, up, down))

    def add_to(self, program: Program, norm: Norm, state: None) -> None:
        """Add this mixer's block to a program. Mutates: program."""
        program.add_mlp(norm, gate=self.gate_proj.weight, up=self.up_proj.weight, down=self.down_proj.weight)


class SquaredReluMlp(nn.Module):
    """down(relu(up(x)) ** 2)."""

    def __init__(self, inner_width: int, width: int):
        super().__init__()
        self.up_proj = Linear(width, inner_width)
        self.down_proj = Linear(inner_width, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: None) -> Tensor:
        """Return the mixed tokens [T, D]; each token on its own."""
        return self.down_proj(squared_relu(self.up_proj(hidden_TD, inner_dtype(hidden_TD))))

    def has_native_ops(self) -> bool:
        """Return whether kernels can take what lies between the products."""
        return True

    def is_native(self) -> bool:
        """Return whether kernels can take this mixer as one."""
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
