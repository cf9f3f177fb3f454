"""Attention against a softmax written out token by token, over packed tokens and over pages; values and gradients."""

import math
from itertools import accumulate, pairwise

import pytest
import torch

from freehold.ops.attention import (
    KEY_LANES,
    PAGE_TOKENS,
    attend,
    attention,
    attention_over,
    attention_side_by_side,
    read_keys,
    read_values,
    write_keys,
    write_values,
)

# float32: the sums of one row in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
# bfloat16: one rounding of the result and one of the probabilities.
BFLOAT16_TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}

HEADS = [
    pytest.param(4, 4, id="as-many-kv-heads"),
    pytest.param(6, 2, id="groups-of-three"),
    pytest.param(4, 1, id="one-kv-head"),
]


def naive(q_LHK, k_MJK, v_MJK):
    """The last L of M tokens, each over all tokens up to itself, one head and one token at a time."""
    length, num_heads, head_dim = q_LHK.shape
    before = len(k_MJK) - length
    rows = []
    for token in range(length):
        heads = []
        for head in range(num_heads):
            kv_head = head // (num_heads // k_MJK.shape[1])
            seen = slice(0, before + token + 1)
            scores = [float(q_LHK[token, head] @ key) / math.sqrt(head_dim) for key in k_MJK[seen, kv_head]]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
            heads.append((weights[:, None] * v_MJK[seen, kv_head]).sum(dim=0))
        rows.append(torch.stack(heads))
    return torch.stack(rows).float()


def random_qkv(length, num_heads, num_kv_heads, *, total=None, head_dim=8):
    q_LHK = torch.randn(length, num_heads, head_dim)
    k_MJK, v_MJK = (torch.randn(total or length, num_kv_heads, head_dim) for _ in range(2))
    return q_LHK, k_MJK, v_MJK


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize(("length", "total"), [(1, 1), (5, 5), (1, 7), (3, 7), (6, 7)])
def test_attend_is_the_softmax_written_out(num_heads, num_kv_heads, length, total):
    q_LHK, k_MJK, v_MJK = random_qkv(length, num_heads, num_kv_heads, total=total)
    torch.testing.assert_close(attend(q_LHK, k_MJK, v_MJK), naive(q_LHK, k_MJK, v_MJK), **TOLERANCE)


