"""Sampling: what is drawn over a grid of uniform numbers, what each filter keeps, penalties against transformers'."""

import math
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from freehold.ops.sampling import Drawing, penalize, sample, sample_rows, uniform_draw
from models.forms import FORMS, running

OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
GRID = [(i + 0.5) / 2000 for i in range(2000)]


def drawn(logits_V, **settings):
    """Return how often each token is drawn over an even grid of uniform numbers."""
    return Counter(sample(logits_V, uniform=uniform, **(OPEN | settings)) for uniform in GRID)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_an_even_grid_draws_each_token_as_often_as_its_probability(temperature):
    logits_V = torch.randn(12)
    expected_V = (logits_V / temperature).softmax(dim=0)
    found = drawn(logits_V, temperature=temperature)
    for token, probability in enumerate(expected_V.tolist()):
        assert abs(found[token] / len(GRID) - probability) <= 1 / len(GRID)


def test_seeded_draws_are_distributed_as_their_probabilities():
    logits_V, num_draws = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5]), 4000
    found = Counter(sample(logits_V, uniform=uniform_draw(7, i), **OPEN) for i in range(num_draws))
    expected = (logits_V.softmax(dim=0) * num_draws).tolist()
    chi_square = sum((found[token] - count) ** 2 / count for token, count in enumerate(expected))
    assert chi_square < 18.5  # four degrees of freedom: one seed in a thousand is above


PROBABILITIES = {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}
LOGITS_V = torch.tensor([PROBABILITIES[i] for i in range(5)], dtype=torch.float64).log().float()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.64}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 4}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.24}, {0, 1, 3, 4}),
        ({"min_p": 0.6}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),
        ({"top_k": 4, "min_p": 0.45}, {1, 3, 4}),
        ({"temperature": 0.25, "top_p": 0.85}, {1, 3}),
    ],
    ids=str,
)
def test_filters_keep_their_set_and_share_its_probability(settings, kept):
    found = drawn(LOGITS_V, **settings)
    assert found.keys() == kept
    weights = {token: PROBABILITIES[token] ** (1 / settings.get("temperature", 1.0)) for token in kept}
    for token in kept:
        assert abs(found[token] / len(GRID) - weights[token] / sum(weights.values())) <= 2 / len(GRID)


def test_temperature_zero_is_the_largest_logit_and_of_equal_ones_the_lowest_id():
    for uniform in (0.0, 0.5, 0.999):
        greedy = OPEN | {"temperature": 0.0, "uniform": uniform}
        assert sample(torch.tensor([0.0, 3.0, 1.0, 3.0]), **greedy) == 1
        assert sample(torch.zeros(7), **greedy) == 0


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    """Rows with many equal numbers, infinities, and a NaN now and then."""
    width = draw(st.integers(1, 80) | st.sampled_from([1000, 1023]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits_BV = torch.randint(-2, 3, (draw(st.integers(1, 4)), width), generator=random).float()
    for number in draw(st.lists(st.sampled_from([torch.inf, -torch.inf, torch.nan, 9.0, -0.0]), max_size=4)):
        row, column = (int(torch.randint(size, (), generator=random)) for size in logits_BV.shape)
        logits_BV[row, column] = number
    return logits_BV if draw(st.booleans()) else torch.full_like(logits_BV, -torch.inf)


@given(rows_of_logits())
def test_the_likeliest_is_the_first_of_the_largest_and_a_nan_before_all(logits_BV):
    expected = []
    for row in logits_BV.tolist():
        nans = [i for i, value in enumerate(row) if math.isnan(value)]
        expected.append(nans[0] if nans else row.index(max(row)))
    for form in [*FORMS, "off"]:
        with running(form):
            assert sample_rows(list(logits_BV), [Drawing()] * len(logits_BV)) == expected


@st.composite
def drawings(draw: st.DrawFn) -> Drawing:
    return Drawing(
        temperature=draw(st.sampled_from([0.0, 0.2, 0.8, 1.0, 3.0, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 40, 5000])),
        top_p=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0])),
        uniform=draw(st.floats(0, 1, exclude_max=True)),
    )


