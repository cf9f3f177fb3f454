"""Products with weights: each format against its formula, the same bits in any company, on any form and threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freehold.ops.linear import embed, linear, linear_reference
from freehold.ops.weight import PACKED_FORMATS, Weight, dense
from freehold.quantize.gguf_blocks import BLOCKS, dequantize
from models.forms import FORMS, THREADS, needs_kernels, needs_two_forms, on_threads, running, same_bits
from models.packing import FORMATS, QUANTIZED_FORMATS, pack_blocks, random_blocks, random_packed

pytestmark = needs_kernels

# Of a sum, over the sum of its terms' magnitudes. Packed: one rounding per group of 32 columns and scale; plain: 256
# columns in one chain. Measured 1e-7.
FLOAT32_TOLERANCE = 1e-6
# One rounding to bfloat16.
BFLOAT16_TOLERANCE = 2.0**-8 + FLOAT32_TOLERANCE

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
ALL_FORMS = pytest.mark.parametrize("form", FORMS)
# Around the kernel's three and six rows at once, and past its 256.
NUM_ROWS = (1, 2, 3, 4, 7, 300)
# Around a panel of sixteen.
WIDTHS = (1, 15, 16, 17, 40)
# Around the plain kernel's blocks of 256 columns and vectors of sixteen.
PLAIN_COLUMNS = (1, 15, 16, 31, 256, 257, 700)


def columns_of(format: str) -> tuple[int, ...]:
    """One block, two, and more than the 1024 columns that are unpacked at once."""
    block = BLOCKS[format].num_values
    return block, 2 * block, 1024 + block


def quantized(rows_TD: Tensor) -> Tensor:
    """Return rows as packed weights meet them, float64: integers times the largest magnitude of 32 over 127."""
    groups = rows_TD.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    inverse = torch.tensor(127.0) / largest  # 127.0 / largest would be two roundings in torch
    integers = (groups * inverse).round().nan_to_num()  # round: ties to even
    return (integers.double() * (largest / 127.0).double()).flatten(-2)


def assert_close(found_TF: Tensor, rows_TD: Tensor, weight_FD: Tensor, *, tolerance: float) -> None:
    expected_TF = rows_TD.double() @ weight_FD.double().T
    magnitudes_TF = rows_TD.double().abs() @ weight_FD.double().abs().T
    worst = ((found_TF.double() - expected_TF).abs() / magnitudes_TF.clamp(min=1e-30)).max()
    assert worst <= tolerance


# Packed weights keep their values.


@pytest.mark.parametrize("shape", [(1,), (16,), (37,), (3, 16), (3, 21)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_packing_changes_no_value(format, shape):
    for columns in columns_of(format):
        whole = (*shape, columns)
        stored = random_blocks(format, whole, seed=columns)
        expected = dequantize(stored, format, shape=whole)
        for num_threads in THREADS:
            with on_threads(num_threads):
                packed = pack_blocks(stored, format, whole)
                assert same_bits(packed.dense(), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_weight_takes_the_bytes_of_its_file(format):
    shape = (64, BLOCKS[format].num_values)
    assert random_packed(format, shape).nbytes == pytest.approx(BLOCKS[format].bytes_of_shape(shape), rel=0.05)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_packed_table_are_those_of_its_tokens(format):
    packed, tokens = random_packed(format, (40, BLOCKS[format].num_values)), torch.tensor([39, 0, 16, 16, 15])
    assert same_bits(embed(tokens, packed), packed.dense()[tokens])


@pytest.mark.parametrize("token", [40, 47])
def test_a_token_that_a_packed_table_has_not_is_refused(token):
    """As by torch's own embedding; these two lie in the last panel of sixteen rows, where nothing is."""
    with pytest.raises((IndexError, AssertionError)):
        embed(torch.tensor([0, token]), random_packed("Q8_0", (40, 64)))


# Products.


@ALL_FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_quantized_products_are_those_of_rows_in_eight_bits(format, dtype, form):
    tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else BFLOAT16_TOLERANCE
    for columns in columns_of(format):
        for width in WIDTHS:
            packed = random_packed(format, (width, columns), seed=width)
            rows_TD = torch.randn(max(NUM_ROWS), columns).to(dtype)
            for num_rows in NUM_ROWS:
                with running(form):
                    out_TF = linear(rows_TD[:num_rows], packed)
                assert out_TF.dtype is dtype
                assert_close(out_TF, quantized(rows_TD[:num_rows]), packed.dense(), tolerance=tolerance)


