"""Blocks by the kernels against their references, with states over two steps; the same bits on any form and threads."""

import pytest
import torch

from freehold.evaluate.laws import relative_difference
from freehold.models.layout import Layout
from freehold.models.linear import set_weight
from freehold.models.spec import AttentionSpec, Mamba2Spec, MlpSpec, MoeSpec
from models.blocks import (
    MAMBA2,
    MOE,
    PACKED_SPECS,
    SPECS,
    SUPER_SPECS,
    Outcome,
    random_block,
    random_hidden,
    run_block,
)
from models.forms import FORMS, THREADS, needs_kernels, on_threads, running, same_bits
from models.packing import quantize_and_pack

pytestmark = needs_kernels

# Relative lengths of differences. float32: sums in another order, and exponentials of one or two units in the last
# place; 6e-7 at most.
FLOAT32_TOLERANCE = 2e-6
# The reference rounds what its ops hand on, the kernels only what leaves the block: 6e-3 at most.
BFLOAT16_TOLERANCE = 1.2e-2
# Packed weights, the reference with products by the same kernel: where a value lies between two of the 255 steps of its
# group, another order may take the other one. 4e-7 at most as nothing does.
PACKED_TOLERANCE = 1e-5
# The reference with the weights' values in float32: what eight bits for the rows cost; 1.6e-2 at most.
EIGHT_BITS_TOLERANCE = 3e-2

