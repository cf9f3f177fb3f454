"""RMSNorm: the native forms against the reference and against each other, and the gated norm against its formula."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from freehold.ops.native import forms, kernels, native_report
from freehold.ops.norm import NormOrder, gated_group_rms_norm, rms_norm, rms_norm_fused, rms_norm_reference
from models.forms import FORMS, needs_kernels, needs_two_forms, running, same_bits

EPS = 1e-5
# The order of summation differs from torch's: a few units in the last place of float32.
FLOAT32_RTOL = 2e-6
# One unit in the last place of bfloat16, where a value lies on the border of two roundings; the second cast of
# cast_then_multiply can carry that into a second unit.
BFLOAT16_RTOL = 2 * 2.0**-7

ORDERS: tuple[NormOrder, ...] = ("cast_then_multiply", "multiply_then_cast")
# Around the 32 lanes and 16-wide vectors of the kernel, and the widths of real models.
WIDTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 576, 896, 2688)
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-weight-float32"),
    pytest.param(torch.float32, torch.bfloat16, id="float32-weight-bfloat16"),
]

ALL_FORMS = pytest.mark.parametrize("form", FORMS)


def run_form(
    form: str, hidden_TD: torch.Tensor, weight_D: torch.Tensor, order: NormOrder, eps: float = EPS
) -> torch.Tensor:
    with running(form):
        return rms_norm(hidden_TD, weight_D, eps=eps, order=order)


def test_an_installed_package_has_its_native_extension():
    try:
        distribution("freehold")
    except PackageNotFoundError:
        pytest.skip("runs from the source tree")
    assert forms()


def test_reference_is_the_row_over_its_root_mean_square_times_the_weight():
    hidden_TD, weight_D = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0])
    expected = torch.tensor([[3.0, 40.0]]) / 12.5**0.5
    torch.testing.assert_close(rms_norm_reference(hidden_TD, weight_D, eps=0.0, order="cast_then_multiply"), expected)


def test_the_two_orders_differ_by_a_rounding_in_bfloat16():
    hidden_TD, weight_D = torch.randn(8, 64).bfloat16(), torch.randn(64).bfloat16()
    first, second = (rms_norm_reference(hidden_TD, weight_D, eps=EPS, order=order) for order in ORDERS)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=BFLOAT16_RTOL, atol=0.0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_norm_of_torch_is_the_reference_with_its_gradients(dtype, order):
    leaves = [torch.randn(5, 64).to(dtype).requires_grad_(True), torch.randn(64).to(dtype).requires_grad_(True)]
    found, expected = (norm(*leaves, eps=EPS, order=order) for norm in (rms_norm_fused, rms_norm_reference))
    rtol = FLOAT32_RTOL if dtype is torch.float32 else BFLOAT16_RTOL
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0)
    weight_TD = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight_TD).float().sum(), leaves) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=10 * rtol, atol=10 * rtol)


@needs_kernels
@ALL_FORMS
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_kernel_equals_its_twin(form, order, dtype, weight_dtype):
    for width in WIDTHS:
        hidden_TD, weight_D = (3 * torch.randn(5, width)).to(dtype), torch.randn(width).to(weight_dtype)
        expected = rms_norm_reference(hidden_TD, weight_D, eps=EPS, order=order)
        rtol = FLOAT32_RTOL if dtype is torch.float32 else BFLOAT16_RTOL
        torch.testing.assert_close(run_form(form, hidden_TD, weight_D, order), expected, rtol=rtol, atol=0.0)


@needs_two_forms
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_forms_give_the_same_bits(order, dtype, weight_dtype):
    for width in WIDTHS:
        hidden_TD, weight_D = torch.randn(7, width).to(dtype), torch.randn(width).to(weight_dtype)
        first, *others = (run_form(form, hidden_TD, weight_D, order) for form in FORMS)
        assert all(same_bits(other, first) for other in others), width


@needs_two_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_give_the_same_bits_for_numbers_at_the_edges(dtype):
    edges = [0.0, -0.0, 1e-40, -1e-40, 1e-20, 3e38, -3e38, 1.0, float("inf"), -float("inf"), 2.0**-126, 1 + 2.0**-8]
    for number in edges:
        hidden_TD = torch.randn(3, 40).mul(1e-3).to(dtype)
        hidden_TD[1, 37] = number
        weight_D = torch.tensor([edges[i % len(edges)] for i in range(40)]).to(dtype)
        first, *others = (run_form(form, hidden_TD, weight_D, "cast_then_multiply") for form in FORMS)
        assert all(same_bits(other, first) for other in others), number


@needs_kernels
@ALL_FORMS
def test_a_nan_stays_in_its_row(form):
    hidden_TD = torch.randn(3, 40).bfloat16()
    hidden_TD[1, 39] = float("nan")
    out_TD = run_form(form, hidden_TD, torch.ones(40).bfloat16(), "cast_then_multiply")
    assert out_TD.isnan().all(dim=-1).tolist() == [False, True, False]


@needs_kernels
@ALL_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_company(form, dtype):
    hidden_TD, weight_D = torch.randn(9, 577).to(dtype), torch.randn(577).to(dtype)
    together_TD = run_form(form, hidden_TD, weight_D, "cast_then_multiply")
    for token in range(9):
        alone_TD = run_form(form, hidden_TD[token : token + 1].clone(), weight_D, "cast_then_multiply")
        assert same_bits(alone_TD[0], together_TD[token])


def test_rms_norm_runs_the_form_that_the_settings_chose():
    hidden_TD, weight_D = torch.randn(4, 100), torch.randn(100)
    out_TD = rms_norm(hidden_TD, weight_D, eps=EPS, order="cast_then_multiply")
    if kernels() is None:
        expected_TD = rms_norm_reference(hidden_TD, weight_D, eps=EPS, order="cast_then_multiply")
    else:
        expected_TD = run_form(native_report(), hidden_TD, weight_D, "cast_then_multiply")
    assert torch.equal(out_TD, expected_TD)


@pytest.mark.parametrize(
    "hidden_TD",
    [
        pytest.param(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).T, id="not-contiguous"),
        pytest.param(torch.ones(4, 64, dtype=torch.float16), id="float16"),
        pytest.param(torch.ones(0, 64), id="no-tokens"),
        pytest.param(torch.ones(4, 64, device="meta"), id="meta-device"),
    ],
)
def test_what_the_kernel_does_not_take_gets_the_shape_and_dtype_of_the_reference(hidden_TD):
    weight_D = torch.ones(64, device=hidden_TD.device)
    out_TD = rms_norm(hidden_TD, weight_D, eps=EPS, order="multiply_then_cast")
    assert (out_TD.shape, out_TD.dtype) == (hidden_TD.shape, hidden_TD.dtype)


def test_gradients_flow_to_rows_and_weight():
    hidden_TD, weight_D = torch.randn(3, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    grads = torch.autograd.grad(
        rms_norm(hidden_TD, weight_D, eps=EPS, order="cast_then_multiply").square().sum(), (hidden_TD, weight_D)
    )
    expected = torch.autograd.grad(
        torch.nn.functional.rms_norm(hidden_TD, (32,), weight_D, EPS).square().sum(), (hidden_TD, weight_D)
    )
    torch.testing.assert_close(grads, expected)


def test_gated_norm_gates_first_and_then_scales_each_group_on_its_own():
    value_TI, gate_TI, weight_I = torch.randn(2, 6), torch.randn(2, 6), torch.randn(6)
    out_TI = gated_group_rms_norm(value_TI, gate_TI, weight_I, num_groups=2, eps=EPS)
    for token in range(2):
        for group in (slice(0, 3), slice(3, 6)):
            gated = value_TI[token, group] * torch.nn.functional.silu(gate_TI[token, group])
            expected = torch.nn.functional.rms_norm(gated, (3,), weight_I[group], EPS)
            torch.testing.assert_close(out_TI[token, group], expected)


def test_gated_norm_takes_its_dtype_from_the_gate():
    gate_TI = torch.randn(2, 8).bfloat16()
    out_TI = gated_group_rms_norm(torch.randn(2, 8), gate_TI, torch.ones(8), num_groups=4, eps=EPS)
    assert out_TI.dtype is torch.bfloat16


def test_a_weight_of_another_width_is_an_assertion_by_the_shape_checker():
    with pytest.raises(AssertionError, match=r"rms_norm: D is 7 in weight_D, 8 by hidden_TD"):
        rms_norm(torch.randn(2, 8), torch.randn(7), eps=EPS, order="cast_then_multiply")
