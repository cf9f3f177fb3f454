"""What lies between the projections of a Mamba-2 mixer: the kernels' forward and backward against the reference."""

import math

import pytest
import torch

from freehold.ops.mamba2 import Mamba2Sizes, can_take, mix, mix_reference
from models.forms import FORMS, needs_kernels, needs_two_forms, on_threads, running, same_bits

# Against the reference in float64, relative to the largest value of each tensor: sums over a chunk, a state and all
# tokens in float32; 4e-6 and 4e-5 at most. A gradient loses digits where the norm takes back what scaled its group as a
# whole, which is most of it in a small group and where decays leave a token to itself.
VALUES, GRADIENTS, LONELY_GRADIENTS = 1e-5, 1e-4, 2e-4
# How much farther from float64 than those of the reference in float32.
FARTHER = 2

NAMES = ("projected", "conv_weight", "conv_bias", "norm_weight", "a_log", "d", "dt_bias")
# Around the chunks of 64 tokens and the lanes of 16, alone and packed.
LENGTHS = {
    "one-token": [1],
    "two-taps": [2],
    "below-lanes": [15],
    "a-chunk": [64],
    "above-a-chunk": [65],
    "chunks": [200],
    "packed": [1, 3, 64, 17, 130, 2],
}
SIZES = {
    "plain": {},
    "one-group": {"num_groups": 1},
    "own-groups": {"num_groups": 4},
    "wide-state": {"head_dim": 16, "state_size": 48},
    "wide-head": {"head_dim": 48, "state_size": 16, "num_groups": 1},
    "two-taps": {"conv_kernel": 2},
    "limited": {"step_limit": (0.02, 0.5)},
}
DEFAULTS = {
    "num_heads": 4,
    "head_dim": 32,
    "state_size": 32,
    "num_groups": 2,
    "conv_kernel": 4,
    "norm_eps": 1e-5,
    "step_limit": (0.0, math.inf),
}


def sizes_with(**changes):
    return Mamba2Sizes(**(DEFAULTS | changes))


def starts_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def random_mix(sizes, lengths, dtype=torch.float32):
    """Return the arguments of a mix: steps from 1e-3 to 1, decays from slow to fast."""
    heads, inner, conv = sizes.num_heads, sizes.inner_width, sizes.conv_width
    steps_H = torch.empty(heads).uniform_(math.log(1e-3), 0.0).exp()
    arguments = [
        torch.randn(sum(lengths), sum(sizes.widths)).to(dtype),
        (0.5 * torch.randn(conv, sizes.conv_kernel)).to(dtype),
        (0.5 * torch.randn(conv)).to(dtype),
        (1 + 0.1 * torch.randn(inner)).to(dtype),
        torch.empty(heads).uniform_(0.1, 16).log(),
        torch.randn(heads),
        steps_H + torch.log(-torch.expm1(-steps_H)),
    ]
    return [argument.requires_grad_(True) for argument in arguments]


def in_float64(arguments):
    return [argument.detach().double().requires_grad_(True) for argument in arguments]


def values_and_gradients(out_TI, arguments):
    weight_TI = torch.randn(out_TI.shape, generator=torch.Generator().manual_seed(1)).to(out_TI.dtype)
    return out_TI.detach(), torch.autograd.grad((out_TI * weight_TI).sum(), arguments)


def by_reference(arguments, sizes, lengths):
    """The reference with every `float()` in it made a `double()`."""
    wide = in_float64(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return values_and_gradients(mix_reference(*wide, sizes=sizes, starts=starts_of(lengths)), wide)


def by_kernels(arguments, sizes, lengths, row_dtype=torch.float32):
    out_TI = mix(*arguments, sizes=sizes, starts=starts_of(lengths), row_dtype=row_dtype)
    return values_and_gradients(out_TI, arguments)


def assert_close(found, expected, bound):
    scale = float(expected.abs().max().clamp(min=1e-3))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.0, atol=bound * scale)


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_the_reference_in_float64(changes, lengths):
    sizes = sizes_with(**changes)
    arguments = random_mix(sizes, lengths)
    assert can_take(arguments[1:], sizes)
    out_TI, gradients = by_kernels(arguments, sizes, lengths)
    expected_TI, expected = by_reference(arguments, sizes, lengths)
    assert_close(out_TI, expected_TI, VALUES)
    for name, found, wanted in zip(NAMES, gradients, expected, strict=True):
        try:
            assert_close(found, wanted, GRADIENTS)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@needs_kernels
