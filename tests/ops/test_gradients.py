"""The gradients that kernels make beside products, against those of the references; and what decides their bits."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from freehold.evaluate.laws import relative_difference
from freehold.ops.activation import gated_silu, squared_relu
from freehold.ops.attention import attention, attention_anew
from freehold.ops.linear import linear, linear_reference
from freehold.ops.loss import linear_cross_entropy
from freehold.ops.norm import rms_norm, rms_norm_reference
from freehold.ops.rope import rope_frequencies, rotate
from models.forms import FORMS, THREADS, needs_kernels, on_threads, running, same_bits

pytestmark = needs_kernels

# Sums of float32 in another order (measured 1e-6 at most).
TOLERANCE = 5e-6
ALL_FORMS = pytest.mark.parametrize("form", FORMS)
# Around the lanes and the runs of the kernels.
SIZES = [(1, 1), (3, 15), (5, 16), (65, 33), (130, 64)]


def gradients(op: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return an op's gradients, of a sum of its results with fixed random weights."""
    asked = [tensor.detach().requires_grad_(True) for tensor in inputs]
    out = op(*asked)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((out.float() * weights).sum(), asked))


def differences(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    return [relative_difference(a, b) for a, b in zip(found, expected, strict=True)]


@ALL_FORMS
@pytest.mark.parametrize(("num_tokens", "width"), SIZES)
def test_the_gradient_of_a_norm_is_that_of_its_reference(form, num_tokens, width):
    hidden_TD, weight_D = torch.randn(num_tokens, width), torch.randn(width)
    kind = {"eps": 1e-5, "order": "multiply_then_cast"}
    with running(form):
        found = gradients(lambda *inputs: rms_norm(*inputs, **kind), hidden_TD, weight_D)
    expected = gradients(lambda *inputs: rms_norm_reference(*inputs, **kind), hidden_TD, weight_D)
    assert max(differences(found, expected)) <= TOLERANCE


@ALL_FORMS
@pytest.mark.parametrize(("num_tokens", "width"), SIZES)
def test_activations_and_their_gradients_are_those_of_their_references(form, num_tokens, width):
    gate_TF, up_TF = torch.randn(2, num_tokens, width) * 3
    for op, inputs in ((gated_silu, (gate_TF, up_TF)), (squared_relu, (up_TF,))):
        with running("off"):
            expected_TF, expected = op(*(tensor.clone() for tensor in inputs)), gradients(op, *inputs)
        with running(form):
            assert relative_difference(op(*inputs), expected_TF) <= TOLERANCE
            assert max(differences(gradients(op, *inputs), expected)) <= TOLERANCE


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_product_is_made_of_float32_products(weight_dtype):
    hidden_TD, weight, bias_F = torch.randn(9, 40), torch.randn(24, 40).to(weight_dtype), torch.randn(24)
    found = gradients(
        lambda h, w, b: linear(h.bfloat16(), w, b, torch.float32), hidden_TD.bfloat16().float(), weight, bias_F
    )
    expected = gradients(
        lambda h, w, b: linear_reference(h, w.float(), b), hidden_TD.bfloat16().float(), weight, bias_F
    )
    assert differences(found[1:], expected[1:]) == [0.0, 0.0]
    assert same_bits(found[0], expected[0].bfloat16().float())


@ALL_FORMS
def test_the_loss_of_logits_and_its_gradient_are_torchs(form):
    hidden_TD, head_VD, labels_T = torch.randn(7, 16), 5 * torch.randn(97, 16), torch.randint(97, (7,))
    with running(form):
        loss, _ = linear_cross_entropy(hidden_TD, head_VD, labels_T)
        found = gradients(lambda h, w: linear_cross_entropy(h, w, labels_T)[0], hidden_TD, head_VD)
    expected = gradients(lambda h, w: cross_entropy(h @ w.T, labels_T, reduction="sum"), hidden_TD, head_VD)
    torch.testing.assert_close(loss, cross_entropy(hidden_TD @ head_VD.T, labels_T, reduction="sum"))
    assert max(differences(found, expected)) <= TOLERANCE


def test_a_loss_of_what_is_no_number_is_none():
    hidden_TD, head_VD = torch.ones(2, 16), torch.ones(33, 16)
    head_VD[5, 0] = torch.nan
    assert linear_cross_entropy(hidden_TD, head_VD, torch.tensor([1, 2]))[0].isnan()


# Heads, key/value heads, size of a head, lengths of documents: around the blocks of 48, and without groups.
ATTENTIONS = [
    pytest.param(4, 2, 16, (1, 47, 48, 49), id="groups"),
    pytest.param(3, 3, 32, (97, 5), id="no-groups"),
    pytest.param(5, 1, 48, (31, 144, 2), id="one-kv-head"),
    pytest.param(2, 1, 256, (70,), id="widest"),
]


def attention_inputs(num_heads: int, num_kv_heads: int, head_dim: int, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(sum(lengths), count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads))


def starts_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


@ALL_FORMS
@pytest.mark.parametrize("rotates", [True, False], ids=["rope", "no-positions"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "lengths"), ATTENTIONS)
def test_attention_anew_and_its_gradient_are_the_references(form, num_heads, num_kv_heads, head_dim, lengths, rotates):
    inputs, starts = attention_inputs(num_heads, num_kv_heads, head_dim, lengths), starts_of(lengths)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    angles = torch.outer(torch.arange(max(lengths)).float(), rope_frequencies(head_dim, 1e4))
    table = torch.cat((angles.cos(), angles.sin()), dim=1) if rotates else None
    spans = list(pairwise(starts))

    def reference(q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor) -> Tensor:
        if rotates:
            cos_TK, sin_TK = (part.repeat(1, 2)[positions_T] for part in (angles.cos(), angles.sin()))
            q_THK, k_TJK = rotate(q_THK, cos_TK, sin_TK), rotate(k_TJK, cos_TK, sin_TK)
        return attention(q_THK, k_TJK, v_TJK, spans=spans)

    def found(*inputs: Tensor) -> Tensor:
        return attention_anew(*inputs, table, starts=starts, page_dtype=torch.float32)

    with running(form):
        assert relative_difference(found(*inputs), reference(*inputs)) <= TOLERANCE
        found_gradients = gradients(found, *inputs)
    with running("off"):
        assert max(differences(found_gradients, gradients(reference, *inputs))) <= TOLERANCE


def test_no_number_of_threads_changes_a_gradient():
    inputs, starts = attention_inputs(4, 2, 16, (70, 3, 60)), starts_of((70, 3, 60))
    rows_TD, weight_D = torch.randn(133, 48), torch.randn(48)
    seen = []
    for threads in THREADS:
        with on_threads(threads):
            found = gradients(
                lambda *qkv: attention_anew(*qkv, None, starts=starts, page_dtype=torch.bfloat16), *inputs
            )
            found += gradients(lambda *a: rms_norm(*a, eps=1e-5, order="cast_then_multiply"), rows_TD, weight_D)
            found += gradients(gated_silu, rows_TD, rows_TD.flip(0))
        seen.append(found)
    assert all(same_bits(a, b) for found in seen[1:] for a, b in zip(found, seen[0], strict=True))


def test_a_document_has_the_gradient_that_it_has_alone():
    q_THK, k_TJK, v_TJK = attention_inputs(4, 2, 16, (50, 60))

    def of(first: int, stop: int, *starts: int) -> list[Tensor]:
        parts = [tensor[first:stop].clone().requires_grad_(True) for tensor in (q_THK, k_TJK, v_TJK)]
        attention_anew(*parts, None, starts=starts, page_dtype=torch.float32).square().sum().backward()
        return [part.grad for part in parts]

    together, alone = of(0, 110, 0, 50, 110), of(50, 110, 0, 60)
    assert all(same_bits(a[50:], b) for a, b in zip(together, alone, strict=True))