@given(st.lists(drawings(), min_size=1, max_size=5), st.integers(0, 2**16), st.sampled_from([1, 5, 97, 3000]))
def test_rows_are_drawn_as_each_alone_by_the_twin(wanted, seed, width):
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randn(width, generator=random) * scale for scale in (1, 6, 30, 1, 6)[: len(wanted)]]
    rows[0][torch.randint(width, (width // 4,), generator=random)] = -torch.inf
    rows[-1][: width // 2] = rows[-1][0].item()  # equal ones
    expected = [sample(row, **asdict(drawing)) for row, drawing in zip(rows, wanted, strict=True)]
    for form in FORMS:
        with running(form):
            assert sample_rows(rows, wanted) == expected


def test_equal_logits_are_cut_from_the_highest_ids():
    assert drawn(torch.zeros(6), top_k=2).keys() == {0, 1}


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_interval_draw_tokens_that_are_possible(uniform):
    logits_V = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert sample(logits_V, uniform=uniform, **OPEN) in (1, 3)


def test_logits_far_apart_and_large_do_not_overflow():
    assert sample(torch.tensor([1e30, -1e30, 0.0]), uniform=0.9, **OPEN) == 0
    assert sample(torch.tensor([5.0, 4.0]), uniform=0.9, **(OPEN | {"temperature": 1e-9})) == 0


def test_a_draw_over_a_large_vocabulary_is_in_order_of_probability():
    logits_V = torch.randn(151_936)
    tokens = [sample(logits_V, uniform=uniform, **OPEN) for uniform in (0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53)]
    assert tokens[0] == int(logits_V.argmax())
    assert tokens[-1] == int(logits_V.argmin())
    assert sorted(tokens, key=lambda token: -float(logits_V[token])) == tokens


# Penalties.


def counts_of(tokens, vocab_size=10):
    return torch.tensor(tokens, dtype=torch.int64).bincount(minlength=vocab_size)


def test_repetition_is_that_of_the_witness():
    logits_V, prompt, answer = torch.randn(10), [1, 2, 2, 5], [7, 1]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits_V[None].clone())[0]
    seen = torch.tensor(sorted({*prompt, *answer}))
    settings = {"repetition": 1.3, "presence": 0.0, "frequency": 0.0}
    found_V = penalize(logits_V, seen=seen, generated_counts_V=counts_of(answer), **settings)
    torch.testing.assert_close(found_V, expected)


def test_presence_counts_once_and_frequency_each_time_and_neither_the_prompt():
    logits_V, seen = torch.zeros(10), torch.tensor([3, 7, 8])  # 3 in the prompt alone, 7 once, 8 twice
    settings = {"repetition": 1.0, "presence": 0.5, "frequency": 0.25}
    found_V = penalize(logits_V, seen=seen, generated_counts_V=counts_of([7, 8, 8]), **settings)
    assert found_V.tolist() == [0, 0, 0, 0, 0, 0, 0, -0.75, -1.0, 0]


def test_without_penalties_the_logits_are_the_same_bits_and_the_input_is_never_changed():
    logits_V = torch.randn(10)
    kept_V = logits_V.clone()
    neutral = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    assert torch.equal(penalize(logits_V, seen=torch.tensor([1]), generated_counts_V=counts_of([1]), **neutral), kept_V)
    strong = {"repetition": 2.0, "presence": 1.0, "frequency": 1.0}
    penalize(logits_V, seen=torch.tensor([1, 4]), generated_counts_V=counts_of([1]), **strong)
    assert torch.equal(logits_V, kept_V)


def test_penalties_before_anything_was_seen_change_nothing():
    logits_V = torch.randn(10)
    strong = {"repetition": 2.0, "presence": 1.0, "frequency": 1.0}
    nothing = torch.tensor([], dtype=torch.int64)
    assert torch.equal(penalize(logits_V, seen=nothing, generated_counts_V=counts_of([]), **strong), logits_V)


# The draw.


def test_the_draw_of_a_seed_and_index_is_fixed_for_ever():
    golden = {
        (0, 0): 0.3859926107094097,
        (0, 1): 0.29868916236736043,
        (1, 0): 0.48055380340761744,
        (2**63, 12): 0.8438245911834301,
    }
    assert {key: uniform_draw(*key) for key in golden} == golden


def test_draws_are_even_and_without_a_link_between_neighbours():
    draws = torch.tensor([uniform_draw(3, i) for i in range(4000)], dtype=torch.float64)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(float(draws.mean()) - 0.5) < 4 / math.sqrt(12 * 4000)
    assert abs(float(torch.corrcoef(torch.stack((draws[1:], draws[:-1])))[0, 1])) < 4 / math.sqrt(4000)
    assert uniform_draw(3, 1) != uniform_draw(31, 1) != uniform_draw(3, 11)
