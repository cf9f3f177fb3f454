"""Causal attention with grouped key/value heads, over packed tokens and over pages.

Belongs here: the products and the softmax. Not here: projections, positions, and who owns which page.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from freehold.ops.linear import linear
from freehold.ops.native import Batch, extension, keeps_rows_apart, kernels
from freehold.ops.pieces import whole

KEY_LANES = 16  # keys that lie side by side in a page
PAGE_TOKENS = 32  # a page holds a multiple of so many tokens
SMALLEST_MAGNITUDE = 4e-37  # below it 127 over a magnitude is no float32, and a head counts as zeros (native/rows.h)
# How many times their tokens may spans take side by side: one long one among many short ones would fill the memory.
MOST_FILLED = 8
# Not cuDNN's: it plans anew for each shape, 20 ms, and every step packs other lengths.
KERNELS_OF_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Keys, values, and what scales each where they are int8, as `models.layout.PagedKV` holds them.
Pages = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def attention(q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, *, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return causal attention within each span of packed tokens; spans do not see each other.

    Shapes: [T, H, K]; query head h reads key/value head h // (H / J).
    Precision: scores and softmax as torch's scaled_dot_product_attention keeps them (float32 inside).
    Paper: Vaswani et al., 2017, arXiv 1706.03762, section 3.2.1; grouped heads: Ainslie et al., 2023, arXiv 2305.13245.
    """
    longest = max(stop - start for start, stop in spans)
    if q_THK.is_cuda and len(spans) > 1 and len(spans) * longest <= MOST_FILLED * len(q_THK):
        return attention_side_by_side(q_THK, k_TJK, v_TJK, starts=(0, *(stop for _, stop in spans)))
    outputs = [attend(q_THK[i:j], k_TJK[i:j], v_TJK[i:j]) for i, j in spans]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attention_side_by_side(q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, *, starts: tuple[int, ...]) -> Tensor:
    """Return `attention` of the same arguments, all spans in one call, each filled up to the longest, as GPUs want it.

    starts: the first token of each span, and the end of the last. What fills a span up comes after it, where no token
    of it looks.
    """
    sequences = whole(starts, q_THK.device)
    q_BHLK, k_BJLK, v_BJLK = (sequences.spread(heads).transpose(1, 2) for heads in (q_THK, k_TJK, v_TJK))
    with sdpa_kernel(KERNELS_OF_ANY_SHAPE):
        mixed_BHLK = scaled_dot_product_attention(q_BHLK, k_BJLK, v_BJLK, is_causal=True, enable_gqa=True)
    return sequences.gather(mixed_BHLK.transpose(1, 2))


def attention_anew(
    q_THK: Tensor,
    k_TJK: Tensor,
    v_TJK: Tensor,
    rotation: Tensor | None,
    *,
    starts: Sequence[int],
    page_dtype: torch.dtype,
) -> Tensor:
    """Return the attention of whole sequences, [T, H, K], as the kernels compute it over pages, rotation included.

    Shapes: queries, keys and values float32; rotation as `ops.mixers.Program.add_attention` takes it. starts: as in
        `Layout`.
    Precision: keys and values are rounded to page_dtype, as pages hold them; all else is float32. The gradient passes
        through that rounding as if it were none.
    """
    mixed_THK: Tensor = _AttentionAnew.apply(  # type: ignore[no-untyped-call]
        q_THK, k_TJK, v_TJK, rotation, tuple(starts), page_dtype
    )
    return mixed_THK


def attention_over_pages(
    q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, rotation: Tensor | None, *, batch: Batch, pages: Pages
) -> Tensor:
    """Return the attention of sequences over their pages, [T, H, K], by the kernels, rotation included.

    Arguments as those of `attention_anew`. Mutates: pages, which gain these keys and values.
    """
    form, mixed_THK, (_, num_heads, head_dim) = kernels(), torch.empty_like(q_THK), q_THK.shape
    assert form is not None, "the caller has asked"
    qkv_TNK = torch.cat((q_THK, k_TJK, v_TJK), dim=1)
    sizes = num_heads, k_TJK.shape[1], head_dim
    call = _native_attention(sizes, batch, (qkv_TNK, rotation, mixed_THK, None), pages, page_dtype=pages[0].dtype)
    form.attention(torch.get_num_threads(), call)
    return mixed_THK


