"""The order of samples: a pure function of seed and place, the same for any number of workers, wherever it goes on."""

from collections import Counter
from dataclasses import asdict
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import BadInput
from freehold.train.batch import Batch
from freehold.train.dataset import Sequences
from freehold.train.order import Order, Source, shuffled, turn_at
from freehold.train.packing import Cursor, Stream, best_fit
from train.data import build, chats, texts, write_rows

BUDGET_TOKENS = 128


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    """Return a source of texts and one of conversations."""
    folder = tmp_path_factory.mktemp("data")
    files = {"texts": write_rows(folder / "a.jsonl", texts(90)), "chats": write_rows(folder / "b.jsonl", chats(40))}
    return [
        Source(name=name, sequences=Sequences(build([file], folder / name, tokens_per_shard=700), max_tokens=100))
        for name, file in files.items()
    ]


def stream_of(sources: list[Source], seed: int | None = 0) -> Stream:
    return Stream(Order(sources, seed=seed), budget_tokens=BUDGET_TOKENS)


def with_weights(sources: list[Source], *weights: float | None) -> list[Source]:
    return [
        Source(name=source.name, sequences=source.sequences, weight=weight)
        for source, weight in zip(sources, weights, strict=True)
    ]


@given(count=st.integers(1, 300), key=st.text(max_size=8))
def test_a_shuffle_is_a_permutation(count, key):
    assert sorted(shuffled(index, count, key=key) for index in range(count)) == list(range(count))


def test_shuffles_with_other_keys_are_as_different_as_chance_has_it():
    count = 1000
    orders = [[shuffled(index, count, key=f"{seed}") for index in range(count)] for seed in range(40)]
    fixed = [sum(index == place for place, index in enumerate(order)) for order in orders]
    assert sum(fixed) / len(fixed) == pytest.approx(1, abs=0.5)  # a random permutation leaves one in place on average
    firsts = [order[0] for order in orders]
    assert len(set(firsts)) > 35
    ups = sum(first < second for order in orders for first, second in pairwise(order))
    assert ups / (len(orders) * (count - 1)) == pytest.approx(0.5, abs=0.02)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_turns_have_exactly_the_shares_of_their_weights(weights):
    turns = [turn_at(place, weights) for place in range(2 * sum(weights))]
    assert Counter(source for source, _ in turns) == {n: 2 * weight for n, weight in enumerate(weights)}
    for number in range(len(weights)):
        assert [turn for source, turn in turns if source == number] == list(range(2 * weights[number]))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_turns_are_never_far_from_their_shares(weights):
    seen = Counter()
    for place in range(sum(weights)):
        seen[turn_at(place, weights)[0]] += 1
        for number, weight in enumerate(weights):
            assert abs(seen[number] - (place + 1) * weight / sum(weights)) <= len(weights)


def test_a_pass_has_every_sequence_once(sources):
    order = Order(sources, seed=5)
    wanted = {(s, n) for s, source in enumerate(sources) for n in range(len(source.sequences))}
    passes = [[order.at(place + number * len(order)) for place in range(len(order))] for number in range(2)]
    assert set(passes[0]) == set(passes[1]) == wanted
    assert passes[0] != passes[1]


def test_without_a_seed_the_order_is_that_of_the_files(sources):
    order = Order(sources[:1], seed=None)
    assert [order.at(place)[1] for place in range(2 * len(order))] == 2 * list(range(len(order)))


def test_weights_are_shares_of_tokens(sources):
    order = Order(with_weights(sources, 3.0, 1.0), seed=0)
    tokens = Counter()
    for place in range(4000):
        source, number = order.at(place)
        tokens[source] += sources[source].sequences.length(number)
    assert tokens[0] / tokens.total() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("weights", [(1.0, None), (0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)], ids=str)
def test_weights_that_are_no_shares_are_refused(sources, weights):
    with pytest.raises(BadInput, match=r"the weight of \w+ is"):
        Order(with_weights(sources, *weights), seed=0)


@given(st.dictionaries(st.integers(0, 999), st.integers(1, 50), min_size=1, max_size=60))
def test_packs_hold_each_place_once_within_the_budget(lengths):
    packs = best_fit(lengths, 50)
    assert sorted(place for pack in packs for place in pack) == sorted(lengths)
    loads = [sum(lengths[place] for place in pack) for pack in packs]
    assert max(loads) <= 50
    assert sum(load <= 25 for load in loads) <= 1  # two half-full packs would have been one


def test_one_pass_of_packs_has_every_sequence_once(sources):
    stream = stream_of(sources)
    places = [place for pack in stream.one_pass() for place in pack]
    assert sorted(places) == list(range(len(Order(sources, seed=0))))


