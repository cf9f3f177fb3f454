"""Mixture of experts: the choice of experts, the sum of what they say, and how even the choice is.

Paper: DeepSeek-V3 technical report, 2024, arXiv 2412.19437, section 2.1.2 (sigmoid router with a correction bias,
group-limited choice); LatentMoE is arXiv 2512.20856, and concerns only the width that `mix_experts` is given.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, relu

from freehold.ops.linear import linear, write_product
from freehold.ops.native import is_native, kernels
from freehold.ops.weight import Weight, dense, matrix_at, matrix_of

MAX_EXPERTS = 1024  # that kernels take, as native/mixers.h says


def router_logits(hidden_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Return how well each expert suits each token, [T, E]: any number, its sigmoid the score.

    Precision: float32, for the correction of scores sits near a large common offset that bfloat16 would erase.
    """
    return linear(hidden_TD.float(), gate_ED.float())


def route_reference(
    logits_TE: Tensor,
    correction_E: Tensor,
    *,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    normalize_weights: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the chosen experts of each token and their weights.

        scores = sigmoid(logits);  choice = the num_chosen largest of scores + correction
        weights = scores[choice] / (their sum + 1e-20) * scale

    The correction decides only who is chosen. A group's rank is the sum of its two best corrected scores; experts
    outside the num_chosen_groups best groups are not eligible.

    Shapes: experts [T, X] int64, weights [T, X] float32.
    """
    scores_TE = logits_TE.sigmoid()
    corrected_TE = scores_TE + correction_E.float()
    if num_groups > 1:
        corrected_TE = _keep_best_groups(corrected_TE, num_groups, num_chosen_groups)
    experts_TX = corrected_TE.topk(num_chosen, dim=-1).indices
    weights_TX = scores_TE.gather(1, experts_TX)
    if normalize_weights:
        weights_TX = weights_TX / (weights_TX.sum(dim=-1, keepdim=True) + 1e-20)
    return experts_TX, weights_TX * scale


def route(
    logits_TE: Tensor,
    correction_E: Tensor,
    *,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    normalize_weights: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `route_reference` of the same arguments, by the native kernel where it applies.

    Its bits are those of a whole block that the kernels run. The choice has no gradient, the weights have one.
    """
    are_native = all(is_native(tensor) and tensor.dtype is torch.float32 for tensor in (logits_TE, correction_E))
    if kernels() is None or not are_native or len(correction_E) > MAX_EXPERTS:
        return route_reference(
            logits_TE,
            correction_E,
            num_chosen=num_chosen,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            normalize_weights=normalize_weights,
            scale=scale,
        )
    settings = (num_chosen, num_groups, num_chosen_groups, normalize_weights, scale)
    experts_TX, weights_TX = _Choice.apply(logits_TE, correction_E, *settings)  # type: ignore[no-untyped-call]
    return experts_TX, weights_TX


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        correction_E: Tensor,
        num_chosen: int,
        num_groups: int,
        num_chosen_groups: int,
        normalize_weights: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        form, (num_tokens, num_experts) = kernels(), logits_TE.shape
        assert form is not None, "the caller has asked"
        scores_TE = logits_TE.clone()
        experts_TX = torch.empty(num_tokens, num_chosen, dtype=torch.int32)
        weights_TX = torch.empty(num_tokens, num_chosen)
        form.choose_experts(
            torch.get_num_threads(),
            scores_TE.data_ptr(),
            num_tokens,
            num_experts,
            correction_E.data_ptr(),
            num_chosen,
            num_groups,
            num_chosen_groups,
            normalize_weights,
            scale,
            experts_TX.data_ptr(),
            weights_TX.data_ptr(),
        )
        experts_TX = experts_TX.long()
        ctx.save_for_backward(scores_TE, experts_TX)
        ctx.normalize_weights, ctx.scale = normalize_weights, scale
        ctx.mark_non_differentiable(experts_TX)
        return experts_TX, weights_TX

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores_TE, experts_TX = ctx.saved_tensors
        chosen_TX, of_chosen_TX = scores_TE.gather(1, experts_TX), gradients[1] * ctx.scale
        if ctx.normalize_weights:
            total_T1 = chosen_TX.sum(dim=-1, keepdim=True) + 1e-20
            along_T1 = (of_chosen_TX * chosen_TX).sum(dim=-1, keepdim=True) / total_T1
            of_chosen_TX = (of_chosen_TX - along_T1) / total_T1
        of_chosen_TX = of_chosen_TX * chosen_TX * (1 - chosen_TX)
        return torch.zeros_like(scores_TE).scatter_(1, experts_TX, of_chosen_TX), *(None for _ in range(6))


def count_chosen(experts_TX: Tensor, *, num_experts: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return how often each expert was chosen in each span of tokens, int64 [B, E]; spans follow one another."""
    span_T = _span_of_each(spans, experts_TX.device)
    chosen = (num_experts * span_T[:, None] + experts_TX).flatten()
    counts = torch.zeros(len(spans) * num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen)).view(len(spans), num_experts)


def _span_of_each(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return which span each token is of, int64 [T]."""
    lengths = torch.tensor([stop - start for start, stop in spans])
    return torch.arange(len(spans)).repeat_interleave(lengths).to(device)


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
    numbers_B = torch.arange(len(spans), device=scores_TE.device)
    is_of_BT = numbers_B[:, None] == _span_of_each(spans, scores_TE.device)
    shares_BE = is_of_BT.float() @ shares_TE
    chosen_BE = choices_BE / choices_BE.sum(dim=-1, keepdim=True)  # their sum is X L
    return (chosen_BE * shares_BE).sum() * scores_TE.shape[1]


def _keep_best_groups(corrected_TE: Tensor, num_groups: int, num_chosen_groups: int) -> Tensor:
    members = corrected_TE.unflatten(1, (num_groups, -1))  # [T, groups, members]
    ranks = members.topk(2, dim=-1).values.sum(dim=-1)
    best = ranks.topk(num_chosen_groups, dim=-1).indices
    kept = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, best, True)
    return members.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)