class _AttentionAnew(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_TJK: Tensor,
        v_TJK: Tensor,
        rotation: Tensor | None,
        starts: tuple[int, ...],
        page_dtype: torch.dtype,
    ) -> Tensor:
        num_tokens, num_heads, head_dim = q_THK.shape
        counts = [-(-(stop - start) // PAGE_TOKENS) for start, stop in pairwise(starts)]
        pages = torch.empty(2, sum(counts), k_TJK.shape[1], PAGE_TOKENS, head_dim, dtype=page_dtype)
        ctx.sizes, ctx.page_dtype = (num_heads, k_TJK.shape[1], head_dim), page_dtype
        ctx.batch = _batch_anew(starts, counts)
        qkv_TNK = torch.cat((q_THK, k_TJK, v_TJK), dim=1)  # whose queries are turned in place
        saved = qkv_TNK, rotation, torch.empty_like(q_THK), torch.empty(num_tokens, num_heads)
        ctx.save_for_backward(*saved)
        form = kernels()
        assert form is not None, "the caller has asked"
        call = _native_attention(ctx.sizes, ctx.batch, saved, (*pages, None, None), page_dtype=page_dtype)
        form.attention(torch.get_num_threads(), call)
        return saved[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        form, gradient_THK = kernels(), gradients[0].contiguous()
        assert form is not None, "the forward ran on it"
        saved, (num_heads, num_kv_heads, _) = ctx.saved_tensors, ctx.sizes
        found_TNK = torch.empty_like(saved[0])
        call = _native_attention(ctx.sizes, ctx.batch, saved, (None,) * 4, page_dtype=ctx.page_dtype)
        form.attention_gradient(torch.get_num_threads(), call, gradient_THK.data_ptr(), found_TNK.data_ptr())
        return *found_TNK.split((num_heads, num_kv_heads, num_kv_heads), dim=1), None, None, None


def _batch_anew(starts: tuple[int, ...], page_counts: Sequence[int]) -> Batch:
    """Return whole sequences as kernels read them, with pages of their own, one after the other."""
    pages, first = [], 0
    for count in page_counts:
        pages.append(range(first, first + count))
        first += count
    zeros = (0,) * len(page_counts)
    return Batch(starts=starts, contexts=zeros, slots=zeros, pages=pages, page_size=PAGE_TOKENS)


def _native_attention(
    sizes: tuple[int, int, int],
    batch: Batch,
    tensors: Sequence[Tensor | None],
    pages: Sequence[Tensor | None],
    *,
    page_dtype: torch.dtype,
) -> Any:
    """Return a call of H query heads over J key/value heads of K.

    tensors: queries, keys and values side by side; rotation; the output; the logarithms of the sums, where wanted.
    """
    qkv, rotation, out, log_sums, *pools = (0 if t is None else t.data_ptr() for t in (*tensors, *pages))
    page_element = getattr(extension().PageElement, str(page_dtype).removeprefix("torch."))
    return extension().attention(*sizes, rotation, batch.native, qkv, page_element, *pools, out, log_sums)


def attention_over(
    q_THK: Tensor,
    owned: Sequence[tuple[Tensor, Tensor]],
    *,
    spans: Sequence[tuple[int, int]],
    ends: Sequence[int],
) -> Tensor:
    """Return attention of each span over the first `ends[b]` of its keys and values, its own tokens the last of them.

    Shapes: owned holds [M, J, K] twice for each span; the result is [T, H, K].
    """
    outputs = [
        attend(q_THK[i:j], k_MJK[:end].to(q_THK.dtype), v_MJK[:end].to(q_THK.dtype))
        for (i, j), end, (k_MJK, v_MJK) in zip(spans, ends, owned, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def write_keys(key_pages: Tensor, k_TJK: Tensor, rows_T: Tensor) -> None:
    """Write each token's keys into its row of the page pool.

    Mutates: key_pages [pages, J, page_size / 16, K, 16], rows counted over pages and their tokens.
    """
    page_size = key_pages.shape[2] * KEY_LANES
    block_T, lane_T = rows_T % page_size // KEY_LANES, rows_T % KEY_LANES
    key_pages[rows_T // page_size, :, block_T, :, lane_T] = k_TJK.to(key_pages.dtype)


def write_values(value_pages: Tensor, v_TJK: Tensor, rows_T: Tensor) -> None:
    """Write each token's values into its row of the page pool.

    Mutates: value_pages [pages, J, page_size, K], rows counted over pages and their tokens.
    """
    page_size = value_pages.shape[2]
    value_pages[rows_T // page_size, :, rows_T % page_size] = v_TJK.to(value_pages.dtype)


def read_keys(key_pages: Tensor, row: Sequence[int]) -> Tensor:
    """Return the keys [M, J, K] of all tokens that some pages have room for, page after page."""
    return key_pages[list(row)].permute(0, 2, 4, 1, 3).flatten(0, 2)


def read_values(value_pages: Tensor, row: Sequence[int]) -> Tensor:
    """Return the values [M, J, K] of all tokens that some pages have room for, page after page."""
    return value_pages[list(row)].transpose(1, 2).flatten(0, 1)


def round_heads(x_TJK: Tensor) -> tuple[Tensor, Tensor]:
    """Return heads as int8, and the float32 scales [T, J] that they are times.

    A scale is the head's largest magnitude / 127, NaN where one is no finite number; ties round to even.
    """
    wide_TJK = x_TJK.float()
    largest_TJ = wide_TJK.abs().amax(dim=-1)
    is_zero_TJ = largest_TJ < SMALLEST_MAGNITUDE
    scale_TJ = torch.where(is_zero_TJ, 0.0, largest_TJ / 127).where(largest_TJ.isfinite(), torch.nan)
    factor_TJ = torch.where(is_zero_TJ, 0.0, 127 / largest_TJ)
    values_TJK = (wide_TJK * factor_TJ[..., None]).round()
    return values_TJK.where(largest_TJ.isfinite()[..., None], 0.0).to(torch.int8), scale_TJ


def write_scales(scale_pages: Tensor, scale_TJ: Tensor, rows_T: Tensor) -> None:
    """Write each token's scales into its row. Mutates: scale_pages [pages, J, page_size]."""
    page_size = scale_pages.shape[2]
    scale_pages[rows_T // page_size, :, rows_T % page_size] = scale_TJ


def read_scales(scale_pages: Tensor, row: Sequence[int]) -> Tensor:
    """Return the scales [M, J] of all tokens that some pages have room for, page after page."""
    return scale_pages[list(row)].transpose(1, 2).flatten(0, 1)


def attend(q_LHK: Tensor, k_MJK: Tensor, v_MJK: Tensor) -> Tensor:
    """Return attention of the last L of M tokens over all that precede each of them, itself included.

         m 0 1 2 3 4
    l = 0  x x x . .      M = 5, L = 3
    l = 1  x x x x .
    l = 2  x x x x x
    """
    length, num_heads, _ = q_LHK.shape
    num_tokens, num_kv_heads, _ = k_MJK.shape
    k_JMK, v_JMK = k_MJK.transpose(0, 1), v_MJK.transpose(0, 1)
    if keeps_rows_apart(q_LHK):
        k_JMK, v_JMK = k_JMK.contiguous(), v_JMK.contiguous()  # bits depend on how they lie, too
        ends = enumerate(range(num_tokens - length + 1, num_tokens + 1))
        return torch.cat([_attend_apart(q_LHK[i : i + 1], k_JMK[:, :end], v_JMK[:, :end]) for i, end in ends])
    if length == 1:
        return _attend_last(q_LHK, k_JMK, v_JMK)
    q_HLK = q_LHK.transpose(0, 1)[None]
    group = num_heads // num_kv_heads
    k_HMK = k_JMK.repeat_interleave(group, dim=0)[None]
    v_HMK = v_JMK.repeat_interleave(group, dim=0)[None]
    if length == num_tokens:
        out_HLK = scaled_dot_product_attention(q_HLK, k_HMK, v_HMK, is_causal=True)
    else:
        seen_LM = torch.ones(length, num_tokens, dtype=torch.bool, device=q_LHK.device).tril(num_tokens - length)
        out_HLK = scaled_dot_product_attention(q_HLK, k_HMK, v_HMK, attn_mask=seen_LM)
    return out_HLK[0].transpose(0, 1)


def _attend_last(q_1HK: Tensor, k_JMK: Tensor, v_JMK: Tensor) -> Tensor:
    """Return attention of one token over all; a key head's query heads take the place of tokens: keys are read once."""
    q_JQK = q_1HK.view(len(k_JMK), -1, q_1HK.shape[-1])
    return scaled_dot_product_attention(q_JQK[None], k_JMK[None], v_JMK[None]).reshape(q_1HK.shape)


def _attend_apart(q_1HK: Tensor, k_JMK: Tensor, v_JMK: Tensor) -> Tensor:
    """Return `_attend_last` in float32 by products whose bits no number of threads decides, as that of torch does."""
    q_JQK = q_1HK.view(len(k_JMK), -1, q_1HK.shape[-1]).float() * q_1HK.shape[-1] ** -0.5
    heads = zip(q_JQK, k_JMK.float(), v_JMK.float().mT.contiguous(), strict=True)
    mixed = [linear(linear(q_QK, k_MK).softmax(dim=-1), v_KM) for q_QK, k_MK, v_KM in heads]
    return torch.cat(mixed).view(q_1HK.shape).to(q_1HK.dtype)
