"""The corrections of routers: one move for each step, by the counts of the whole global batch, MTP's too."""

from math import inf

import pytest
import torch
from torch import Tensor

from freehold.models.decoder import Decoder
from freehold.models.moe import Moe
from freehold.ops.moe import router_logits
from freehold.train.balance import all_blocks, correct_routers, count_choices, new_loads, worst_violation
from freehold.train.batch import Batch
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.step import Objective, train_step
from models.forms import needs_kernels, running, same_bits
from models.tiny import LATENT, LLAMA, MTP, NEMOTRON
from train.steps import LENGTHS, batch_of, step_on, training

RATE = 1e-3
DEEP = MTP | {"hybrid_override_pattern": "EM-E"}
OBJECTIVE = Objective(correction_rate=RATE, max_gradient_norm=inf)


def corrections(decoder: Decoder) -> list[Tensor]:
    mixers = [block.mixer for block in all_blocks(decoder) if isinstance(block.mixer, Moe)]
    return [mixer.gate.e_score_correction_bias.detach().clone() for mixer in mixers]


def moves(decoder: Decoder, batches: list[Batch], objective: Objective = OBJECTIVE) -> list[Tensor]:
    """Return what a step adds to each correction, in units of the rate. Mutates: decoder."""
    before = corrections(decoder)
    step_on(decoder, batches, objective=objective)
    return [(after - b) / objective.correction_rate for after, b in zip(corrections(decoder), before, strict=True)]


def test_a_correction_rises_where_fewer_chose_than_the_mean_and_falls_where_more_did():
    decoder = training(NEMOTRON)
    (before,) = corrections(decoder)
    correct_routers(decoder, [torch.tensor([4, 5, 6, 5, 5, 5, 0, 10])], RATE)
    (after,) = corrections(decoder)
    signs = torch.tensor([1.0, 0, -1, 0, 0, 0, 1, -1])
    torch.testing.assert_close(after - before, RATE * signs, rtol=1e-3, atol=0)


def test_counts_are_exact_where_float32_would_round_them():
    decoder = training(NEMOTRON)
    (before,) = corrections(decoder)
    correct_routers(decoder, [torch.full((8,), 2**30) + torch.tensor([1, -1, 0, 0, 0, 0, 0, 0])], RATE)
    assert (corrections(decoder)[0] - before).sign().tolist() == [-1.0, 1.0] + [0.0] * 6


def test_each_correction_moves_once_in_a_step_mtp_included():
    found = moves(training(DEEP), [batch_of((length,)) for length in LENGTHS])
    assert len(found) == 3
    for moved in found:
        assert moved.count_nonzero() > 0
        torch.testing.assert_close(moved, moved.sign(), rtol=1e-2, atol=1e-2)


DIVISIONS = {
    "whole": [LENGTHS],
    "two": [LENGTHS[:3], LENGTHS[3:]],
    "one-each": [(length,) for length in LENGTHS],
}
WAYS = {"kernels": ("auto", False), "references": ("off", False), "recomputed": ("off", True)}


@needs_kernels
@pytest.mark.parametrize("division", DIVISIONS.values(), ids=DIVISIONS)
@pytest.mark.parametrize(("form", "recomputes"), WAYS.values(), ids=WAYS)
def test_corrections_do_not_depend_on_accumulation_recompute_or_kernels(form, recomputes, division):
    expected = training(DEEP)
    step_on(expected, [batch_of()], objective=OBJECTIVE)
    decoder = training(DEEP)
    for block in all_blocks(decoder):
        block.recomputes = recomputes
    if form == "off":
        with running("off"):
            step_on(decoder, [batch_of(lengths) for lengths in division], objective=OBJECTIVE)
    else:
        step_on(decoder, [batch_of(lengths) for lengths in division], objective=OBJECTIVE)
    assert all(same_bits(a, b) for a, b in zip(corrections(decoder), corrections(expected), strict=True))


