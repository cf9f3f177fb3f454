"""Mixture of experts: the choice of experts, the sum of what they say, and how even the choice is.

Paper: DeepSeek-V3 technical report, 2024, arXiv 2412.19437, section 2.1.2 (sigmoid router with a correction bias,
group-limited choice); LatentMoE is arXiv 2512.20856, and concerns only the width that `mix_experts` is given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu

from freehold.ops.linear import linear
from freehold.ops.weight import Weight, matrix_at


def route(
    hidden_TD: Tensor,
    gate_ED: Tensor,
    correction_E: Tensor,
    *,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    normalize_weights: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the chosen experts of each token and their weights.

        scores = sigmoid(hidden @ gate.T);  choice = the num_chosen largest of scores + correction
        weights = scores[choice] / (their sum + 1e-20) * scale

    The correction decides only who is chosen. A group's rank is the sum of its two best corrected scores; experts
    outside the num_chosen_groups best groups are not eligible.

    Shapes: experts [T, X] int64, weights [T, X] float32.
    Precision: float32, for the correction sits near a large common offset that bfloat16 would erase.
    """
    scores_TE = router_scores(hidden_TD, gate_ED)
    corrected_TE = scores_TE + correction_E.float()
    if num_groups > 1:
        corrected_TE = _keep_best_groups(corrected_TE, num_groups, num_chosen_groups)
    experts_TX = corrected_TE.topk(num_chosen, dim=-1).indices
    weights_TX = scores_TE.gather(1, experts_TX)
    if normalize_weights:
        weights_TX = weights_TX / (weights_TX.sum(dim=-1, keepdim=True) + 1e-20)
    return experts_TX, weights_TX * scale


def router_scores(hidden_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Return how well each expert suits each token, [T, E] between 0 and 1, float32."""
    return torch.sigmoid(linear(hidden_TD.float(), gate_ED.float()))


def count_chosen(experts_TX: Tensor, *, num_experts: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return how often each expert was chosen in each span of tokens, int64 [B, E]."""
    return torch.stack([experts_TX[start:stop].flatten().bincount(minlength=num_experts) for start, stop in spans])


def balance_loss(scores_TE: Tensor, choices_BE: Tensor, *, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return the sum over tokens of their sequence's balance loss, float32.

        E / (X L^2) * sum over experts of (choices of it) * (sum over tokens of its share of their scores)

    One where either factor is even over the experts, more where scores follow choices. The gradient flows through the
    scores alone.
    choices_BE: of all L tokens of each sequence. spans: the interval of its tokens that are here: the losses of parts
        add up to that of the whole.
    Paper: DeepSeek-V3, section 2.1.2, equations 17 to 20.
    """
    shares_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    shares_BE = torch.stack([shares_TE[start:stop].sum(dim=0) for start, stop in spans])
    chosen_BE = choices_BE / choices_BE.sum(dim=-1, keepdim=True)  # their sum is X L
    return (chosen_BE * shares_BE).sum() * scores_TE.shape[1]


def _keep_best_groups(corrected_TE: Tensor, num_groups: int, num_chosen_groups: int) -> Tensor:
    members = corrected_TE.unflatten(1, (num_groups, -1))  # [T, groups, members]
    ranks = members.topk(2, dim=-1).values.sum(dim=-1)
    best = ranks.topk(num_chosen_groups, dim=-1).indices
    kept = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, best, True)
    return members.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)


def mix_experts(input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor, up: Weight, down: Weight) -> Tensor:
    """Return the weighted sum over each token's experts of down(relu(up(input)) ** 2).

    Tokens are grouped by expert, so each chosen expert's weights are read once; each token sums its X results in the
    order of the choice, so the sum does not depend on the other tokens.

    Shapes: up [E, F, Z], down [E, Z, F]; Z is the width that experts read and write (the latent width, or D); the
        result is [T, Z].
    Precision: the weighted sum is float32, cast once at the end.
    """
    num_chosen = experts_TX.shape[1]
    order = experts_TX.flatten().argsort(stable=True)
    counts = experts_TX.flatten().bincount(minlength=up.shape[0]).tolist()
    outputs = []
    for expert, rows in enumerate(order.split(counts)):
        if len(rows):
            up_SF = linear(input_TZ[rows // num_chosen], matrix_at(up, expert))
            outputs.append(linear(relu(up_SF).square(), matrix_at(down, expert)))
    sorted_SZ = torch.cat(outputs)
    results_TXZ = torch.empty_like(sorted_SZ).index_copy(0, order, sorted_SZ).unflatten(0, experts_TX.shape)
    return (results_TXZ.float() * weights_TX[:, :, None]).sum(dim=1).to(input_TZ.dtype)
