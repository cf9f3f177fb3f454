"""The scan in chunks and the single step against the recurrence written out, values and gradients."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from torch.nn.functional import softplus

from freehold.ops.ssm import CHUNK_LENGTH, scan, scan_anew, scan_reference, scan_step, step_sizes

# float32: a chunk sums its sources in another order, and its decays are exponentials of differences of running sums.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
GRADIENT_TOLERANCE = {"rtol": 1e-3, "atol": 2e-4}

HEADS, HEAD_DIM, STATE = 4, 3, 5
LENGTHS = [1, 2, CHUNK_LENGTH - 1, CHUNK_LENGTH, CHUNK_LENGTH + 1, 2 * CHUNK_LENGTH, 2 * CHUNK_LENGTH + 7]


def random_scan(length, num_groups=2):
    """Return the arguments of a scan: steps from 1e-4 to 1, decays from slow to immediate."""
    dt_LH = torch.empty(length, HEADS).uniform_(math.log(1e-4), 0.0).exp()
    return (
        torch.randn(length, HEADS, HEAD_DIM),
        dt_LH,
        -torch.tensor([0.1, 1.0, 4.0, 16.0]),
        torch.randn(length, num_groups, STATE),
        torch.randn(length, num_groups, STATE),
        torch.randn(HEADS),
        torch.randn(HEADS, HEAD_DIM, STATE),
    )


def one_number_at_a_time(x_LHP, dt_LH, a_H, b_LGN, c_LGN, d_H, state_HPN):
    """The two formulas of the module with every index written out, in float64."""
    y_LHP, state = torch.zeros(x_LHP.shape, dtype=torch.float64), state_HPN.double()
    for t, h in ((t, h) for t in range(len(x_LHP)) for h in range(HEADS)):
        group = h // (HEADS // b_LGN.shape[1])
        decay = math.exp(float(dt_LH[t, h]) * float(a_H[h]))
        for p in range(HEAD_DIM):
            for n in range(STATE):
                state[h, p, n] = decay * state[h, p, n] + dt_LH[t, h] * x_LHP[t, h, p] * b_LGN[t, group, n]
            y_LHP[t, h, p] = state[h, p] @ c_LGN[t, group].double() + d_H[h] * x_LHP[t, h, p]
    return y_LHP.float(), state.float()


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_the_reference_is_the_formula(num_groups):
    arguments = random_scan(4, num_groups)
    torch.testing.assert_close(scan_reference(*arguments), one_number_at_a_time(*arguments), **TOLERANCE)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_in_chunks_is_the_reference(length, num_groups):
    arguments = random_scan(length, num_groups)
    torch.testing.assert_close(scan(*arguments), scan_reference(*arguments), **TOLERANCE)


PACKS = {
    "one-token": [1],
    "one-chunk": [5, CHUNK_LENGTH],
    "some-longer": [1, 3 * CHUNK_LENGTH + 1, 2, CHUNK_LENGTH, CHUNK_LENGTH + 1],
}


def one_after_the_other(arguments, starts):
    """The recurrence of each packed sequence on its own, from a state of zeros."""
    x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H = arguments
    spans = [slice(start, stop) for start, stop in pairwise(starts)]
    zeros = torch.zeros(HEADS, HEAD_DIM, STATE)
    return torch.cat([scan_reference(x_THP[s], dt_TH[s], a_H, b_TGN[s], c_TGN[s], d_H, zeros)[0] for s in spans])


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_the_scan_of_all_sequences_at_once_is_that_of_each(lengths, num_groups):
    *arguments, _ = random_scan(sum(lengths), num_groups)
    leaves = [argument.requires_grad_(True) for argument in arguments]
    starts = [0, *accumulate(lengths)]
    found, expected = scan_anew(*arguments, starts=starts), one_after_the_other(arguments, starts)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    weight_THP = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weight_THP).sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(*gradients, **GRADIENT_TOLERANCE)


def test_a_sequence_that_overflows_spoils_no_other():
    lengths = [70, CHUNK_LENGTH, 3]
    x_THP, *others, _ = random_scan(sum(lengths))
    expected = scan_anew(x_THP, *others, starts=[0, *accumulate(lengths)])
    x_THP[69] = torch.inf
    found = scan_anew(x_THP, *others, starts=[0, *accumulate(lengths)])
    torch.testing.assert_close(found[70:], expected[70:], **TOLERANCE)
    assert not found[69].isfinite().any()


@pytest.mark.parametrize("length", [1, CHUNK_LENGTH, CHUNK_LENGTH + 3])
def test_the_scan_in_chunks_has_the_gradients_of_the_reference(length):
    arguments = [t.requires_grad_(True) for t in random_scan(length)]
    weight_LHP, weight_HPN = torch.randn(length, HEADS, HEAD_DIM), torch.randn(HEADS, HEAD_DIM, STATE)

    def gradients(form):
        y_LHP, state_HPN = form(*arguments)
        return torch.autograd.grad((y_LHP * weight_LHP).sum() + (state_HPN * weight_HPN).sum(), arguments)

    torch.testing.assert_close(gradients(scan), gradients(scan_reference), **GRADIENT_TOLERANCE)


def test_a_step_of_several_sequences_is_the_reference_of_each():
    scans = [random_scan(1) for _ in range(3)]
    a_H, d_H = scans[0][2], scans[0][5]
    x_BHP, dt_BH, b_BGN, c_BGN = (torch.cat([s[i] for s in scans]) for i in (0, 1, 3, 4))
    y_BHP, state_BHPN = scan_step(x_BHP, dt_BH, a_H, b_BGN, c_BGN, d_H, torch.stack([s[6] for s in scans]))
    for b, (x_LHP, dt_LH, _, b_LGN, c_LGN, _, state_HPN) in enumerate(scans):
        expected = scan_reference(x_LHP, dt_LH, a_H, b_LGN, c_LGN, d_H, state_HPN)
        torch.testing.assert_close((y_BHP[b : b + 1], state_BHPN[b]), expected, **TOLERANCE)


def test_a_step_has_the_gradients_of_the_reference():
    arguments = [t.requires_grad_(True) for t in random_scan(1)]
    expected = torch.autograd.grad(scan_reference(*arguments)[0].square().sum(), arguments)
    x, dt, a, b, c, d, state = arguments
    found = torch.autograd.grad(scan_step(x, dt, a, b, c, d, state[None])[0].square().sum(), arguments)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("first", [1, CHUNK_LENGTH - 1, CHUNK_LENGTH, CHUNK_LENGTH + 1])
def test_a_scan_that_goes_on_from_its_state_is_the_whole(first):
    x, dt, a, b, c, d, state_HPN = random_scan(CHUNK_LENGTH + 9)
    whole = scan(x, dt, a, b, c, d, state_HPN)
    begin_LHP, state_HPN = scan(x[:first], dt[:first], a, b[:first], c[:first], d, state_HPN)
    end_LHP, state_HPN = scan(x[first:], dt[first:], a, b[first:], c[first:], d, state_HPN)
    torch.testing.assert_close((torch.cat((begin_LHP, end_LHP)), state_HPN), whole, **TOLERANCE)


def test_a_long_fast_decay_stays_finite():
    x, _, a, b, c, d, state = random_scan(4 * CHUNK_LENGTH)
    dt_LH = torch.full((4 * CHUNK_LENGTH, HEADS), 50.0, requires_grad=True)  # exp(-50 * 16) is zero in float32
    y_LHP, state_HPN = scan(x, dt_LH, a, b, c, d, state)
    (gradient,) = torch.autograd.grad(y_LHP.sum(), dt_LH)
    assert y_LHP.isfinite().all()
    assert state_HPN.isfinite().all()
    assert gradient.isfinite().all()


def test_a_step_of_size_zero_changes_no_state():
    x, dt, a, b, c, d, state_HPN = random_scan(3)
    _, found_HPN = scan(x, torch.zeros_like(dt), a, b, c, d, state_HPN)
    torch.testing.assert_close(found_HPN, state_HPN, rtol=0, atol=0)


def test_bfloat16_inputs_are_computed_in_float32():
    x, dt, a, b, c, d, state = random_scan(CHUNK_LENGTH + 1)
    rounded = (x.bfloat16(), dt, a, b.bfloat16(), c.bfloat16(), d, state)
    wide = (x.bfloat16().float(), dt, a, b.bfloat16().float(), c.bfloat16().float(), d, state)
    for form in (scan, scan_reference):
        y_LHP, state_HPN = form(*rounded)
        assert (y_LHP.dtype, state_HPN.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close((y_LHP, state_HPN), form(*wide), rtol=0, atol=0)


def test_step_sizes_are_softplus_in_float32_within_the_limit():
    dt_TH, bias_H = torch.randn(5, 4).bfloat16(), torch.randn(4)
    free_TH = step_sizes(dt_TH, bias_H, limit=(0.0, math.inf))
    assert free_TH.dtype is torch.float32
    torch.testing.assert_close(free_TH, softplus(dt_TH.float() + bias_H), rtol=0, atol=0)
    assert torch.equal(step_sizes(dt_TH, bias_H, limit=(0.3, 0.8)), free_TH.clamp(0.3, 0.8))