@ALL_FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_plain_products_are_those_of_float64(weight_dtype, dtype, form):
    tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else BFLOAT16_TOLERANCE
    for columns in PLAIN_COLUMNS:
        for width in WIDTHS:
            weight_FD, rows_TD = torch.randn(width, columns).to(weight_dtype), torch.randn(300, columns).to(dtype)
            for num_rows in NUM_ROWS:
                with running(form):
                    out_TF = linear(rows_TD[:num_rows], weight_FD)
                assert out_TF.dtype is dtype
                assert_close(out_TF, rows_TD[:num_rows], weight_FD, tolerance=tolerance)


@ALL_FORMS
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("format", ["Q4_1", "F32"])
def test_a_bias_is_added_once(format, bias_dtype, form):
    weight, rows_TD, bias_F = random_weight(format, (21, 64)), torch.randn(5, 64), torch.randn(21).to(bias_dtype)
    with running(form):
        assert same_bits(linear(rows_TD, weight, bias_F), linear(rows_TD, weight) + bias_F.float())


@pytest.mark.parametrize("format", ["Q8_0", "F32"])
def test_no_rows_give_no_outputs(format):
    assert linear(torch.empty(0, 64), random_weight(format, (21, 64))).shape == (0, 21)


@pytest.mark.parametrize("asks", ["rows", "weight", "bias"])
def test_what_asks_for_gradients_gets_those_of_the_reference(asks):
    tensors = {"rows": torch.randn(5, 24), "weight": torch.randn(7, 24), "bias": torch.randn(7)}
    wanted = tensors[asks].requires_grad_(True)
    found, expected = (form(*tensors.values()).square().sum() for form in (linear, linear_reference))
    torch.testing.assert_close(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted))


@pytest.mark.parametrize("format", ["Q8_0", "F32"])
def test_rows_that_lie_apart_have_the_bits_of_rows_side_by_side(format):
    weight, rows_TD = random_weight(format, (21, 64)), torch.randn(5, 128)[:, ::2]
    assert not rows_TD.is_contiguous()
    assert same_bits(linear(rows_TD, weight), linear(rows_TD.contiguous(), weight))


def test_rows_of_another_width_are_our_mistake():
    with pytest.raises(AssertionError, match=r"a weight of \(21, 64\) for rows of 32"):
        linear(torch.randn(2, 32), random_packed("Q8_0", (21, 64)))


# The same bits.


def random_weight(format: str, shape: tuple[int, int], *, seed: int = 0) -> Weight:
    if format in PACKED_FORMATS:
        return random_packed(format, shape, seed=seed)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16() if format == "bfloat16" else values


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Weight, Tensor | None]:
    """Rows, a weight and perhaps a bias."""
    format = draw(st.sampled_from([*FORMATS, "F32", "bfloat16"]))
    seed, num_rows = draw(st.integers(0, 2**16)), draw(st.integers(1, 14) | st.integers(250, 262))
    if format in PACKED_FORMATS:
        columns = BLOCKS[format].num_values * draw(st.integers(1, 3))
    else:
        columns = draw(st.integers(1, 300))
    width = draw(st.integers(1, 50))
    random = torch.Generator().manual_seed(seed)
    rows_TD = torch.randn(num_rows, columns, generator=random) * 10.0 ** draw(st.integers(-30, 12))
    bias_F = torch.randn(width, generator=random) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return rows_TD.to(dtype), random_weight(format, (width, columns), seed=seed), bias_F


@given(products(), st.data())
def test_an_output_has_the_same_bits_in_any_company_on_any_threads_and_form(product, data):
    rows_TD, weight, bias_F = product
    with running(FORMS[0]):
        expected_TF = linear(rows_TD, weight, bias_F)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows_TD)), max_size=4), label="cuts"))
    parts = [rows_TD[i:j] for i, j in zip([0, *cuts], [*cuts, len(rows_TD)], strict=True)]
    num_threads = data.draw(st.sampled_from(THREADS), label="threads")
    with running(data.draw(st.sampled_from(FORMS), label="form")), on_threads(num_threads):
        assert same_bits(linear(rows_TD, weight, bias_F), expected_TF)
        found_TF = torch.cat([linear(part.clone(), weight, bias_F) for part in parts])
    assert same_bits(found_TF, expected_TF)


