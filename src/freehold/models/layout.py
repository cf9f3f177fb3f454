"""How packed tokens divide into sequences, and the states that those sequences carry between steps.

Belongs here: `Layout`; `PagedKV`, `Recurrent` and `ExpertLoad`, and what allocates and measures states. Not here: who
runs when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from freehold.models.spec import AttentionSpec, BlockSpec, Mamba2Spec
from freehold.ops.attention import (
    KEY_LANES,
    PAGE_TOKENS,
    read_keys,
    read_scales,
    read_values,
    round_heads,
    write_keys,
    write_scales,
    write_values,
)
from freehold.ops.mixers import Program
from freehold.ops.native import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How `T` packed tokens divide into `B` sequences; the only description of a batch that a model sees.

        tokens     a0 a1 a2 | b0 | c0 c1
        starts     0          3    4      6
        contexts   0          7    5           b has 7 tokens behind it, c has 5
        positions  0  1  2    7    5  6

    starts: first token of each sequence, and the end of the last: B + 1 integers.
    contexts: tokens that each sequence already has in the states: B integers, all zero without state.
    device: the model's.
    slots, pages, page_size: for a step with state, which entry of each `Recurrent` and which pages of each `PagedKV`
        belong to each sequence, pages in order of position, and how many tokens a page holds.
    """

    starts: tuple[int, ...]
    contexts: tuple[int, ...]
    device: torch.device | str = "cpu"
    slots: tuple[int, ...] = ()
    pages: tuple[tuple[int, ...], ...] = ()
    page_size: int = 0

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Return the layout of whole sequences without state, as in training or a single scoring pass."""
        assert min(lengths, default=0) > 0, "there is a sequence, and every one has at least one token"
        return Layout(starts=(0, *accumulate(lengths)), contexts=(0,) * len(lengths), device=device)

    @staticmethod
    def step(
        lengths: Sequence[int],
        contexts: Sequence[int],
        *,
        slots: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """Return the layout of a step with state: sequence b adds `lengths[b]` tokens after its first `contexts[b]`."""
        assert min(lengths, default=0) > 0, "there is a sequence, and every one has at least one token"
        ends = [context + length for context, length in zip(contexts, lengths, strict=True)]
        owned = [page_size * len(row) for row in pages]
        assert all(end <= size for end, size in zip(ends, owned, strict=True)), "a sequence outgrows its pages"
        return Layout(
            starts=(0, *accumulate(lengths)),
            contexts=tuple(contexts),
            device=device,
            slots=tuple(slots),
            pages=tuple(tuple(row) for row in pages),
            page_size=page_size,
        )

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def is_decode(self) -> bool:
        """True where every sequence has exactly one token."""
        return self.num_tokens == self.num_sequences

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that each sequence has after this step."""
        return tuple(c + stop - start for c, (start, stop) in zip(self.contexts, self.spans, strict=True))

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Half-open interval of packed tokens of each sequence."""
        return tuple(pairwise(self.starts))

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token in its sequence, int64, on the model's device."""
        runs = [torch.arange(start, end) for start, end in zip(self.contexts, self.ends, strict=True)]
        return torch.cat(runs).to(self.device)

    @cached_property
    def slots_B(self) -> Tensor:
        """The slots as a tensor on the model's device."""
        return torch.tensor(self.slots, device=self.device)

    @cached_property
    def batch(self) -> Batch:
        """This layout as kernels read it."""
        return Batch(
            starts=self.starts,
            contexts=self.contexts,
            slots=self.slots,
            pages=self.pages,
            page_size=self.page_size,
        )

    @cached_property
    def with_own_states(self) -> "Layout":
        """This layout of whole sequences, with pages and slots for states that live as long as one block runs.

        Kernels know one way to meet keys and values, through pages, with state and without.
        """
        assert not any(self.contexts), "a sequence that goes on has states already"
        counts = [-(-end // PAGE_TOKENS) for end in self.ends]
        firsts = [0, *accumulate(counts)]
        pages = tuple(tuple(range(first, first + count)) for first, count in zip(firsts, counts, strict=False))
        slots = tuple(range(self.num_sequences))
        return replace(self, slots=slots, pages=pages, page_size=PAGE_TOKENS)

    @property
    def own_capacity(self) -> "Capacity":
        """The states that `with_own_states` counts on."""
        num_pages = sum(map(len, self.pages))
        return Capacity(num_slots=self.num_sequences, num_pages=num_pages, page_size=self.page_size)

    @cached_property
    def rows_T(self) -> Tensor:
        """Row of each token in a page pool seen as [pages * page_size, J, K]."""
        rows = [
            self.pages[b][position // self.page_size] * self.page_size + position % self.page_size
            for b in range(self.num_sequences)
            for position in range(self.contexts[b], self.ends[b])
        ]
        return torch.tensor(rows, device=self.device)


@dataclass(frozen=True, kw_only=True)
class PagedKV:
    """Keys and values of one attention block, in pages that sequences own through `Layout.pages`.

    Shapes: key_pages [pages, J, page_size / 16, K, 16], sixteen keys side by side;
        value_pages [pages, J, page_size, K]; of int8 pages also float32 scales [pages, J, page_size].
    """

    key_pages: Tensor
    value_pages: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def pools(self) -> tuple[Tensor, ...]:
        """Everything that lies in pages, by page."""
        pools = (self.key_pages, self.value_pages, self.key_scales, self.value_scales)
        return tuple(pool for pool in pools if pool is not None)

    def grown(self, num_pages: int) -> "PagedKV":
        """Return a copy with room for more pages, those that there are first."""

        def grow(pool: Tensor) -> Tensor:
            larger = pool.new_empty(num_pages, *pool.shape[1:])
            larger[: len(pool)] = pool
            return larger

        return PagedKV(
            key_pages=grow(self.key_pages),
            value_pages=grow(self.value_pages),
            key_scales=None if self.key_scales is None else grow(self.key_scales),
            value_scales=None if self.value_scales is None else grow(self.value_scales),
        )

    def write(self, k_TJK: Tensor, v_TJK: Tensor, rows_T: Tensor) -> None:
        """Write each token's keys and values into its row, counted over pages and their tokens. Mutates: the pools."""
        if self.key_scales is not None and self.value_scales is not None:
            k_TJK, key_scale_TJ = round_heads(k_TJK)
            v_TJK, value_scale_TJ = round_heads(v_TJK)
            write_scales(self.key_scales, key_scale_TJ, rows_T)
            write_scales(self.value_scales, value_scale_TJ, rows_T)
        write_keys(self.key_pages, k_TJK, rows_T)
        write_values(self.value_pages, v_TJK, rows_T)

    def read(self, row: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return keys and values [M, J, K] of all tokens that some pages have room for; float32 where they are int8."""
        k_MJK, v_MJK = read_keys(self.key_pages, row), read_values(self.value_pages, row)
        if self.key_scales is not None and self.value_scales is not None:
            k_MJK = k_MJK * read_scales(self.key_scales, row)[..., None]
            v_MJK = v_MJK * read_scales(self.value_scales, row)[..., None]
        return k_MJK, v_MJK

    @property
    def num_tokens(self) -> int:
        """Tokens that all pages have room for."""
        return self.value_pages.shape[0] * self.value_pages.shape[2]


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """State of one Mamba-2 block: the last W-1 rows before the convolution, and the SSM state.

    Shapes: conv_tail [slots, W-1, C] in the model's dtype, ssm [slots, H, N, P].
    Precision: ssm is float32, for it is a running sum over the whole sequence.
    """

    conv_tail: Tensor
    ssm: Tensor


class ExpertLoad:
    """What the tokens of a training step asked of one block of experts; every forward that is given it adds to it.

    counts: int64 [E], tokens that chose each expert. balance: the sum over tokens of `ops.moe.balance_loss`.
    No dataclass: FSDP2 hands copies of those to a block, and what is added to a copy is lost.
    """

    def __init__(self, *, counts: Tensor, balance: Tensor):
        self.counts, self.balance = counts, balance


State = PagedKV | Recurrent | ExpertLoad | None


class States(tuple[State, ...]):
    """The states of a decoder, one entry per block.

    program: the decoder as one native call over these states, once it has been put together; the weights that
    the decoder has at that time are those that it keeps using, until an adapter that added nothing then learns.
    """

    program: Program | None = None


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How much state to allocate: sequences at once, pages for all of them, and tokens per page."""

    num_slots: int
    num_pages: int
    page_size: int

    def __post_init__(self) -> None:
        assert self.page_size % PAGE_TOKENS == 0, f"a page of {self.page_size} tokens is no multiple of {PAGE_TOKENS}"


def allocate_states(
    blocks: Sequence[BlockSpec],
    capacity: Capacity,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    kv_dtype: torch.dtype | None = None,
) -> States:
    """Return states, one entry per block (None where a block keeps none): recurrent ones zero, pages unwritten.

    kv_dtype: of keys and values, `dtype` or torch.int8; None for `dtype`.
    """
    return States(allocate_state(block, capacity, dtype=dtype, device=device, kv_dtype=kv_dtype) for block in blocks)


def allocate_state(
    block: BlockSpec,
    capacity: Capacity,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    kv_dtype: torch.dtype | None = None,
) -> State:
    """Return the state of one block, None where it keeps none."""
    match block:
        case AttentionSpec():
            pool, blocks_per_page = (capacity.num_pages, block.num_kv_heads), capacity.page_size // KEY_LANES
            kv_dtype = kv_dtype or dtype
            keys = torch.empty(*pool, blocks_per_page, block.head_dim, KEY_LANES, dtype=kv_dtype, device=device)
            values = torch.empty(*pool, capacity.page_size, block.head_dim, dtype=kv_dtype, device=device)
            scales = [
                torch.empty(*pool, capacity.page_size, device=device) if kv_dtype is torch.int8 else None
                for _ in ("keys", "values")
            ]
            return PagedKV(key_pages=keys, value_pages=values, key_scales=scales[0], value_scales=scales[1])
        case Mamba2Spec():
            tail = (capacity.num_slots, block.conv_kernel - 1, block.conv_width)
            ssm = (capacity.num_slots, block.num_heads, block.state_size, block.head_dim)
            return Recurrent(
                conv_tail=torch.zeros(tail, dtype=dtype, device=device),
                ssm=torch.zeros(ssm, dtype=torch.float32, device=device),
            )
        case _:
            return None


def kv_bytes_per_token(blocks: Sequence[BlockSpec], dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of a dtype that one token adds over all attention blocks."""
    scale_bytes = torch.float32.itemsize if dtype is torch.int8 else 0
    return sum(
        2 * b.num_kv_heads * (b.head_dim * dtype.itemsize + scale_bytes) for b in blocks if isinstance(b, AttentionSpec)
    )


def recurrent_bytes_per_sequence(blocks: Sequence[BlockSpec], dtype: torch.dtype) -> int:
    """Return the bytes of convolution tails and SSM states that one sequence holds, whatever its length."""

    def block_bytes(block: Mamba2Spec) -> int:
        ssm = block.num_heads * block.head_dim * block.state_size * torch.float32.itemsize
        return ssm + block.conv_width * (block.conv_kernel - 1) * dtype.itemsize

    return sum(block_bytes(b) for b in blocks if isinstance(b, Mamba2Spec))
