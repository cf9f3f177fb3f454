"""The router and the experts against a loop over tokens, written out."""

import math

import pytest
import torch

from freehold.ops.moe import (
    balance_loss,
    count_chosen,
    mix_experts,
    mix_experts_grouped,
    mix_experts_reference,
    route,
    route_reference,
    router_logits,
)
from models.forms import needs_kernels, on_threads, same_bits

# float32: products of a few rows at once may sum in another order than those of one row.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
TOKENS, WIDTH, EXPERTS = 9, 6, 8


def route_one(hidden, gate_ED, correction_E, *, num_chosen, num_groups, num_chosen_groups, normalize_weights, scale):
    """The choice for one token, with lists."""
    scores = [1 / (1 + math.exp(-float(hidden.float() @ row))) for row in gate_ED.float()]
    corrected = [score + float(c) for score, c in zip(scores, correction_E, strict=True)]
    members = len(scores) // num_groups
    ranks = [sum(sorted(corrected[g * members : (g + 1) * members])[-2:]) for g in range(num_groups)]
    best = sorted(range(num_groups), key=lambda g: -ranks[g])[:num_chosen_groups]
    eligible = [e for e in range(len(scores)) if e // members in best]
    chosen = sorted(eligible, key=lambda e: -corrected[e])[:num_chosen]
    total = sum(scores[e] for e in chosen) + 1e-20 if normalize_weights else 1.0
    return {e: scores[e] / total * scale for e in chosen}


SETTINGS = {
    "plain": {"num_chosen": 3},
    "one-expert": {"num_chosen": 1},
    "all-experts": {"num_chosen": EXPERTS},
    "not-normalized": {"num_chosen": 3, "normalize_weights": False},
    "one-of-two-groups": {"num_chosen": 3, "num_groups": 2, "num_chosen_groups": 1},
    "two-of-four-groups": {"num_chosen": 3, "num_groups": 4, "num_chosen_groups": 2},
    "all-groups": {"num_chosen": 3, "num_groups": 4, "num_chosen_groups": 4},
}
DEFAULTS = {"num_groups": 1, "num_chosen_groups": 1, "normalize_weights": True, "scale": 2.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_token_gets_the_experts_and_weights_of_the_loop(settings, dtype):
    hidden_TD, gate_ED = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(EXPERTS, WIDTH)
    correction_E = 0.3 * torch.randn(EXPERTS)
    experts_TX, weights_TX = route(router_logits(hidden_TD, gate_ED), correction_E, **(DEFAULTS | settings))
    assert weights_TX.dtype is torch.float32
    for hidden_D, experts, weights in zip(hidden_TD, experts_TX.tolist(), weights_TX.tolist(), strict=True):
        expected = route_one(hidden_D, gate_ED, correction_E, **(DEFAULTS | settings))
        assert dict(zip(experts, weights, strict=True)) == pytest.approx(expected, rel=1e-5)


def test_the_correction_chooses_and_does_not_weigh():
    hidden_TD, gate_ED = torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, WIDTH)
    settings = DEFAULTS | {"num_chosen": 1, "normalize_weights": False, "scale": 1.0}
    experts_TX, weights_TX = route(router_logits(hidden_TD, gate_ED), torch.eye(EXPERTS)[5] * 9.0, **settings)
    assert experts_TX.flatten().tolist() == [5] * TOKENS
    torch.testing.assert_close(weights_TX[:, 0], torch.sigmoid(hidden_TD @ gate_ED[5]), **TOLERANCE)


def test_a_correction_around_a_large_offset_keeps_its_differences():
    hidden_TD, gate_ED, correction_E = torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, WIDTH), torch.rand(EXPERTS)
    settings = DEFAULTS | {"num_chosen": 3}
    near = route(router_logits(hidden_TD, gate_ED), correction_E, **settings)
    assert torch.equal(near[0], route(router_logits(hidden_TD, gate_ED), correction_E + 64.0, **settings)[0])


def random_experts(width=WIDTH, inner=10, num_chosen=3):
    up_EFZ, down_EZF = torch.randn(EXPERTS, inner, width), torch.randn(EXPERTS, width, inner)
    experts_TX = torch.stack([torch.randperm(EXPERTS)[:num_chosen] for _ in range(TOKENS)])
    return torch.randn(TOKENS, width), experts_TX, torch.rand(TOKENS, num_chosen), up_EFZ, down_EZF


