"""The causal convolution against torch's conv1d, and any split of a sequence against the whole."""

import pytest
import torch
from torch.nn.functional import conv1d, silu

from freehold.ops.conv import causal_conv, causal_conv_anew, causal_conv_step

# float32: four products and a bias, added in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
CHANNELS = 32  # whole vectors, as in every model: torch computes what is left over by scalar code with other roundings


def random_conv(length, num_taps=4):
    x_LC, tail_VC = torch.randn(length, CHANNELS), torch.randn(num_taps - 1, CHANNELS)
    return x_LC, tail_VC, torch.randn(CHANNELS, num_taps), torch.randn(CHANNELS)


def by_torch(x_LC, tail_VC, weight_CW, bias_C):
    rows_CL = torch.cat((tail_VC, x_LC)).T
    return silu(conv1d(rows_CL[None], weight_CW[:, None], bias_C, groups=CHANNELS))[0].T


@pytest.mark.parametrize("num_taps", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 11])
def test_values_and_tail_are_those_of_conv1d(length, num_taps):
    x_LC, tail_VC, weight_CW, bias_C = random_conv(length, num_taps)
    out_LC, new_VC = causal_conv(x_LC, tail_VC, weight_CW, bias_C)
    torch.testing.assert_close(out_LC, by_torch(x_LC, tail_VC, weight_CW, bias_C), **TOLERANCE)
    assert torch.equal(new_VC, torch.cat((tail_VC, x_LC))[-(num_taps - 1) :])


def test_the_last_tap_is_on_the_current_token():
    x_LC, tail_VC, weight_CW, bias_C = random_conv(5)
    weight_CW[:, :-1] = 0
    out_LC, _ = causal_conv(x_LC, tail_VC, weight_CW, bias_C)
    torch.testing.assert_close(out_LC, silu(x_LC * weight_CW[:, -1] + bias_C), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("first", range(1, 7))
def test_any_split_gives_the_same_bits(first, dtype):
    x_LC, tail_VC, weight_CW, bias_C = (t.to(dtype) for t in random_conv(7))
    whole_LC, last_VC = causal_conv(x_LC, tail_VC, weight_CW, bias_C)
    begin_LC, between_VC = causal_conv(x_LC[:first], tail_VC, weight_CW, bias_C)
    end_LC, found_VC = causal_conv(x_LC[first:], between_VC, weight_CW, bias_C)
    assert torch.equal(torch.cat((begin_LC, end_LC)), whole_LC)
    assert torch.equal(found_VC, last_VC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_of_several_sequences_give_the_bits_of_each_alone(dtype):
    convs = [random_conv(1) for _ in range(3)]
    weight_CW, bias_C = (t.to(dtype) for t in convs[0][2:])
    x_BC, tail_BVC = torch.cat([c[0] for c in convs]).to(dtype), torch.stack([c[1] for c in convs]).to(dtype)
    out_BC, new_BVC = causal_conv_step(x_BC, tail_BVC, weight_CW, bias_C)
    for b in range(3):
        out_LC, new_VC = causal_conv(x_BC[b : b + 1], tail_BVC[b], weight_CW, bias_C)
        assert torch.equal(out_BC[b], out_LC[0])
        assert torch.equal(new_BVC[b], new_VC)


def test_bfloat16_is_rounded_once():
    arguments = [t.bfloat16() for t in random_conv(9)]
    out_LC, tail_VC = causal_conv(*arguments)
    expected_LC, _ = causal_conv(*(t.float() for t in arguments))
    assert tail_VC.dtype is torch.bfloat16
    assert torch.equal(out_LC, expected_LC.bfloat16())


def test_gradients_equal_those_of_conv1d():
    arguments = [t.requires_grad_(True) for t in random_conv(6)]
    found = torch.autograd.grad(causal_conv(*arguments)[0].square().sum(), arguments)
    expected = torch.autograd.grad(by_torch(*arguments).square().sum(), arguments)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("num_taps", [2, 4])
def test_packed_sequences_do_not_see_each_other_nor_what_they_overflow_with(num_taps):
    lengths = [1, 5, 2, 3]
    x_TC, _, weight_CW, bias_C = random_conv(sum(lengths), num_taps)
    x_TC[5] = torch.inf
    nothing_YC = torch.zeros(num_taps - 1, CHANNELS)
    expected = torch.cat([causal_conv(x_LC, nothing_YC, weight_CW, bias_C)[0] for x_LC in x_TC.split(lengths)])
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    found = causal_conv_anew(x_TC, weight_CW, bias_C, positions_T)
    torch.testing.assert_close(found, expected, equal_nan=True, **TOLERANCE)
    assert found[6:].isfinite().all()