def test_counts_are_of_every_token_once():
    decoder, batch = training(DEEP), batch_of()
    loads = new_loads(decoder)
    decoder(batch.tokens_T, batch.layout, loads[:4])
    first, second, of_mtp = count_choices(loads)
    assert int(first.sum()) == int(second.sum()) == 3 * batch.layout.num_tokens
    assert int(of_mtp.sum()) == 0


def test_a_load_is_one_product_of_the_router(monkeypatch):
    (load, *_), mixer, products = new_loads(training(DEEP)), training(DEEP).blocks[0].mixer, []

    def counted(*factors: Tensor) -> Tensor:
        products.append(factors)
        return router_logits(*factors)

    monkeypatch.setattr("freehold.models.moe.router_logits", counted)
    mixer.add_load(torch.randn(9, 32), batch_of((5, 4)).layout, load)
    assert len(products) == 1
    assert int(load.counts.sum()) == 3 * 9
    load.balance.backward()
    assert mixer.gate.weight.grad.count_nonzero()


def test_blocks_below_a_frozen_router_are_corrected_too():
    decoder = training(DEEP)
    decoder.blocks[0].requires_grad_(False)
    assert all(moved.count_nonzero() for moved in moves(decoder, [batch_of()]))


def test_blocks_that_no_token_reached_stay():
    found = moves(training(DEEP), [batch_of()], Objective(mtp_depths=0, correction_rate=RATE))
    assert [bool(moved.any()) for moved in found] == [True, True, False]


def test_a_rate_of_zero_leaves_corrections_as_they_are():
    decoder = training(LATENT)
    before = corrections(decoder)
    step_on(decoder, [batch_of()], objective=Objective(correction_rate=0.0))
    assert all(same_bits(a, b) for a, b in zip(before, corrections(decoder), strict=True))


def test_the_optimizer_never_touches_a_correction():
    decoder = training(NEMOTRON)
    before = corrections(decoder)
    optimizer, objective = Optimizer(decoder, OptimizerSettings(weight_decay=0.5)), Objective(correction_rate=0.0)
    for number in range(3):
        train_step(decoder, optimizer, [batch_of()], number=number, learning_rate=0.1, objective=objective)
    assert all(same_bits(a, b) for a, b in zip(before, corrections(decoder), strict=True))
    assert not any("correction" in name for name in optimizer.tensors())


def test_steps_even_out_a_load_that_one_expert_had():
    decoder = training(NEMOTRON | {"hybrid_override_pattern": "E"})
    decoder.requires_grad_(False).norm.requires_grad_(True)
    with torch.no_grad():
        decoder.blocks[0].mixer.gate.e_score_correction_bias[3] += 0.5
    optimizer, objective = Optimizer(decoder, OptimizerSettings()), Objective(correction_rate=0.05)
    found = [
        train_step(decoder, optimizer, [batch_of()], number=i, learning_rate=0.0, objective=objective).worst_violation
        for i in range(20)
    ]
    assert found[0] > 1.0
    assert min(found[-5:]) < 0.6 * found[0]


def test_the_balance_loss_alone_moves_the_router():
    """Its part of the gradient is what its weight makes of it."""

    def gradient(weight: float) -> Tensor:
        objective = Objective(balance_weight=weight, max_gradient_norm=inf)
        return step_on(training(NEMOTRON), [batch_of()], objective=objective)[1]["blocks.3.mixer.gate.weight"]

    without, one, two = gradient(0.0), gradient(1.0), gradient(2.0)
    assert (one - without).norm() > 0
    torch.testing.assert_close(two - without, 2 * (one - without), rtol=1e-3, atol=1e-6)


def test_an_even_load_violates_nothing_and_a_model_without_experts_neither():
    assert worst_violation([torch.tensor([5, 5, 5]), torch.tensor([0, 0, 0])]) == 0.0
    assert worst_violation([torch.tensor([5, 5, 5]), torch.tensor([6, 0, 0])]) == pytest.approx(2.0)
    assert count_choices(new_loads(training(LLAMA))) == ()
