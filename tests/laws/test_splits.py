"""Prefill = decode at the places where it could break: page boundaries, the width of the convolution, the chunks."""

import pytest
import torch

from freehold.evaluate.laws import Trace, relative_difference, trace
from freehold.models.layout import Capacity, Layout, allocate_states
from freehold.ops.attention import PAGE_TOKENS
from freehold.ops.ssm import CHUNK_LENGTH
from models.forms import FORMS, running
from models.tiny import LLAMA, MTP, NEMOTRON, QWEN, random_tokens, tiny_decoder

# What a split may change. Kernels: nothing. References, in float32: sums in another order over at most six blocks,
# 2e-6 at most.
TOLERANCES = dict.fromkeys(FORMS, 0.0) | {"off": 1e-5}

PAGE = PAGE_TOKENS
PAGED_SPLITS = {
    "at-each-page": [PAGE, PAGE, PAGE, PAGE],
    "one-before-a-page": [PAGE - 1, PAGE, PAGE, PAGE + 1],
    "one-after-a-page": [PAGE + 1, PAGE, PAGE, PAGE - 1],
    "one-token-then-all": [1, 4 * PAGE - 1],
    "all-then-one-token": [4 * PAGE - 1, 1],
    "decode-across-a-page": [PAGE - 2, 1, 1, 1, 1, 3 * PAGE - 2],
    "decode": [1] * (4 * PAGE),
}
FAMILIES = {"llama": LLAMA, "qwen": QWEN, "nemotron": NEMOTRON}
MAMBA = NEMOTRON | {"hybrid_override_pattern": "MMM"}


@pytest.fixture(params=TOLERANCES)
def tolerance(request):
    """Run the test once in each form and once by the references; what it may measure then."""
    with running(request.param):
        yield TOLERANCES[request.param]


def worst(found: Trace, expected: Trace) -> float:
    pairs = zip((found.hidden_LD, *found.states), (expected.hidden_LD, *expected.states), strict=True)
    return max(relative_difference(a, b) for a, b in pairs)


@pytest.mark.parametrize("parts", PAGED_SPLITS.values(), ids=PAGED_SPLITS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_any_split_over_pages_gives_the_same_values_and_states(config, parts, tolerance):
    decoder, tokens_L = tiny_decoder(config), random_tokens(4 * PAGE)
    whole = trace(decoder, tokens_L, parts=[4 * PAGE], page_size=4 * PAGE)
    assert worst(trace(decoder, tokens_L, parts=parts, page_size=PAGE), whole) <= tolerance


@pytest.mark.parametrize("page_size", [PAGE, 2 * PAGE, 3 * PAGE, 8 * PAGE])
def test_the_size_of_a_page_changes_nothing(page_size, tolerance):
    decoder, tokens_L = tiny_decoder(LLAMA), random_tokens(100)
    whole = trace(decoder, tokens_L, parts=[100], page_size=4 * PAGE)
    found = trace(decoder, tokens_L, parts=[45, 1, 54], page_size=page_size, neighbours=[random_tokens(51, seed=2)])
    assert worst(found, whole) <= tolerance


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("second", [1, 2, 3, 4])
def test_a_split_inside_and_at_the_width_of_the_convolution_changes_nothing(first, second, tolerance):
    decoder, tokens_L = tiny_decoder(MAMBA), random_tokens(12)
    whole = trace(decoder, tokens_L, parts=[12])
    found = trace(decoder, tokens_L, parts=[first, second, 12 - first - second])
    assert worst(found, whole) <= tolerance


@pytest.mark.parametrize("first", [CHUNK_LENGTH - 1, CHUNK_LENGTH, CHUNK_LENGTH + 1, 2 * CHUNK_LENGTH])
def test_a_split_around_the_chunks_of_the_scan_changes_nothing(first, tolerance):
    length = 2 * CHUNK_LENGTH + 5
    decoder, tokens_L = tiny_decoder(MAMBA), random_tokens(length)
    whole = trace(decoder, tokens_L, parts=[length])
    assert worst(trace(decoder, tokens_L, parts=[first, length - first]), whole) <= tolerance


def test_a_sequence_shorter_than_the_convolution_leaves_a_tail_that_begins_with_zeros():
    decoder = tiny_decoder(MAMBA)
    tail_YC, _ = trace(decoder, random_tokens(2), parts=[2]).states[:2]
    assert tail_YC[0].count_nonzero() == 0
    assert tail_YC[1:].count_nonzero(dim=1).tolist() == [tail_YC.shape[1]] * 2


def test_a_batch_of_prefill_and_decode_gives_each_sequence_its_own_values(tolerance):
    decoder = tiny_decoder(NEMOTRON)
    tokens_L = random_tokens(14)
    parts = [5, 1, 7, 1]
    alone = trace(decoder, tokens_L, parts=parts)
    neighbours = [random_tokens(length, seed=length) for length in (3, 8, 1)]
    assert worst(trace(decoder, tokens_L, parts=parts, neighbours=neighbours), alone) <= tolerance


def test_the_mtp_module_gives_the_same_drafts_at_once_and_one_by_one(tolerance):
    decoder, length, page_size = tiny_decoder(MTP), 80, PAGE
    tokens_L = random_tokens(length + 1)
    at_once = Layout.packed([length])
    with torch.no_grad():
        hidden_LD = decoder(tokens_L[:-1], at_once)
        next_LD = decoder.embeddings(tokens_L[1:])
        expected_LD = decoder.mtp(hidden_LD, next_LD, at_once)
        states = mtp_states(decoder, num_pages=3, page_size=page_size)
        steps = [
            decoder.mtp(hidden_LD[i : i + 1], next_LD[i : i + 1], step_at(i, [2, 0, 1], page_size), states)
            for i in range(length)
        ]
    assert relative_difference(torch.cat(steps), expected_LD) <= tolerance


def mtp_states(decoder, *, num_pages, page_size):
    capacity = Capacity(num_slots=1, num_pages=num_pages, page_size=page_size)
    return allocate_states(decoder.spec.mtp.blocks, capacity, dtype=decoder.dtype, device="cpu")


def step_at(position: int, pages: list[int], page_size: int) -> Layout:
    return Layout.step([1], [position], slots=[0], pages=[pages], page_size=page_size)