@pytest.mark.parametrize("lengths", [[100], [300, 212]], ids=["one", "packed"])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_gradients_are_as_near_to_float64_as_those_of_the_reference_in_float32(num_groups, lengths):
    sizes = sizes_with(head_dim=64, state_size=64, num_groups=num_groups)
    arguments = random_mix(sizes, lengths)
    _, exact = by_reference(arguments, sizes, lengths)
    _, found = by_kernels(arguments, sizes, lengths)
    out_TI = mix_reference(*arguments, sizes=sizes, starts=starts_of(lengths))
    _, reference = values_and_gradients(out_TI, arguments)
    for name, ours, theirs, wanted in zip(NAMES, found, reference, exact, strict=True):
        error, other = (float((gradient.double() - wanted).norm()) for gradient in (ours, theirs))
        assert error < FARTHER * other, name


@needs_kernels
def test_packed_documents_have_the_bits_and_the_gradients_that_each_has_alone():
    sizes, lengths = sizes_with(), [5, 100, 1, 64]
    arguments = random_mix(sizes, lengths)
    out_TI = mix(*arguments, sizes=sizes, starts=starts_of(lengths), row_dtype=torch.float32)
    weight_TI = torch.randn(out_TI.shape)
    together = torch.autograd.grad((out_TI * weight_TI).sum(), arguments)[0]
    for start, stop in zip(starts_of(lengths), starts_of(lengths)[1:], strict=False):
        part = [arguments[0][start:stop].detach().requires_grad_(True), *arguments[1:]]
        alone_TI = mix(*part, sizes=sizes, starts=[0, stop - start], row_dtype=torch.float32)
        assert same_bits(alone_TI, out_TI[start:stop])
        (gradient,) = torch.autograd.grad((alone_TI * weight_TI[start:stop]).sum(), part[:1])
        assert same_bits(gradient, together[start:stop])


@needs_kernels
def test_the_number_of_threads_changes_no_bit_of_a_gradient():
    sizes, lengths = sizes_with(), LENGTHS["packed"]
    arguments = random_mix(sizes, lengths)
    found = []
    for num_threads in (1, 2, 3):
        with on_threads(num_threads):
            found.append(by_kernels(arguments, sizes, lengths)[1])
    assert all(same_bits(a, b) for others in found[1:] for a, b in zip(others, found[0], strict=True))


@needs_two_forms
@pytest.mark.parametrize("lengths", [[1], [70, 19]], ids=["one-token", "packed"])
def test_forms_give_the_same_bits_of_gradients(lengths):
    sizes = sizes_with(num_heads=2, num_groups=1)
    arguments = random_mix(sizes, lengths)
    found = []
    for form in FORMS:
        with running(form):
            found.append(by_kernels(arguments, sizes, lengths)[1])
    assert all(same_bits(a, b) for others in found[1:] for a, b in zip(others, found[0], strict=True))


@needs_kernels
def test_bfloat16_weights_meet_float32_inside_and_gradients_are_rounded_once():
    sizes, lengths = sizes_with(), [70, 9]
    arguments = random_mix(sizes, lengths, torch.bfloat16)
    wide = [argument.detach().float().requires_grad_(True) for argument in arguments]
    out_TI, found = by_kernels(arguments, sizes, lengths, torch.bfloat16)
    expected_TI, expected = by_kernels(wide, sizes, lengths)
    assert same_bits(out_TI, expected_TI)
    for argument, ours, theirs in zip(arguments, found, expected, strict=True):
        assert same_bits(ours, theirs.to(argument.dtype))


@needs_kernels
def test_rows_are_rounded_as_a_state_would_keep_them():
    sizes, lengths = sizes_with(), [40]
    arguments = random_mix(sizes, lengths)
    out_TI, found = by_kernels(arguments, sizes, lengths, torch.bfloat16)
    inner, conv = sizes.inner_width, sizes.conv_width
    rounded = arguments[0].detach().clone()
    rounded[:, inner : inner + conv] = rounded[:, inner : inner + conv].bfloat16().float()
    expected_TI, expected = by_kernels([rounded.requires_grad_(True), *arguments[1:]], sizes, lengths)
    assert same_bits(out_TI, expected_TI)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
def test_a_long_fast_decay_has_finite_gradients():
    sizes, lengths = sizes_with(num_heads=2, num_groups=1), [150]
    arguments = random_mix(sizes, lengths)
    with torch.no_grad():
        arguments[0][:, -2:] = 50.0  # e**(-50 * 16) is zero in float32
    _, found = by_kernels(arguments, sizes, lengths)
    _, expected = by_reference(arguments, sizes, lengths)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert_close(ours, theirs, LONELY_GRADIENTS)
