"""Gradients through the forward without state: every kind of block, both dtypes, and no way between sequences."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from freehold.evaluate.laws import relative_difference
from freehold.models.layout import Layout
from models.forms import running, same_bits
from models.tiny import CONFIGS, LLAMA, NEMOTRON, QWEN, random_tokens, tiny_decoder

LENGTH = 12
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
FAMILIES = {"llama": LLAMA, "qwen": QWEN, "nemotron": NEMOTRON}

# A central difference in float32: the loss, about 10, is rounded to 1e-6. A larger step changes the choice of experts.
STEP = 3e-4
DIFFERENCE_RTOL = 2e-2
# bfloat16 gradients: a relative rounding of 4e-3 at each of some thirty operations.
BFLOAT16_TOLERANCE = 0.1
# The gradient of a sequence alone and among others: sums in another order; 1.3e-5 at most, where the scan's decays are
# small sums of large terms.
FLOAT32_TOLERANCE = 3e-5


def loss_of(decoder, tokens_T, layout, targets_T):
    return cross_entropy(decoder.logits(decoder(tokens_T, layout)), targets_T)


@ALL
def test_the_gradient_along_a_direction_is_the_difference_of_the_loss(config):
    decoder, tokens_L, layout = (
        tiny_decoder(config).requires_grad_(True),
        random_tokens(LENGTH),
        Layout.packed([LENGTH]),
    )
    loss_of(decoder, tokens_L, layout, tokens_L.roll(-1)).backward()
    parameters = [p for p in decoder.parameters() if p.grad is not None]
    scale = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    directions = [p.grad / scale for p in parameters]  # the steepest, where rounding matters least
    losses = []
    with torch.no_grad():
        for step in (STEP, -2 * STEP):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
            losses.append(float(loss_of(decoder, tokens_L, layout, tokens_L.roll(-1))))
    assert (losses[0] - losses[1]) / (2 * STEP) == pytest.approx(float(scale), rel=DIFFERENCE_RTOL)


@ALL
def test_bfloat16_gradients_are_those_of_float32_with_its_rounding(config):
    gradients = []
    for decoder in (tiny_decoder(config), rounded_decoder(config), tiny_decoder(config, dtype=torch.bfloat16)):
        decoder.requires_grad_(True)
        loss_of(decoder, random_tokens(LENGTH), Layout.packed([LENGTH]), random_tokens(LENGTH, seed=1)).backward()
        gradients.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    _, rounded, found = gradients
    assert found.keys() == rounded.keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(gradient.count_nonzero() for gradient in found.values())
    flat = [torch.cat([g[n].float().flatten() for n in sorted(found)]) for g in (found, rounded)]
    assert relative_difference(*flat) <= BFLOAT16_TOLERANCE


def rounded_decoder(config):
    """Return the float32 decoder with the weights of the bfloat16 one."""
    decoder, rounded = tiny_decoder(config), tiny_decoder(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for wide, narrow in zip(decoder.parameters(), rounded.parameters(), strict=True):
            wide.copy_(narrow)
    return decoder


@ALL
def test_parameters_that_stay_float32_have_float32_gradients(config):
    decoder = tiny_decoder(config, dtype=torch.bfloat16).requires_grad_(True)
    loss_of(decoder, random_tokens(LENGTH), Layout.packed([LENGTH]), random_tokens(LENGTH, seed=1)).backward()
    dtypes = {name.rpartition(".")[2]: p.grad.dtype for name, p in decoder.named_parameters() if p.grad is not None}
    assert {dtypes.get(name, torch.float32) for name in ("A_log", "D", "dt_bias")} == {torch.float32}
    assert dtypes["weight"] is torch.bfloat16


@ALL
def test_no_gradient_flows_to_packed_neighbours(config):
    """The loss of the middle sequence gives exactly zero for the embeddings of tokens that only its neighbours have."""
    decoder = tiny_decoder(config | {"tie_word_embeddings": False}).requires_grad_(True)
    subject_L = random_tokens(LENGTH, vocab_size=30)
    others = [30 + random_tokens(length, vocab_size=60, seed=length) for length in (5, 8)]
    layout = Layout.packed([5, LENGTH, 8])
    hidden_TD = decoder(torch.cat((others[0], subject_L, others[1])), layout)
    cross_entropy(decoder.logits(hidden_TD[5 : 5 + LENGTH]), subject_L.roll(-1)).backward()
    packed = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    assert packed["embeddings.weight"][30:].count_nonzero() == 0
    decoder.zero_grad()
    loss_of(decoder, subject_L, Layout.packed([LENGTH]), subject_L.roll(-1)).backward()
    for name, parameter in decoder.named_parameters():
        if parameter.grad is not None:
            assert relative_difference(packed[name], parameter.grad) <= FLOAT32_TOLERANCE, name


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_gradients_of_packed_sequences_add_up(config):
    decoder, lengths = tiny_decoder(config).requires_grad_(True), [3, 7, 1]
    sequences = [random_tokens(length, seed=length) for length in lengths]
    summed = sum(
        cross_entropy(decoder.logits(decoder(s, Layout.packed([len(s)]))), s.flip(0), reduction="sum")
        for s in sequences
    )
    parameters = [p for name, p in decoder.named_parameters() if not name.endswith("e_score_correction_bias")]
    expected = torch.autograd.grad(summed, parameters)
    logits_TV = decoder.logits(decoder(torch.cat(sequences), Layout.packed(lengths)))
    targets_T = torch.cat([s.flip(0) for s in sequences])
    found = torch.autograd.grad(cross_entropy(logits_TV, targets_T, reduction="sum"), parameters)
    assert max(relative_difference(a, b) for a, b in zip(found, expected, strict=True)) <= FLOAT32_TOLERANCE


def test_a_gradient_may_follow_a_forward_in_inference_mode():
    """The table of RoPE's angles is kept between steps, and must not remember how it was made."""
    config = LLAMA | {"rope_theta": 12345.0}  # a table that no other test has made
    decoder, tokens_L = tiny_decoder(config).requires_grad_(True), random_tokens(LENGTH)
    with torch.inference_mode():
        decoder(tokens_L, Layout.packed([LENGTH]))
    loss_of(decoder, tokens_L, Layout.packed([LENGTH]), tokens_L).backward()
    assert decoder.blocks[0].mixer.q_proj.weight.grad.count_nonzero() > 0


@ALL
def test_blocks_that_compute_once_more_have_the_same_gradients(config):
    gradients = []
    for recomputes in (False, True):
        decoder, tokens_L = tiny_decoder(config).requires_grad_(True), random_tokens(LENGTH)
        for block in decoder.blocks:
            block.recomputes = recomputes
        with running("off"):
            loss_of(decoder, tokens_L, Layout.packed([5, LENGTH - 5]), tokens_L.roll(-1)).backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    kept, recomputed = gradients
    assert kept.keys() == recomputed.keys()
    assert [name for name in kept if not same_bits(kept[name], recomputed[name])] == []


def num_kept(*, recomputes: bool) -> int:
    """Return how many activations a block keeps for its gradient."""
    block, saved = tiny_decoder(NEMOTRON).requires_grad_(True).blocks[0], []
    block.recomputes = recomputes
    with running("off"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(torch.randn(LENGTH, 32), Layout.packed([LENGTH]), None)
    return sum(t.numel() for t in saved if not isinstance(t, torch.nn.Parameter))


def test_a_block_that_computes_once_more_keeps_its_input_alone():
    assert num_kept(recomputes=False) > 5 * LENGTH * 32
    assert num_kept(recomputes=True) <= LENGTH * 32
