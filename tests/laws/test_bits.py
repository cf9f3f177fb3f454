"""Laws 2 and 3 bit for bit where kernels run: any parts, order, company, pages, slots, threads and form."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch
from hypothesis import given

from freehold.evaluate.laws import company, prefill_equals_decode
from freehold.models.block import Block
from freehold.models.decoder import Decoder
from freehold.models.layout import Capacity, Layout, States
from freehold.ops.attention import PAGE_TOKENS
from freehold.ops.mixers import Program
from freehold.ops.native import Batch
from models.forms import needs_kernels, on_threads
from models.packing import PACKED_LLAMA, PACKED_NEMOTRON, SUPER_QWEN, pack_decoder
from models.schedules import Result, Schedule, alone, run, same, schedules
from models.tiny import CONFIGS, LATENT, LLAMA, NEMOTRON, QWEN, random_tokens, tiny_decoder

pytestmark = needs_kernels

DECODERS: dict[str, Callable[[], Decoder]] = {
    f"{name}-{str(dtype).removeprefix('torch.')}": partial(tiny_decoder, config, dtype=dtype)
    for name, config in (("llama", LLAMA), ("qwen", QWEN), ("nemotron", NEMOTRON), ("latent", LATENT))
    for dtype in (torch.float32, torch.bfloat16)
} | {
    "llama-Q8_0": lambda: pack_decoder(tiny_decoder(PACKED_LLAMA), "Q8_0"),
    "llama-Q4_1-bfloat16": lambda: pack_decoder(tiny_decoder(PACKED_LLAMA, dtype=torch.bfloat16), "Q4_1"),
    "nemotron-Q4_0": lambda: pack_decoder(tiny_decoder(PACKED_NEMOTRON), "Q4_0"),
    "nemotron-BF16": lambda: pack_decoder(tiny_decoder(NEMOTRON, dtype=torch.bfloat16), "BF16"),
    "qwen-Q4_K-tied": lambda: pack_decoder(tiny_decoder(SUPER_QWEN), "Q4_K"),
}
EACH = pytest.mark.parametrize("name", DECODERS)


@cache
def decoder_of(name: str) -> Decoder:
    decoder = DECODERS[name]()
    assert all(block.is_native() for block in decoder.blocks if isinstance(block, Block))
    return decoder


@cache
def result_alone(name: str, tokens: tuple[int, ...]) -> Result:
    return run(decoder_of(name), alone(tokens))[0]


@EACH
@given(schedule=schedules())
def test_a_sequence_has_the_same_bits_on_any_schedule(name, schedule):
    results = run(decoder_of(name), schedule)
    for tokens, found in zip(schedule.sequences, results, strict=True):
        assert same(found, result_alone(name, tokens))


@pytest.mark.parametrize("name", ["llama-float32", "qwen-bfloat16", "nemotron-float32", "llama-Q8_0"])
@given(schedule=schedules())
def test_so_it_has_with_keys_and_values_in_eight_bits(name, schedule):
    decoder = decoder_of(name)
    for tokens, found in zip(schedule.sequences, run(decoder, schedule, torch.int8), strict=True):
        assert same(found, run(decoder, alone(tokens), torch.int8)[0])


@EACH
@given(schedule=schedules())
def test_packed_sequences_without_state_have_the_bits_of_each_with_state(name, schedule):
    decoder, lengths = decoder_of(name), [len(tokens) for tokens in schedule.sequences]
    tokens_T = torch.tensor([token for tokens in schedule.sequences for token in tokens])
    with torch.inference_mode(), on_threads(schedule.steps[0].num_threads):
        hidden = decoder(tokens_T, Layout.packed(lengths)).split(lengths)
    for tokens, found_LD in zip(schedule.sequences, hidden, strict=True):
        assert torch.equal(found_LD, result_alone(name, tokens).hidden_LD)


def step_of(decoder: Decoder, lengths: Sequence[int]) -> tuple[Layout, States]:
    """Return a first step of sequences of these lengths, a page each."""
    count = len(lengths)
    states = decoder.allocate_states(Capacity(num_slots=count, num_pages=count, page_size=PAGE_TOKENS))
    pages = [[b] for b in range(count)]
    return Layout.step(lengths, [0] * count, slots=range(count), pages=pages, page_size=PAGE_TOKENS), states


@EACH
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 3), (1, 1)], ids=str)
def test_what_follows_is_predicted_from_each_last_hidden_state(name, lengths):
    decoder, tokens_T = decoder_of(name), random_tokens(sum(lengths))
    with torch.inference_mode():
        hidden_TD = decoder(tokens_T, *step_of(decoder, lengths))
        expected_BV = decoder.logits(hidden_TD[torch.tensor(lengths).cumsum(0) - 1])
        assert torch.equal(decoder.predict(tokens_T, *step_of(decoder, lengths)), expected_BV)
        assert torch.equal(decoder.predict(tokens_T, Layout.packed(lengths)), expected_BV)


def test_a_model_in_bfloat16_has_the_same_bits_packed_and_not():
    tokens_T, lengths = random_tokens(29), [20, 1, 8]
    found_BV, expected_BV = (
        decoder.predict(tokens_T, *step_of(decoder, lengths))
        for decoder in (decoder_of("nemotron-BF16"), decoder_of("nemotron-bfloat16"))
    )
    assert torch.equal(found_BV, expected_BV)


@pytest.mark.parametrize("unknown", [-1, 10**6])
def test_a_token_that_the_table_has_not_is_refused(unknown):
    decoder = decoder_of("llama-Q8_0")
    with torch.inference_mode(), pytest.raises(IndexError, match=f"token {unknown} of {decoder.spec.vocab_size}"):
        decoder.predict(torch.tensor([1, unknown]), *step_of(decoder, [2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama-narrow-heads"])
def test_the_laws_of_every_model_find_no_difference_at_all(name, dtype):
    decoder = tiny_decoder(CONFIGS[name], dtype=dtype)
    assert [law(decoder, seed=0).measured for law in (prefill_equals_decode, company)] == [0.0, 0.0]


# What the comparison of bits catches: kernels that are told something else than the layout says.


def tell_kernels(monkeypatch, **changes: Callable[[Layout], Sequence]) -> None:
    def told(layout: Layout) -> Batch:
        fields = ("starts", "contexts", "slots", "pages", "page_size")
        return Batch(**{name: changes.get(name, lambda _, n=name: getattr(layout, n))(layout) for name in fields})

    monkeypatch.setattr(Layout, "batch", property(told))


def schedule_of(takes: Sequence[Sequence[tuple[int, int]]]) -> Schedule:
    """Return a schedule of two sequences of 40 tokens whose steps take these."""
    plain = alone(tuple(random_tokens(40).tolist()))
    return Schedule(
        sequences=(plain.sequences[0], tuple(random_tokens(40, seed=1).tolist())),
        steps=tuple(type(plain.steps[0])(takes=tuple(step), num_threads=2) for step in takes),
        page_size=plain.page_size,
        pages=((2, 0), (3, 1)),
        slots=(0, 1),
        form=plain.form,
    )


def breaks(name: str) -> bool:
    """Return whether a schedule with prompts, chunks and tokens gives other bits than each sequence alone."""
    decoder = decoder_of(name)
    schedule = schedule_of([[(0, 33), (1, 1)], [(1, 38), (0, 6)], [(0, 1), (1, 1)]])
    results = run(decoder, schedule)
    expected = [run(decoder, alone(tokens))[0] for tokens in schedule.sequences]
    return not all(same(a, b) for a, b in zip(results, expected, strict=True))


@EACH
def test_what_breaks_below_holds_as_it_is(name):
    assert not breaks(name)


def in_decode_reversed(layout: Layout, values: Sequence) -> Sequence:
    return values[::-1] if layout.is_decode else values


def with_an_early_end(layout: Layout) -> list[int]:
    first, *inner, last = layout.starts
    return [first, *(start - 1 for start in inner), last]


BREAKS = {
    "positions-that-start-anew": ("llama-float32", {"contexts": lambda layout: [0] * layout.num_sequences}),
    "pages-out-of-order": (
        "llama-float32",
        {"pages": lambda layout: [in_decode_reversed(layout, p) for p in layout.pages]},
    ),
    "pages-of-the-neighbour": ("nemotron-float32", {"pages": lambda layout: in_decode_reversed(layout, layout.pages)}),
    "slots-of-the-neighbour": ("nemotron-float32", {"slots": lambda layout: in_decode_reversed(layout, layout.slots)}),
    "a-token-of-the-neighbour": ("nemotron-bfloat16", {"starts": with_an_early_end}),
}


@pytest.mark.parametrize(("name", "changes"), BREAKS.values(), ids=BREAKS)
def test_kernels_with_another_batch_give_other_bits(name, changes, monkeypatch):
    decoder_of(name)
    tell_kernels(monkeypatch, **changes)
    assert breaks(name)


@pytest.mark.parametrize("scale", [1.0, 1 + 2.0**-23], ids=["as-it-is", "one-bit-off"])
def test_one_bit_in_decode_alone_is_found(scale, monkeypatch):
    exact = Program.read

    def read(self, tokens_T, batch, dtype):
        return exact(self, tokens_T, batch, dtype) * (scale if len(tokens_T) == 2 else 1.0)

    monkeypatch.setattr(Program, "read", read)
    assert breaks("llama-float32") is (scale != 1.0)