def test_packs_are_nearly_full(sources):
    stream = stream_of(sources)
    packs = list(stream.one_pass())
    assert sum(stream.batch(pack).layout.num_tokens for pack in packs) > 0.9 * BUDGET_TOKENS * len(packs)


def run(stream: Stream, steps: int, packs_per_step: int, num_workers: int, cursor: Cursor) -> tuple[list, Cursor]:
    """Return what all workers of some steps compute, in the order of the stream, and where they stop."""
    seen = []
    for _ in range(steps):
        shares = []
        for worker in range(num_workers):
            packs, after = stream.take(cursor, packs_per_step)
            shares.append(packs[worker::num_workers])
        cursor = after
        seen += [shares[at % num_workers][at // num_workers] for at in range(packs_per_step)]
    return seen, cursor


@given(
    seed=st.one_of(st.none(), st.integers(0, 3)),
    packs_per_step=st.integers(1, 7),
    legs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=5),
)
def test_a_run_that_goes_on_with_other_workers_sees_the_same_packs(sources, seed, packs_per_step, legs):
    whole = stream_of(sources, seed)
    num_steps = sum(steps for steps, _ in legs)
    wanted, _ = whole.take(whole.start, num_steps * packs_per_step)
    seen, cursor = [], whole.start
    for steps, num_workers in legs:
        begun_anew = stream_of(sources, seed)
        saved = Cursor.from_json(asdict(cursor))
        packs, cursor = run(begun_anew, steps, packs_per_step, min(num_workers, packs_per_step), saved)
        seen += packs
    assert seen == wanted


def test_one_two_three_and_one_workers_give_the_batches_of_one(sources):
    alone, _ = run(stream_of(sources), 20, 6, 1, stream_of(sources).start)
    seen, cursor = [], stream_of(sources).start
    for num_workers in (1, 2, 3, 1):
        stream = stream_of(sources)
        packs, cursor = run(stream, 5, 6, num_workers, cursor)
        seen += [stream.batch(pack) for pack in packs]
    for batch, pack in zip(seen, alone, strict=True):
        assert same(batch, stream_of(sources).batch(pack))


def same(first: Batch, second: Batch) -> bool:
    is_same = [torch.equal(getattr(first, name), getattr(second, name)) for name in ("tokens_T", "labels_T")]
    return all(is_same) and first.layout.starts == second.layout.starts


def test_a_batch_holds_its_sequences_apart(sources):
    stream, order = stream_of(sources), Order(sources, seed=0)
    pack = next(pack for pack in stream.one_pass() if len(pack) > 2)
    batch = stream.batch(pack)
    for place, (start, end) in zip(pack, batch.layout.spans, strict=True):
        source, number = order.at(place)
        example = sources[source].sequences.example(number)
        assert torch.equal(batch.tokens_T[start:end], example.tokens_L)
        assert torch.equal(batch.labels_T[start:end], example.labels_L)
    assert 0 < batch.num_supervised <= batch.layout.num_tokens <= BUDGET_TOKENS


@pytest.mark.parametrize("changed", ["seed", "budget", "weights", "sources"])
def test_a_cursor_of_another_stream_is_refused(sources, changed):
    cursor = stream_of(sources).start
    streams = {
        "seed": lambda: stream_of(sources, seed=1),
        "budget": lambda: Stream(Order(sources, seed=0), budget_tokens=BUDGET_TOKENS + 1),
        "weights": lambda: stream_of(with_weights(sources, 1.0, 1.0)),
        "sources": lambda: stream_of(sources[::-1]),
    }
    with pytest.raises(BadInput, match="not what the run began with"):
        streams[changed]().take(cursor, 1)


@pytest.mark.parametrize(
    "fields", [{}, {"stream": "a", "group": -1, "pack": 0}, {"stream": "a", "group": 0, "pack": True}]
)
def test_a_damaged_cursor_is_refused(fields):
    with pytest.raises(BadInput, match="no cursor"):
        Cursor.from_json(fields)


def test_sequences_longer_than_the_budget_are_refused(sources):
    with pytest.raises(BadInput, match="sequences of up to 100 tokens do not fit"):
        Stream(Order(sources, seed=0), budget_tokens=99)


def test_the_stream_goes_on_past_a_pass(sources):
    stream = stream_of(sources)
    packs = list(stream.one_pass())
    taken, cursor = stream.take(stream.start, len(packs) + 3)
    assert taken[: len(packs)] == packs
    assert (cursor.group, cursor.pack) >= (1, 0)
    assert min(place for pack in taken[len(packs) :] for place in pack) >= len(Order(sources, seed=0))
    assert list(islice(stream.one_pass(), 2)) == packs[:2]