def test_bfloat16_differs_by_its_rounding_alone():
    q_LHK, k_MJK, v_MJK = (t.bfloat16() for t in random_qkv(9, 4, 2))
    out_LHK = attend(q_LHK, k_MJK, v_MJK)
    assert out_LHK.dtype is torch.bfloat16
    expected_LHK = naive(q_LHK.float(), k_MJK.float(), v_MJK.float())
    torch.testing.assert_close(out_LHK.float(), expected_LHK, **BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("lengths", [[4], [1, 1, 1], [3, 1, 5], [1, 6]], ids=str)
def test_packed_spans_do_not_see_each_other(lengths):
    q_THK, k_TJK, v_TJK = random_qkv(sum(lengths), 4, 2)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    expected = torch.cat([naive(q_THK[i:j], k_TJK[i:j], v_TJK[i:j]) for i, j in spans])
    torch.testing.assert_close(attention(q_THK, k_TJK, v_TJK, spans=spans), expected, **TOLERANCE)


def test_gradients_stay_within_their_span():
    q_THK, k_TJK, v_TJK = (t.requires_grad_(True) for t in random_qkv(7, 4, 2))
    attention(q_THK, k_TJK, v_TJK, spans=[(0, 4), (4, 7)])[4:].square().sum().backward()
    for tensor in (q_THK, k_TJK, v_TJK):
        assert tensor.grad[:4].count_nonzero() == 0
        assert tensor.grad[4:].count_nonzero() > 0


def test_gradients_equal_those_of_the_whole_score_matrix():
    q_LHK, k_LJK, v_LJK = (t.requires_grad_(True) for t in random_qkv(6, 4, 2))
    scores = torch.einsum("lhk,mhk->hlm", q_LHK, k_LJK.repeat_interleave(2, dim=1)) / math.sqrt(8)
    weights = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
    expected_LHK = torch.einsum("hlm,mhk->lhk", weights, v_LJK.repeat_interleave(2, dim=1))
    inputs = (q_LHK, k_LJK, v_LJK)
    expected = torch.autograd.grad(expected_LHK.square().sum(), inputs)
    found = torch.autograd.grad(attention(q_LHK, k_LJK, v_LJK, spans=[(0, 6)]).square().sum(), inputs)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def empty_pages(num_pages, page_size, *, num_kv_heads=2, head_dim=8):
    """Return pages for keys and for values, where reading what was not written shows."""
    keys = torch.full((num_pages, num_kv_heads, page_size // KEY_LANES, head_dim, KEY_LANES), torch.nan)
    return keys, torch.full((num_pages, num_kv_heads, page_size, head_dim), torch.nan)


@pytest.mark.parametrize("page_size", [PAGE_TOKENS, 3 * PAGE_TOKENS])
def test_pages_in_any_order_give_what_lies_in_them(page_size):
    ends, lengths = [70, 40, 1], [2, 1, 1]
    counts = [-(-end // page_size) for end in ends]
    shuffled = torch.randperm(sum(counts)).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    key_pages, value_pages = empty_pages(sum(counts), page_size)
    queries, expected = [], []
    for row, end, length in zip(pages, ends, lengths, strict=True):
        q_LHK, k_MJK, v_MJK = random_qkv(length, 4, 2, total=end)
        rows = torch.tensor([row[i // page_size] * page_size + i % page_size for i in range(end)])
        write_keys(key_pages, k_MJK, rows)
        write_values(value_pages, v_MJK, rows)
        queries.append(q_LHK)
        expected.append(naive(q_LHK, k_MJK, v_MJK))
    owned = [(read_keys(key_pages, row), read_values(value_pages, row)) for row in pages]
    out_THK = attention_over(torch.cat(queries), owned, spans=[(0, 2), (2, 3), (3, 4)], ends=ends)
    torch.testing.assert_close(out_THK, torch.cat(expected), **TOLERANCE)


def test_writing_pages_touches_only_the_rows_named():
    key_pages, value_pages = empty_pages(3, PAGE_TOKENS)
    rows = torch.tensor([2 * PAGE_TOKENS + 17, 0])
    write_keys(key_pages, torch.ones(2, 2, 8), rows)
    write_values(value_pages, torch.ones(2, 2, 8), rows)
    for read in (read_keys(key_pages, [0, 1, 2]), read_values(value_pages, [0, 1, 2])):
        assert read.isfinite().all(dim=(1, 2)).nonzero().flatten().tolist() == sorted(rows.tolist())
        assert read.isfinite().sum() == 2 * 2 * 8


def test_sixteen_keys_lie_side_by_side_in_a_page():
    """As native/attention.h says it, for kernels read the same pages."""
    key_pages, value_pages = empty_pages(2, PAGE_TOKENS)
    k_MJK, v_MJK = torch.randn(PAGE_TOKENS, 2, 8), torch.randn(PAGE_TOKENS, 2, 8)
    rows = torch.arange(PAGE_TOKENS, 2 * PAGE_TOKENS)
    write_keys(key_pages, k_MJK, rows)
    write_values(value_pages, v_MJK, rows)
    assert torch.equal(key_pages[1, 1, 1, 5], k_MJK[KEY_LANES : 2 * KEY_LANES, 1, 5])
    assert torch.equal(value_pages[1, 1, 19], v_MJK[19, 1])
    assert torch.equal(read_keys(key_pages, [1]), k_MJK)
    assert torch.equal(read_values(value_pages, [1]), v_MJK)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", [[1], [3, 1, 7, 2]], ids=["one-token", "packed"])
def test_spans_side_by_side_give_what_each_gives_alone(num_heads, num_kv_heads, lengths):
    leaves = [heads.requires_grad_(True) for heads in random_qkv(sum(lengths), num_heads, num_kv_heads)]
    starts = (0, *accumulate(lengths))
    found, expected = attention_side_by_side(*leaves, starts=starts), attention(*leaves, spans=list(pairwise(starts)))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    weight_THK = torch.randn_like(found)
    gradients = [torch.autograd.grad((mixed * weight_THK).sum(), leaves) for mixed in (found, expected)]
    torch.testing.assert_close(*gradients, **TOLERANCE)
