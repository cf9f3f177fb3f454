"""The linear layer of every mixer. Its weight may be any that `ops.linear` takes."""

import torch
from torch import Tensor, nn

from freehold.ops.linear import embed, linear
from freehold.ops.loss import linear_cross_entropy
from freehold.ops.weight import Adapted, Packed, Weight


class Embedding(nn.Module):
    """Rows of a table [V, D], uninitialised."""

    weight: Weight

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return embed(tokens_T, self.weight)


class Linear(nn.Module):
    """hidden @ weight.T + bias, uninitialised: weights come from a checkpoint or from an initialiser."""

    weight: Weight

    def __init__(self, in_width: int, out_width: int, *, has_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.empty(out_width)) if has_bias else None

    def forward(self, hidden_TD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return linear(hidden_TD, self.weight, self.bias, dtype)


class Head(Linear):
    """The output head: what tokens cost, where whole logits are not wanted."""

    def loss(self, hidden_TD: Tensor, labels_T: Tensor) -> tuple[Tensor, int]:
        """Return `ops.loss.linear_cross_entropy` of these hidden states: a sum over labels, and how many they are."""
        weight = self.weight
        if isinstance(weight, Tensor) and not torch.is_grad_enabled():
            weight = weight.detach()  # no gradient of it is made then
        return linear_cross_entropy(hidden_TD, weight, labels_T)


def float32_parameter(*shape: int) -> nn.Parameter:
    """Return an uninitialised parameter that stays float32 whatever the model's dtype (see `build_decoder`)."""
    parameter = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
    parameter.stays_float32 = True  # type: ignore[attr-defined]
    return parameter


def set_weight(owner: nn.Module, name: str, weight: Weight) -> None:
    """Put a weight in the place of a module's parameter. Mutates: owner.

    A packed or an adapted weight is no parameter any more; an adapter's matrices are, as NAME_lora_A and NAME_lora_B.
    """
    if isinstance(getattr(owner, name), Adapted):
        delattr(owner, f"{name}_lora_A")
        delattr(owner, f"{name}_lora_B")
    if isinstance(weight, Packed | Adapted):
        delattr(owner, name)
    elif not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(weight, Adapted):
        setattr(owner, f"{name}_lora_A", weight.a)
        setattr(owner, f"{name}_lora_B", weight.b)
    setattr(owner, name, weight)