def mix_one_by_one(input_TZ, experts_TX, weights_TX, up_EFZ, down_EZF):
    rows = []
    for token, experts in enumerate(experts_TX.tolist()):
        row = torch.zeros_like(input_TZ[token])
        for place, expert in enumerate(experts):
            inner = up_EFZ[expert] @ input_TZ[token]
            row = row + weights_TX[token, place] * (down_EZF[expert] @ inner.clamp(min=0).square())
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("num_chosen", [1, 3, EXPERTS])
def test_the_mix_is_the_weighted_sum_of_each_tokens_experts(num_chosen):
    arguments = random_experts(num_chosen=num_chosen)
    torch.testing.assert_close(mix_experts(*arguments), mix_one_by_one(*arguments), rtol=1e-4, atol=1e-4)


def test_experts_that_nobody_chose_may_hold_anything():
    input_TZ, _, weights_TX, up_EFZ, down_EZF = random_experts()
    up_EFZ[3:] = torch.nan
    experts_TX = torch.tensor([[2, 0, 1]] * TOKENS)
    assert mix_experts(input_TZ, experts_TX, weights_TX, up_EFZ, down_EZF).isfinite().all()


def test_gradients_equal_those_of_the_loop():
    input_TZ, experts_TX, *weights = random_experts()
    inputs = [t.requires_grad_(True) for t in (input_TZ, *weights)]
    found = torch.autograd.grad(mix_experts(input_TZ, experts_TX, *weights).square().sum(), inputs)
    expected = torch.autograd.grad(mix_one_by_one(input_TZ, experts_TX, *weights).square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)  # gradients reach 1e4


def test_a_token_has_the_same_values_alone_and_among_others():
    input_TZ, experts_TX, weights_TX, up_EFZ, down_EZF = random_experts()
    together_TZ = mix_experts(input_TZ, experts_TX, weights_TX, up_EFZ, down_EZF)
    for t in range(TOKENS):
        row = slice(t, t + 1)
        alone_TZ = mix_experts(input_TZ[row], experts_TX[row], weights_TX[row], up_EFZ, down_EZF)
        torch.testing.assert_close(alone_TZ[0], together_TZ[t], rtol=1e-4, atol=1e-4)


@needs_kernels
def test_bfloat16_experts_meet_float32_inside_and_their_sum_is_rounded_once():
    input_TZ, experts_TX, weights_TX, up_EFZ, down_EZF = random_experts()
    bf16 = [t.bfloat16() for t in (input_TZ, up_EFZ, down_EZF)]
    out_TZ = mix_experts(bf16[0], experts_TX, weights_TX, *bf16[1:])
    wide = [t.float() for t in bf16]
    expected_TZ = mix_experts(wide[0], experts_TX, weights_TX, *wide[1:])
    assert out_TZ.dtype is torch.bfloat16
    assert same_bits(out_TZ, expected_TZ.bfloat16())


# Gradients against the references in float64, relative to the largest of each tensor: sums of float32 products.
GRADIENTS = 2e-6


def gradients_of(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def assert_gradients_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max().clamp(min=1e-6))
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=GRADIENTS * scale)