# Keys and values in eight bits: where one lies between two of the 255 steps, the other twin may take the other.
EIGHT_BIT_PAGES_TOLERANCE = 1.2e-2

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
EACH = pytest.mark.parametrize(("spec", "width"), SPECS.values(), ids=SPECS)
ATTENTIONS = {name: case for name, case in SPECS.items() if isinstance(case[0], AttentionSpec)}
EACH_ATTENTION = pytest.mark.parametrize(("spec", "width"), ATTENTIONS.values(), ids=ATTENTIONS)
PACKED = {
    f"{name}-{format}": (spec, width, format)
    for specs, formats in ((PACKED_SPECS, ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")), (SUPER_SPECS, ("Q4_K", "Q6_K")))
    for name, (spec, width) in specs.items()
    for format in formats
} | {"mlp-gated-Q5_K": (*SUPER_SPECS["mlp-gated"], "Q5_K")}
EACH_PACKED = pytest.mark.parametrize(("spec", "width", "format"), PACKED.values(), ids=PACKED)


def worst(found: Outcome, expected: Outcome) -> float:
    return max(relative_difference(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))


def assert_same_bits_everywhere(block, width, dtype, kv_dtype=None) -> None:
    expected = run_block(block, width, dtype=dtype, kv_dtype=kv_dtype)
    for form in FORMS:
        for num_threads in THREADS:
            with running(form), on_threads(num_threads):
                found = run_block(block, width, dtype=dtype, kv_dtype=kv_dtype)
            pairs = zip(found.tensors, expected.tensors, strict=True)
            assert all(same_bits(a, b) for a, b in pairs), f"{form}, {num_threads} threads"


RECURRENT_OR_ROUTED = {
    name: case
    for name, case in SPECS.items()
    if isinstance(case[0], Mamba2Spec | MoeSpec | MlpSpec) and "gated" not in name
}


@pytest.mark.parametrize(("spec", "width"), RECURRENT_OR_ROUTED.values(), ids=RECURRENT_OR_ROUTED)
def test_ops_whose_gradient_is_recorded_give_the_bits_of_the_whole_block(spec, width):
    block, layout = random_block(spec, width, dtype=torch.float32), Layout.packed((37, 1, 70))
    hidden_TD = random_hidden(layout.num_tokens, width, dtype=torch.float32)
    with torch.no_grad():
        expected_TD = block(hidden_TD.clone(), layout, None)
    block.requires_grad_(True)
    assert same_bits(block.reference(hidden_TD, layout, None).detach(), expected_TD)


@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_a_block_equals_its_reference(spec, width, dtype):
    block = random_block(spec, width, dtype=dtype)
    assert block.is_native()
    with running("off"):
        expected = run_block(block, width, dtype=dtype, by_reference=True)
    tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else BFLOAT16_TOLERANCE
    for form in FORMS:
        with running(form):
            assert worst(run_block(block, width, dtype=dtype), expected) <= tolerance, form


@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_a_block_has_the_same_bits_on_any_form_and_threads(spec, width, dtype):
    assert_same_bits_everywhere(random_block(spec, width, dtype=dtype), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@EACH_ATTENTION
def test_attention_over_eight_bits_equals_its_reference(spec, width, dtype):
    block = random_block(spec, width, dtype=dtype)
    exact = run_block(block, width, dtype=dtype)
    with running("off"):
        expected = run_block(block, width, dtype=dtype, kv_dtype=torch.int8, by_reference=True)
    for form in FORMS:
        with running(form):
            found = run_block(block, width, dtype=dtype, kv_dtype=torch.int8)
        assert worst(found, expected) <= EIGHT_BIT_PAGES_TOLERANCE, form
        assert 1e-4 < worst(found, exact) <= EIGHT_BITS_TOLERANCE, form


@pytest.mark.parametrize("dtype", DTYPES)
@EACH_ATTENTION
def test_attention_over_eight_bits_has_the_same_bits_on_any_form_and_threads(spec, width, dtype):
    assert_same_bits_everywhere(random_block(spec, width, dtype=dtype), width, dtype, torch.int8)


@EACH_PACKED
def test_a_packed_block_equals_its_reference(spec, width, format):
    block = random_block(spec, width, dtype=torch.float32, format=format)
    assert block.is_native()
    found = run_block(block, width, dtype=torch.float32)
    with running("off"):
        in_float32 = run_block(block, width, dtype=torch.float32, by_reference=True)
    assert worst(found, in_float32) <= EIGHT_BITS_TOLERANCE
    if not isinstance(spec, MoeSpec):  # whose reference has no products with packed experts
        by_the_same_products = run_block(block, width, dtype=torch.float32, by_reference=True)
        assert worst(found, by_the_same_products) <= PACKED_TOLERANCE


@pytest.mark.parametrize("format", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize(("spec", "width"), PACKED_SPECS.values(), ids=PACKED_SPECS)
def test_a_packed_block_in_bfloat16_equals_its_reference(spec, width, format):
    block = random_block(spec, width, dtype=torch.bfloat16, format=format)
    found = run_block(block, width, dtype=torch.bfloat16)
    expected = run_block(block, width, dtype=torch.bfloat16, by_reference=True)
    assert worst(found, expected) <= EIGHT_BITS_TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@EACH_PACKED
def test_a_packed_block_has_the_same_bits_on_any_form_and_threads(spec, width, format, dtype):
    assert_same_bits_everywhere(random_block(spec, width, dtype=dtype, format=format), width, dtype)


MIXED = {
    "mlp-gated": {"gate_proj": "Q8_0", "up_proj": "Q4_1", "down_proj": None},
    "attention": {"q_proj": "Q4_0", "k_proj": None, "v_proj": "Q5_1", "o_proj": "Q8_0"},
    "mamba2": {"in_proj": None, "out_proj": "Q5_0"},
    "moe-latent": {"fc1_latent_proj": "Q8_0", "fc2_latent_proj": None},
}


@pytest.mark.parametrize("name", MIXED)
def test_the_matrices_of_a_block_may_have_different_formats(name):
    spec, width = PACKED_SPECS[name]
    block = random_block(spec, width, dtype=torch.float32)
    for matrix, format in MIXED[name].items():
        if format:
            owner = block.mixer.get_submodule(matrix)
            set_weight(owner, "weight", quantize_and_pack(owner.weight, format))
    assert block.is_native()
    with running("off"):
        expected = run_block(block, width, dtype=torch.float32, by_reference=True)
    assert worst(run_block(block, width, dtype=torch.float32), expected) <= EIGHT_BITS_TOLERANCE
    assert_same_bits_everywhere(block, width, torch.float32)


@EACH
def test_long_packed_sequences_without_state_equal_the_reference(spec, width):
    """Past the kernels' 256 rows at once, and past the tokens of one tile and one page."""
    block, layout = random_block(spec, width, dtype=torch.float32), Layout.packed([290, 1, 45])
    hidden_TD = random_hidden(336, width, dtype=torch.float32)
    with running("off"):
        expected_TD = block.reference(hidden_TD.clone(), layout, None)
    outputs = []
    for num_threads in (1, 3):
        with on_threads(num_threads):
            outputs.append(block(hidden_TD.clone(), layout, None))
    assert relative_difference(outputs[0], expected_TD) <= FLOAT32_TOLERANCE
    assert same_bits(outputs[0], outputs[1])


@EACH
def test_a_nan_shows_in_its_sequence_and_nowhere_else(spec, width):
    block, layout = random_block(spec, width, dtype=torch.float32), Layout.packed([5, 9, 4])
    hidden_TD = random_hidden(18, width, dtype=torch.float32)
    clean_TD = block(hidden_TD.clone(), layout, None)
    spoilt_TD = hidden_TD.clone()
    spoilt_TD[8, width // 2] = torch.nan
    out_TD = block(spoilt_TD, layout, None)
    assert out_TD[8].isnan().all()
    before_and_after = [*range(8), *range(14, 18)]
    assert same_bits(out_TD[before_and_after], clean_TD[before_and_after])


# The router.


def routed(gate_ED: torch.Tensor, correction_E: torch.Tensor, **changes: int) -> torch.Tensor:
    """Return a block's output with this router and otherwise the same weights."""
    spec = MoeSpec(**(vars(MOE) | changes))
    block = random_block(spec, 32, dtype=torch.float32)
    block.mixer.gate.weight.copy_(gate_ED)
    block.mixer.gate.e_score_correction_bias.copy_(correction_E)
    return block(random_hidden(11, 32, dtype=torch.float32), Layout.packed([11]), None)


@pytest.mark.parametrize("form", FORMS)
def test_of_equal_experts_the_earlier_is_chosen(form):
    gate_ED, correction_E = torch.randn(8, 32), torch.zeros(8)
    gate_ED[5], correction_E[[2, 5]] = gate_ED[2], 10.0
    with running(form):
        tied_TD = routed(gate_ED, correction_E, num_chosen=1)
        first_TD = routed(gate_ED, correction_E - 5 * torch.eye(8)[5], num_chosen=1)
        second_TD = routed(gate_ED, correction_E - 5 * torch.eye(8)[2], num_chosen=1)
    assert same_bits(tied_TD, first_TD)
    assert not same_bits(tied_TD, second_TD)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "num_chosen_groups": 2}], ids=["no-groups", "groups"])
def test_where_all_experts_are_equal_the_first_are_chosen_in_order(form, groups):
    with running(form):
        tied_TD = routed(torch.zeros(8, 32), torch.zeros(8), **groups)
        ordered_TD = routed(torch.zeros(8, 32), -torch.arange(8.0), **groups)
        reversed_TD = routed(torch.zeros(8, 32), torch.arange(8.0), **groups)
    assert same_bits(tied_TD, ordered_TD)
    assert not same_bits(tied_TD, reversed_TD)


@pytest.mark.parametrize("form", FORMS)
def test_experts_of_equal_groups_are_those_of_the_earlier_group(form):
    gate_ED = torch.randn(4, 32).repeat(2, 1)  # two groups that look the same to every token
    groups = {"num_groups": 2, "num_chosen_groups": 1}
    with running(form):
        tied_TD = routed(gate_ED, torch.zeros(8), **groups)
        first_TD = routed(gate_ED, torch.tensor([0.0] * 4 + [-9.0] * 4), **groups)
    assert same_bits(tied_TD, first_TD)


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_nobody_chose_may_hold_anything(form):
    block = random_block(MOE, 32, dtype=torch.float32)
    block.mixer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 9.0] + [0.0] * 5))
    block.mixer.experts.up_proj[3:] = torch.nan
    block.mixer.experts.down_proj[3:] = torch.nan
    with running(form):
        out_TD = block(random_hidden(11, 32, dtype=torch.float32), Layout.packed([11]), None)
    assert out_TD.isfinite().all()


