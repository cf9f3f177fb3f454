"""The linear layer of every mixer. Its weight may be any that `ops.linear` takes."""

import torch
from torch import Tensor, nn

from freehold.ops.linear import linear


class Linear(nn.Module):
    """hidden @ weight.T + bias, uninitialised: weights come from a checkpoint or from an initialiser."""

    def __init__(self, in_width: int, out_width: int, *, has_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.empty(out_width)) if has_bias else None

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return linear(hidden_TD, self.weight, self.bias)


def float32_parameter(*shape: int) -> nn.Parameter:
    """Return an uninitialised parameter that stays float32 whatever the model's dtype (see `build_decoder`)."""
    parameter = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
    parameter.stays_float32 = True  # type: ignore[attr-defined]
    return parameter
