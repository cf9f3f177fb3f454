"""Products with weights that live in the model."""

from torch import Tensor
from torch.nn import functional


def linear(hidden_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Return `hidden @ weight.T + bias` in the dtype of `hidden_TD`.

    Shapes: [T, D] by [F, D] gives [T, F].
    """
    return functional.linear(hidden_TD, weight_FD, bias_F)
