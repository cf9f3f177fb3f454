"""One residual block: x + mixer(norm(x)), whatever the mixer."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freehold.models.attention import Attention
from freehold.models.layout import ExpertLoad, Layout, State, allocate_state
from freehold.models.mamba2 import Mamba2
from freehold.models.mlp import GatedMlp, SquaredReluMlp, build_mlp
from freehold.models.moe import Moe
from freehold.models.spec import AttentionSpec, BlockSpec, Mamba2Spec, MlpSpec, MoeSpec
from freehold.ops.gradient import wants_gradient, with_reference_gradient
from freehold.ops.mixers import Norm, Program
from freehold.ops.native import is_native, kernels
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

    @property
    def for_kernels(self) -> Norm:
        """This norm as a program takes it."""
        return Norm(weight_D=self.weight, eps=self.eps, order=self.order)


class Block(nn.Module):
    """x + mixer(norm(x)).

    Without a gradient the kernels compute a block as one call. With one its ops are called one by one, each with the
    bits that it has within that call: all values between are float32 there, and are kept for the ops' own gradients.
    A block with an adapter is no single call: its ops are called one by one in serving, too.

    recomputes: whether only the block's input is kept, and the rest computed once more for the gradient.
    is_divided: whether the mixer speaks with other processes, which no native call does.
    """

    recomputes = False
    is_divided = False

    def __init__(self, spec: BlockSpec, width: int, *, norm_eps: float, norm_order: NormOrder):
        super().__init__()
        self.spec = spec
        self.norm = RmsNorm(width, norm_eps, norm_order)
        self.mixer = build_mixer(spec, width)

    def forward(self, hidden_TD: Tensor, layout: Layout, state: State) -> Tensor:
        """Return the block's output [T, D], by one call of the kernels where they can take it, or op by op.

        Mutates: `state`; hidden_TD too, where no gradient is wanted.
        """
        if isinstance(state, ExpertLoad):  # here, where a block passes once, whatever is computed again later
            assert isinstance(self.mixer, Moe), "only experts have a load"
            self.mixer.add_load(self.norm(hidden_TD), layout, state)
            state = None
        if self.is_divided or kernels() is None or not is_native(hidden_TD):
            return self._recorded(hidden_TD, layout, state)
        if not wants_gradient(hidden_TD, *self.parameters()):
            return (self._run if self.is_native() else self.reference)(hidden_TD, layout, state)
        assert state is None, "states carry no gradient"
        if is_native(self.norm.weight) and self.mixer.has_native_ops():
            return self._recorded(hidden_TD, layout, None)
        return with_reference_gradient(  # sizes that kernels do not take: as it is served, by ops whose rows are apart
            lambda hidden_TD, *parameters: self.reference(hidden_TD.detach().clone(), layout, None),
            lambda hidden_TD, *parameters: self.reference(hidden_TD, layout, None),
            hidden_TD,
            *self.parameters(),
        )

    def reference(self, hidden_TD: Tensor, layout: Layout, state: State) -> Tensor:
        """Return the block's output [T, D] as its ops give it one by one: the twin of the native call."""
        mixed_TD = self.mixer(self.norm(hidden_TD), layout, state)
        if mixed_TD.requires_grad or mixed_TD.dtype is not hidden_TD.dtype:
            return (hidden_TD + mixed_TD).to(hidden_TD.dtype)
        return mixed_TD.add_(hidden_TD)

    def _recorded(self, hidden_TD: Tensor, layout: Layout, state: State) -> Tensor:
        """Return the reference with what its gradient needs."""
        if not (self.recomputes and wants_gradient(hidden_TD, *self.parameters())):
            return self.reference(hidden_TD, layout, state)
        assert state is None, "states carry no gradient"
        out_TD: Tensor = checkpoint(
            self.reference, hidden_TD, layout, None, use_reentrant=False, preserve_rng_state=False
        )
        return out_TD

    def is_native(self) -> bool:
        """Return whether kernels can take this block."""
        return not self.is_divided and is_native(self.norm.weight) and self.mixer.is_native()

    def add_to(self, program: Program, state: State) -> None:
        """Add this block to a program. Mutates: program."""
        self.mixer.add_to(program, self.norm.for_kernels, state)  # type: ignore[arg-type]  # a block's state is of its mixer's kind

    def _run(self, hidden_TD: Tensor, layout: Layout, state: State) -> Tensor:
        if state is None and not layout.page_size:
            layout = layout.with_own_states
            state = allocate_state(self.spec, layout.own_capacity, dtype=hidden_TD.dtype, device="cpu")
        program = Program()
        self.add_to(program, state)
        program.run(hidden_TD, layout.batch)
        return hidden_TD


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
