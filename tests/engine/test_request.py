"""Sampling values are checked once, when they are made, in one clear line."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from freehold.engine.request import SamplingParams
from freehold.errors import BadRequest

FLOATS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
INTEGERS = {"max_tokens": 1, "min_tokens": 0, "top_k": 0}
NUMBERS = [*FLOATS, *INTEGERS, "seed"]


def refusal(**values: object) -> str:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**values)
    (name,) = values
    message = caught.value.message
    assert message.startswith(f"{name} is ")
    assert message.isprintable()
    assert len(message) < 200
    return message


def test_the_default_is_greedy_and_penalizes_nothing():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.penalizes) == (0.0, None, False)


@pytest.mark.parametrize("name", FLOATS)
def test_limits_belong_to_the_range_and_what_is_next_to_them_does_not(name):
    low, high = FLOATS[name]
    for value in (low, high, math.nextafter(low, high), (low + high) / 2):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf)):
        assert f"wanted a number from {low} to {high}" in refusal(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
def test_counts_have_a_smallest_value(name):
    least = INTEGERS[name]
    assert getattr(SamplingParams(**{name: least}), name) == least
    assert "wanted an integer" in refusal(**{name: least - 1})


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, "0.7", True, [1], {}, 1j, "x" * 1000, "a\nb"], ids=str
)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_such_number_is_refused(name, value):
    refusal(**{name: value})


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "max_tokens"])
def test_none_is_a_value_of_max_tokens_alone(name):
    refusal(**{name: None})


@pytest.mark.parametrize("name", [*INTEGERS, "seed"])
def test_a_fraction_is_no_count(name):
    refusal(**{name: 2.0})


@pytest.mark.parametrize("name", FLOATS)
def test_an_integer_is_a_number(name):
    assert getattr(SamplingParams(**{name: 1}), name) == 1


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 2**64])
def test_seeds_are_integers_of_either_sign(seed):
    assert SamplingParams(seed=seed).seed == seed


def test_an_integer_of_any_length_is_refused_in_a_short_line():
    for name in NUMBERS:
        refusal(**{name: 10**4000})


@pytest.mark.parametrize("stop", ["word", b"word", ("a", 1), (None,), {"a": "b"}, 7, None], ids=str)
def test_stop_is_a_row_of_strings(stop):
    refusal(stop=stop)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(BadRequest, match="a stop string is empty"):
        SamplingParams(stop=("a", ""))


@pytest.mark.parametrize("stop_ids", [[1], 1, {"1"}, {True}, {1.0}, None], ids=str)
def test_stop_ids_is_a_set_of_ids(stop_ids):
    refusal(stop_ids=stop_ids)


def test_no_answer_is_longer_than_max_tokens_and_none_shorter_than_min_tokens():
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4
    with pytest.raises(BadRequest, match="min_tokens is 5, more than max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    refusal(ignore_eos=1)


def test_any_penalty_penalizes():
    changes = {"repetition_penalty": 1.1, "presence_penalty": -0.1, "frequency_penalty": 0.1}
    assert all(SamplingParams(**{name: value}).penalizes for name, value in changes.items())


def test_a_changed_copy_is_checked_too_and_nothing_changes_in_place():
    params = SamplingParams(temperature=0.5)
    with pytest.raises(BadRequest):
        replace(params, temperature=-1.0)
    with pytest.raises(FrozenInstanceError):
        params.temperature = -1.0