def mix_in_float64(experts_TX, tensors):
    wide = [t.detach().double().requires_grad_(True) for t in tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return gradients_of(mix_experts_reference(wide[0], experts_TX, *wide[1:]), wide)


def mix_by_kernels(experts_TX, tensors):
    inputs = [t.requires_grad_(True) for t in tensors]
    return gradients_of(mix_experts(inputs[0], experts_TX, *inputs[1:]), inputs)


@needs_kernels
@pytest.mark.parametrize(("width", "inner"), [(6, 10), (16, 48), (33, 17), (64, 24)])
@pytest.mark.parametrize("num_chosen", [1, 3, EXPERTS])
def test_gradients_of_the_mix_are_those_of_the_reference_in_float64(num_chosen, width, inner):
    input_TZ, experts_TX, *tensors = random_experts(width, inner, num_chosen)
    assert_gradients_close(
        mix_by_kernels(experts_TX, [input_TZ, *tensors]), mix_in_float64(experts_TX, [input_TZ, *tensors])
    )


@needs_kernels
@pytest.mark.parametrize("experts_TX", [[[5, 2]], [[7, 0]] * TOKENS], ids=["one-token", "two-experts-for-all"])
def test_experts_that_nobody_chose_have_gradients_of_zero(experts_TX):
    experts_TX = torch.tensor(experts_TX)
    input_TZ, _, weights_TX, up_EFZ, down_EZF = random_experts(num_chosen=2)
    tensors = [input_TZ[: len(experts_TX)], weights_TX[: len(experts_TX)], up_EFZ, down_EZF]
    found = mix_by_kernels(experts_TX, tensors)
    assert_gradients_close(found, mix_in_float64(experts_TX, tensors))
    idle = sorted(set(range(EXPERTS)) - set(experts_TX.flatten().tolist()))
    assert not any(gradient[idle].any() for gradient in found[2:])


@needs_kernels
def test_the_number_of_threads_changes_no_bit_of_the_mix():
    input_TZ, experts_TX, *tensors = random_experts(width=48, inner=80)
    found = []
    for num_threads in (1, 2, 3):
        with on_threads(num_threads):
            found.append(mix_experts(input_TZ, experts_TX, *tensors))
    assert all(same_bits(other, found[0]) for other in found[1:])


@needs_kernels
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_of_the_router_are_those_of_the_reference_in_float64(settings):
    hidden_TD, gate_ED = torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, WIDTH)
    correction_E = 0.3 * torch.randn(EXPERTS)
    inputs = [t.requires_grad_(True) for t in (hidden_TD, gate_ED)]
    experts_TX, weights_TX = route(router_logits(*inputs), correction_E, **(DEFAULTS | settings))
    found = gradients_of(weights_TX, inputs)
    wide = [t.detach().double().requires_grad_(True) for t in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected_TX, wide_TX = route_reference(router_logits(*wide), correction_E, **(DEFAULTS | settings))
        expected = gradients_of(wide_TX, wide)
    assert torch.equal(experts_TX, expected_TX)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


# How even the choice is.


def balance_of_one(scores_LE, experts_LX):
    """The loss of one sequence as the paper writes it, with lists: the sum over experts of f times P."""
    (length, num_experts), num_chosen = scores_LE.shape, experts_LX.shape[1]
    total = 0.0
    for expert in range(num_experts):
        chosen = sum(expert in row for row in experts_LX.tolist())
        share = sum(float(row[expert]) / float(row.sum()) for row in scores_LE)
        total += num_experts / (num_chosen * length) * chosen * share / length
    return total


def choices(experts_TX, spans):
    return count_chosen(experts_TX, num_experts=EXPERTS, spans=spans)


def random_choice(num_tokens):
    hidden_TD, gate_ED = torch.randn(num_tokens, WIDTH), torch.randn(EXPERTS, WIDTH)
    experts_TX, _ = route(router_logits(hidden_TD, gate_ED), torch.zeros(EXPERTS), **(DEFAULTS | {"num_chosen": 3}))
    return router_logits(hidden_TD, gate_ED).sigmoid(), experts_TX


def test_the_balance_loss_is_that_of_each_sequence_times_its_tokens():
    scores_TE, experts_TX = random_choice(TOKENS)
    spans = [(0, 4), (4, 5), (5, TOKENS)]
    expected = sum((b - a) * balance_of_one(scores_TE[a:b], experts_TX[a:b]) for a, b in spans)
    assert float(balance_loss(scores_TE, choices(experts_TX, spans), spans=spans)) == pytest.approx(expected, rel=1e-5)


def test_an_even_choice_costs_one_a_token_and_one_that_scores_follow_costs_more():
    even_TE, experts_TX = torch.full((EXPERTS, EXPERTS), 0.5), torch.arange(EXPERTS)[:, None]
    span = [(0, EXPERTS)]
    assert float(balance_loss(even_TE, choices(experts_TX, span), spans=span)) == pytest.approx(EXPERTS)
    favoured_TE = torch.full((EXPERTS, EXPERTS), 0.1).index_fill(1, torch.tensor([2]), 0.9)
    assert float(balance_loss(favoured_TE, choices(torch.full((EXPERTS, 1), 2), span), spans=span)) > 2 * EXPERTS


def test_the_balance_loss_moves_the_scores_of_a_favoured_expert_down():
    scores_TE, experts_TX = random_choice(TOKENS)
    experts_TX[:, 0] = 5
    spans = [(0, TOKENS)]
    (gradient_TE,) = torch.autograd.grad(
        balance_loss(scores_TE.requires_grad_(True), choices(experts_TX, spans), spans=spans), scores_TE
    )
    assert (gradient_TE[:, 5] > 0).all()


@pytest.mark.parametrize("num_chosen", [1, 3])
def test_experts_in_one_product_are_the_reference_also_where_some_have_no_token(num_chosen):
    width, inner = 16, 32  # whose rows begin where a grouped product wants them
    input_TZ, up, down = (
        torch.randn(TOKENS, width),
        torch.randn(EXPERTS, inner, width),
        torch.randn(EXPERTS, width, inner),
    )
    experts_TX = torch.rand(TOKENS, EXPERTS - 2).topk(num_chosen).indices + 1  # the first and the last are idle
    leaves = [tensor.requires_grad_(True) for tensor in (input_TZ, torch.rand(TOKENS, num_chosen), up, down)]
    input_TZ, weights_TX, up, down = leaves
    found, expected = (
        mix(input_TZ, experts_TX, weights_TX, up, down) for mix in (mix_experts_grouped, mix_experts_reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight_TZ = torch.randn_like(found)
    gradients = [torch.autograd.grad((mixed * weight_TZ).sum(), leaves) for mixed in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