def mix_experts_reference(input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor, up: Weight, down: Weight) -> Tensor:
    """Return the weighted sum over each token's experts of down(relu(up(input)) ** 2).

    Tokens are grouped by expert, so each chosen expert's weights are read once; each token sums its X results in the
    order of the choice, so the sum does not depend on the other tokens.

    Shapes: up [E, F, Z], down [E, Z, F]; Z is the width that experts read and write (the latent width, or D); the
        result is [T, Z].
    Precision: the weighted sum is float32, cast once at the end.
    """
    num_chosen = experts_TX.shape[1]
    order, counts = _by_expert(experts_TX, up.shape[0])
    outputs = []
    for expert, rows in enumerate(order.split(counts)):
        if len(rows):
            up_SF = linear(input_TZ[rows // num_chosen], matrix_at(up, expert))
            outputs.append(linear(relu(up_SF).square(), matrix_at(down, expert)))
    sorted_SZ = torch.cat(outputs)
    results_TXZ = torch.empty_like(sorted_SZ).index_copy(0, order, sorted_SZ).unflatten(0, experts_TX.shape)
    return (results_TXZ.float() * weights_TX[:, :, None]).sum(dim=1).to(input_TZ.dtype)


def mix_experts_grouped(input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return `mix_experts_reference` of the same arguments, all experts in one product of torch, as GPUs want it.

    How many tokens an expert has stays on the device: nothing waits for the host.
    """
    num_chosen, chosen = experts_TX.shape[1], experts_TX.flatten()
    order_S = chosen.argsort(stable=True)
    counts_E = torch.zeros(len(up), dtype=torch.int32, device=chosen.device)
    counts_E.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    inner_SF = relu(grouped_mm(input_TZ[order_S // num_chosen], up.mT, offs=ends_E)).square()
    results_SZ = grouped_mm(inner_SF, down.mT, offs=ends_E)
    results_TXZ = torch.empty_like(results_SZ).index_copy(0, order_S, results_SZ).unflatten(0, experts_TX.shape)
    return (results_TXZ.float() * weights_TX[:, :, None]).sum(dim=1).to(input_TZ.dtype)


def mix_experts(input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor, up: Weight, down: Weight) -> Tensor:
    """Return `mix_experts_reference` of the same arguments, by the native kernels where no adapter is in the way.

    The bits are those of a whole block that the kernels run.

    Precision: float32 inside, and each gradient; they are rounded once, to the dtype of what they belong to.
    """
    if input_TZ.is_cuda and isinstance(up, Tensor) and isinstance(down, Tensor) and _can_group(up):
        return mix_experts_grouped(input_TZ, experts_TX, weights_TX, up, down)
    if kernels() is None or not input_TZ.is_cpu or matrix_of(up) is None or matrix_of(down) is None:
        return mix_experts_reference(input_TZ, experts_TX, weights_TX, up, down)
    mixed_TZ: Tensor = _Mix.apply(input_TZ.float(), experts_TX, weights_TX, up, down)  # type: ignore[no-untyped-call]
    return mixed_TZ.to(input_TZ.dtype)


def _can_group(up: Tensor) -> bool:
    """Return whether rows of these experts' matrices begin where torch's grouped product wants them: at 16 bytes."""
    return all(size * up.itemsize % 16 == 0 for size in up.shape[1:])


def _by_expert(experts_TX: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Return the choices of all tokens sorted by expert, tokens in order, and how many each expert has."""
    chosen = experts_TX.flatten()
    return chosen.argsort(stable=True), chosen.bincount(minlength=num_experts).tolist()


class _Mix(torch.autograd.Function):
    """Rows of all experts lie in one tensor, sorted by expert: S of them, T X."""

    @staticmethod
    def forward(ctx: Any, input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor, up: Weight, down: Weight) -> Tensor:
        order_S, counts = _by_expert(experts_TX, up.shape[0])
        input_SZ = input_TZ.index_select(0, order_S // experts_TX.shape[1])
        inner_SF, results_SZ = input_SZ.new_empty(len(order_S), up.shape[1]), torch.empty_like(input_SZ)
        for up_FZ, rows_SZ, out_SF in _each(counts, up, input_SZ, inner_SF):
            write_product(rows_SZ, up_FZ, out_SF)
        _native("activate", 0, inner_SF, inner_SF.numel(), inner_SF)
        for down_ZF, rows_SF, out_SZ in _each(counts, down, inner_SF, results_SZ):
            write_product(rows_SF, down_ZF, out_SZ)
        places_TX = torch.empty_like(experts_TX, dtype=torch.int32)
        places_TX.view(-1)[order_S] = torch.arange(len(order_S), dtype=torch.int32)
        weights_TX = weights_TX.contiguous()
        plain = [weight if isinstance(weight, Tensor) else None for weight in (up, down)]
        ctx.save_for_backward(input_TZ, inner_SF, order_S, places_TX, weights_TX, *plain)
        ctx.counts, ctx.packed = counts, (up, down) if plain == [None, None] else None
        return _summed_over_choices(results_SZ, places_TX, weights_TX)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input_TZ, inner_SF, order_S, places_TX, weights_TX, *plain = ctx.saved_tensors
        (out_TZ,), counts, (up, down) = gradients, ctx.counts, ctx.packed or plain
        *_, wants_up, wants_down = ctx.needs_input_grad
        tokens_S = order_S // weights_TX.shape[1]
        out_SZ, weights_S = out_TZ.index_select(0, tokens_S), weights_TX.flatten()[order_S]
        of_inner_SF, of_weights_S = torch.empty_like(inner_SF), torch.empty_like(weights_S)
        for down_ZF, rows_SZ, to_SF in _each(counts, down, out_SZ, of_inner_SF):
            torch.mm(rows_SZ, dense(down_ZF, torch.float32), out=to_SF)
        _native("squares_gradient", inner_SF, weights_S, *inner_SF.shape, of_inner_SF, of_weights_S)
        of_up_SF = of_inner_SF  # which it has become
        out_SZ.mul_(weights_S[:, None])
        of_down_EZF = _summed(counts, out_SZ, inner_SF, down) if wants_down else None
        of_up_EFZ = _summed(counts, of_up_SF, input_TZ.index_select(0, tokens_S), up) if wants_up else None
        of_input_SZ = out_SZ  # whose values are no longer wanted
        for up_FZ, rows_SF, to_SZ in _each(counts, up, of_up_SF, of_input_SZ):
            torch.mm(rows_SF, dense(up_FZ, torch.float32), out=to_SZ)
        of_input_TZ = _summed_over_choices(of_input_SZ, places_TX, torch.ones_like(weights_TX))
        return of_input_TZ, None, of_weights_S[places_TX.long()], of_up_EFZ, of_down_EZF


def _native(name: str, *arguments: Tensor | int) -> None:
    """Call a kernel with the addresses of tensors."""
    addresses = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(kernels(), name)(torch.get_num_threads(), *addresses)


def _summed_over_choices(results_SZ: Tensor, places_TX: Tensor, weights_TX: Tensor) -> Tensor:
    """Return the weighted sum [T, Z] of each token's results, which lie at these places."""
    out_TZ = results_SZ.new_empty(len(places_TX), results_SZ.shape[1])
    _native("sum_chosen", results_SZ, places_TX, weights_TX, *places_TX.shape, results_SZ.shape[1], out_TZ)
    return out_TZ


def _each(counts: Sequence[int], weights: Weight, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each expert's matrix and its part of sorted rows, of those experts that have any."""
    for expert, (count, *parts) in enumerate(zip(counts, *(tensor.split(counts) for tensor in rows), strict=True)):
        if count:
            yield matrix_at(weights, expert), *parts


def _summed(counts: Sequence[int], of_out: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of stacked matrices in their dtype: per expert the sum of outer products of its rows."""
    found = torch.zeros_like(like)
    for to, of_out_rows, in_rows in _each(counts, found, of_out, rows):
        if to.dtype is torch.float32:
            torch.mm(of_out_rows.mT, in_rows, out=to)
        else:
            to.copy_(of_out_rows.mT @ in_rows)
    return found
