"""The chunked loss against torch's own on whole logits: values, gradients, what counts, and what never exists."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from freehold.ops import loss
from freehold.ops.loss import IGNORED, linear_cross_entropy, linear_cross_entropy_reference, token_logprobs
from models.forms import same_bits
from models.packing import quantize_and_pack

TOKENS, WIDTH, VOCAB = 23, 32, 97
ROWS_OF_A_CHUNK = 5

# float32: sums in another order. bfloat16: the twin rounds the gradient of each logit after its scale, the op before;
# the head's gradient is a sum of one rounded product for each chunk instead of one for all.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", ROWS_OF_A_CHUNK * 4 * VOCAB)


def inputs(dtype: torch.dtype = torch.float32, num_tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and a head that want gradients, and labels of which every third is ignored."""
    hidden_TD = torch.randn(num_tokens, WIDTH).to(dtype).requires_grad_(True)
    head_VD = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(dtype).requires_grad_(True)
    labels_T = torch.randint(VOCAB, (num_tokens,))
    labels_T[::3] = IGNORED
    return hidden_TD, head_VD, labels_T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, TOKENS])
def test_loss_and_gradients_are_those_of_whole_logits(num_tokens, dtype):
    hidden_TD, head_VD, labels_T = inputs(dtype, num_tokens)
    found, count = linear_cross_entropy(hidden_TD, head_VD, labels_T)
    expected = linear_cross_entropy_reference(hidden_TD, head_VD, labels_T)
    assert found.dtype is torch.float32
    assert count == int((labels_T != IGNORED).sum())
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    wanted = (hidden_TD, head_VD)
    for ours, theirs in zip(
        torch.autograd.grad(found / 7, wanted), torch.autograd.grad(expected / 7, wanted), strict=True
    ):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_the_gradient_is_the_difference_of_the_loss():
    hidden_TD, head_VD, labels_T = inputs()
    total, _ = linear_cross_entropy(hidden_TD, head_VD, labels_T)
    gradients = torch.autograd.grad(total, (hidden_TD, head_VD))
    for tensor, gradient in zip((hidden_TD, head_VD), gradients, strict=True):
        step = 1e-2 * gradient / gradient.norm()
        sides = []
        for sign in (1, -1):
            arguments = [t.detach() + sign * step if t is tensor else t.detach() for t in (hidden_TD, head_VD)]
            sides.append(linear_cross_entropy_reference(*(t.double() for t in arguments), labels_T))
        slope = float(sides[0] - sides[1]) / 2e-2
        assert slope == pytest.approx(float(gradient.norm()), rel=1e-3)  # the loss is rounded to float32


def test_a_head_that_is_also_the_embedding_has_the_gradient_of_both_uses():
    _, table_VD, labels_T = inputs()
    tokens_T = torch.randint(VOCAB, (TOKENS,))
    found, _ = linear_cross_entropy(table_VD[tokens_T], table_VD, labels_T)
    expected = linear_cross_entropy_reference(table_VD[tokens_T], table_VD, labels_T)
    gradients = [torch.autograd.grad(total, table_VD)[0] for total in (found, expected)]
    torch.testing.assert_close(*gradients, **TOLERANCE[torch.float32])


def test_only_what_asks_for_a_gradient_gets_one():
    hidden_TD, head_VD, labels_T = inputs()
    for wanting, other in ((hidden_TD, head_VD.detach()), (head_VD, hidden_TD.detach())):
        arguments = (wanting, other) if wanting is hidden_TD else (other, wanting)
        (found,) = torch.autograd.grad(linear_cross_entropy(*arguments, labels_T)[0], wanting)
        (expected,) = torch.autograd.grad(linear_cross_entropy_reference(*arguments, labels_T), wanting)
        torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])
    assert not linear_cross_entropy(hidden_TD.detach(), head_VD.detach(), labels_T)[0].requires_grad


def test_a_packed_head_hands_its_gradient_down():
    hidden_TD, head_VD, labels_T = inputs()
    head = quantize_and_pack(head_VD, "Q8_0")
    found = torch.autograd.grad(linear_cross_entropy(hidden_TD, head, labels_T)[0], hidden_TD)
    expected = torch.autograd.grad(linear_cross_entropy_reference(hidden_TD, head, labels_T), hidden_TD)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # the kernel quantizes its rows, too


def test_a_whole_vocabulary_is_summed_without_losing_its_many_small_terms():
    num_others, far = 49_151, -17.0  # e to this power is lost where it is added to one in float32
    head_VD = torch.tensor([[0.0], *[[far]] * num_others])
    found, _ = linear_cross_entropy(torch.ones(1, 1), head_VD, torch.tensor([0]))
    assert float(found) == pytest.approx(math.log1p(num_others * math.exp(far)), rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_tokens_change_no_bit(dtype):
    hidden_TD, head_VD, labels_T = inputs(dtype)
    kept = labels_T != IGNORED
    alone, count = linear_cross_entropy(hidden_TD[kept], head_VD, labels_T[kept])
    together, same_count = linear_cross_entropy(hidden_TD, head_VD, labels_T)
    assert same_bits(alone.detach(), together.detach())
    assert count == same_count
    gradients = [torch.autograd.grad(total, (hidden_TD, head_VD)) for total in (alone, together)]
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


def test_labels_that_are_all_ignored_cost_nothing_and_move_nothing():
    hidden_TD, head_VD, labels_T = inputs()
    total, count = linear_cross_entropy(hidden_TD, head_VD, torch.full_like(labels_T, IGNORED))
    assert (float(total.detach()), count) == (0.0, 0)
    gradients = torch.autograd.grad(total, (hidden_TD, head_VD))
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@pytest.mark.parametrize("function", [linear_cross_entropy, token_logprobs], ids=["loss", "logprobs"])
def test_logits_of_all_tokens_never_exist(function):
    hidden_TD, head_VD, labels_T = inputs(num_tokens=200)
    with LargestTensor() as largest:
        found = function(hidden_TD, head_VD, labels_T)
        total = found[0] if isinstance(found, tuple) else found.sum()
        total.backward()
    assert ROWS_OF_A_CHUNK * VOCAB <= largest.num_elements < 200 * VOCAB / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_are_those_of_whole_logits_and_so_are_their_gradients(dtype):
    hidden_TD, head_VD, labels_T = inputs(dtype)
    found_T = token_logprobs(hidden_TD, head_VD, labels_T)
    logits_TV = torch.nn.functional.linear(hidden_TD, head_VD)
    chosen_T = logits_TV.double().log_softmax(dim=-1).gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
    expected_T = chosen_T.masked_fill(labels_T == IGNORED, 0.0)
    assert found_T.dtype is torch.float64
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float32 else TOLERANCE[dtype]
    torch.testing.assert_close(found_T, expected_T, **tolerance)
    weights_T = torch.randn(TOKENS, dtype=torch.float64)
    gradients = [torch.autograd.grad((t * weights_T).sum(), (hidden_TD, head_VD)) for t in (found_T, expected_T)]
    torch.testing.assert_close(*gradients, **(TOLERANCE[dtype] | {"atol": 5e-2 if dtype is torch.bfloat16 else 1e-5}))


def test_the_loss_is_what_the_log_probabilities_sum_to():
    hidden_TD, head_VD, labels_T = inputs()
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden_TD, head_VD, labels_T)
        logprobs_T = token_logprobs(hidden_TD, head_VD, labels_T)
    assert float(total) == pytest.approx(-float(logprobs_T.sum()), rel=1e-6)