@pytest.mark.parametrize("format", [*FORMATS, "F32", "bfloat16"])
@pytest.mark.parametrize("num_threads", THREADS)
def test_each_row_alone_has_the_bits_that_it_has_among_all(format, num_threads):
    weight, rows_TD = random_weight(format, (33, 512)), torch.randn(270, 512)
    with on_threads(num_threads):
        together_TF = linear(rows_TD, weight)
        alone_TF = torch.cat([linear(rows_TD[i : i + 1], weight) for i in range(len(rows_TD))])
    assert same_bits(alone_TF, together_TF)


@ALL_FORMS
@pytest.mark.parametrize(("num_rows", "columns"), [(1, 300), (5, 576), (12, 31), (13, 512), (262, 257)])
def test_bfloat16_in_panels_has_the_bits_that_it_has_row_after_row(num_rows, columns, form):
    plain = torch.randn(37, columns).bfloat16()
    packed, rows_TD = (
        pack_blocks(plain.view(torch.uint8).flatten(), "BF16", (37, columns)),
        torch.randn(num_rows, columns),
    )
    assert torch.equal(packed.dense(), plain.float())
    with running(form):
        assert same_bits(linear(rows_TD, packed), linear(rows_TD, plain))


@needs_two_forms
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 1e-37, 1e-36, 1e30, 1e37], ids=str)
def test_forms_give_the_same_bits_for_rows_at_the_edges(format, scale):
    packed, rows_TD = random_packed(format, (21, 256), scale=None), torch.randn(4, 256) * scale
    rows_TD[1] = 0.0
    rows_TD[2, ::2] = -0.0
    assert_same_bits_of_all_forms(rows_TD, packed)


@needs_two_forms
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_forms_give_the_same_bits_for_what_is_no_number(format, number):
    packed, rows_TD = random_packed(format, (21, 256)), torch.randn(4, 256)
    rows_TD[2, 77] = number
    assert_same_bits_of_all_forms(rows_TD, packed)


def assert_same_bits_of_all_forms(rows_TD: Tensor, packed: Weight) -> None:
    outputs = []
    for form in FORMS:
        with running(form):
            outputs.append(linear(rows_TD, packed))
    assert all(same_bits(found_TF, outputs[0]) for found_TF in outputs)


@ALL_FORMS
@pytest.mark.parametrize("format", FORMATS)
def test_the_smallest_rows_give_their_products_or_nothing(format, form):
    packed, rows_TD = random_packed(format, (21, 256), scale=1.0), torch.randn(4, 256)
    with running(form):
        expected_TF = linear(rows_TD, packed)
        found_TF = linear(rows_TD * 2.0**-124, packed) * 2.0**124
    is_close = (found_TF - expected_TF).abs() <= 0.1 * expected_TF.abs().max()
    assert (is_close | (found_TF == 0)).all()


@ALL_FORMS
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("format", [*FORMATS, "F32", "bfloat16"])
def test_what_is_no_number_shows_in_its_row_and_nowhere_else(format, number, form):
    weight, rows_TD = random_weight(format, (37, 512)), torch.randn(9, 512)
    with running(form):
        clean_TF = linear(rows_TD, weight)
        for column in (0, 255, 300, 511):
            spoilt_TD = rows_TD.clone()
            spoilt_TD[4, column] = number
            out_TF = linear(spoilt_TD, weight)
            assert not out_TF[4].isfinite().any()
            others = [0, 1, 2, 3, 5, 6, 7, 8]
            assert same_bits(out_TF[others], clean_TF[others])


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_of_packed_weights_multiplies_their_values(format):
    packed, rows_TD = random_packed(format, (21, 512)), torch.randn(4, 512)
    expected_TF = torch.nn.functional.linear(rows_TD, dense(packed, torch.float32))
    assert same_bits(linear_reference(rows_TD, packed), expected_TF)
    with running("off"):
        assert same_bits(linear(rows_TD, packed), expected_TF)