# What the kernels do not take.


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8), torch.float32, id="heads-of-8"),
        pytest.param(AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=272), torch.float32, id="heads-of-272"),
        pytest.param(Mamba2Spec(**(vars(MAMBA2) | {"head_dim": 8})), torch.float32, id="mamba2-heads-of-8"),
        pytest.param(Mamba2Spec(**(vars(MAMBA2) | {"state_size": 24})), torch.float32, id="states-of-24"),
        pytest.param(Mamba2Spec(**(vars(MAMBA2) | {"conv_kernel": 9})), torch.float32, id="nine-taps"),
        pytest.param(MlpSpec(width=48, activation="relu2"), torch.float16, id="float16"),
    ],
)
def test_what_kernels_do_not_take_runs_by_the_reference(spec, dtype):
    block, hidden_TD = random_block(spec, 32, dtype=dtype), random_hidden(7, 32, dtype=dtype)
    assert not block.is_native()
    expected_TD = block.reference(hidden_TD.clone(), Layout.packed([7]), None)
    assert same_bits(block(hidden_TD.clone(), Layout.packed([7]), None), expected_TD)


def test_without_kernels_a_block_is_its_reference():
    block, hidden_TD = random_block(MOE, 32, dtype=torch.float32), random_hidden(7, 32, dtype=torch.float32)
    with running("off"):
        assert not block.is_native()
        expected_TD = block.reference(hidden_TD.clone(), Layout.packed([7]), None)
        assert same_bits(block(hidden_TD.clone(), Layout.packed([7]), None), expected_TD)
