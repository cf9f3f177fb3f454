"""The scheduler on its own: random arrivals, cancellations, memory pressure; order, fairness, preemption, deadlines."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.engine.request import Request, SamplingParams
from freehold.engine.scheduler import Limits, Scheduler
from freehold.engine.sequence import Sequence
from freehold.errors import BadRequest, Overloaded

END = 7
SMALL = Limits(num_slots=4, num_pages=8, page_size=4, budget_tokens=10, max_positions=24)


def add(scheduler: Scheduler, request: Request, *, now_s: float) -> Sequence:
    (sequence,) = scheduler.add([request], now_s=now_s)
    return sequence


def asks(prompt=3, answer=5, **fields):
    return Request(
        prompt=tuple(range(10, 10 + prompt)),
        sampling=SamplingParams(max_tokens=answer),
        stop_ids=frozenset({END}),
        **fields,
    )


def step(scheduler, now_s=0.0, token=1):
    """Return the sequences that ran in one step with their numbers of tokens; those that are finished are ended."""
    plan = scheduler.plan(now_s=now_s)
    scheduler.commit(plan, {run.sequence: token for run in plan.runs if run.is_last})
    for run in plan.runs:
        if run.sequence.is_finished:
            scheduler.end(run.sequence)
    assert scheduler.check() is None
    return {run.sequence: run.num_tokens for run in plan.runs}


def run_down(scheduler, most=10_000):
    """Run until nobody is left; return the sequences in the order of their ends."""
    ended, left = [], list(scheduler._all())
    for _ in range(most):
        if not left:
            return ended
        step(scheduler)
        ended += [sequence for sequence in left if scheduler.find(sequence.number) is None]
        left = [sequence for sequence in left if sequence not in ended]
    raise AssertionError("requests starve")


limits = st.builds(
    Limits,
    num_slots=st.integers(1, 5),
    num_pages=st.integers(1, 12),
    page_size=st.sampled_from([1, 4]),
    budget_tokens=st.integers(1, 20),
    max_positions=st.integers(4, 40),
    max_waiting=st.just(6),
)


@given(limits, st.integers(0, 2**20), st.integers(1, 60))
def test_nothing_leaks_and_every_request_ends_once_whatever_comes(given_limits, seed, num_requests):
    choose, scheduler = random.Random(seed), Scheduler(given_limits)
    left, ended, refused, now_s = num_requests, Counter(), 0, 0.0
    alive = {}
    for _ in range(20_000):
        if not left and not alive:
            break
        while left and choose.random() < 0.3:
            left -= 1
            request = asks(
                choose.randint(1, 30),
                choose.choice([1, 3, 10, None]),
                priority=choose.choice([0, 0, 0, 1]),
                tenant=choose.choice("abc"),
                weight=choose.choice([0.5, 1.0, 4.0]),
                deadline_s=choose.choice([None, None, 40.0]),
            )
            try:
                sequence = add(scheduler, request, now_s=now_s)
                alive[sequence.number] = sequence
            except (BadRequest, Overloaded):
                refused += 1
        if alive and choose.random() < 0.05:
            sequence = alive.pop(choose.choice(list(alive)))
            scheduler.end(sequence)
            ended[sequence.number] += 1
        computed = {sequence: sequence.num_computed for sequence in alive.values()}
        num_preemptions = scheduler.num_preemptions
        plan = scheduler.plan(now_s=now_s)
        assert scheduler.check() is None
        lost = [sequence for sequence, count in computed.items() if sequence.num_computed != count]
        assert len(lost) <= scheduler.num_preemptions - num_preemptions, "who keeps its pages keeps what is computed"
        assert sum(run.num_tokens for run in plan.runs) <= given_limits.budget_tokens
        assert len({run.sequence for run in plan.runs}) == len(plan.runs)
        assert plan.runs or not scheduler.num_waiting, "somebody waits and nobody runs"
        for run in plan.runs:
            assert 0 < run.num_tokens <= run.sequence.num_uncomputed
            room = len(run.sequence.pages) * given_limits.page_size
            assert run.sequence.num_computed + run.num_tokens <= room
        failed = scheduler.suspect(plan) if plan.runs and choose.random() < 0.03 else None
        if failed is None:
            drawn = {r.sequence: END if choose.random() < 0.1 else 1 for r in plan.runs if r.is_last}
            scheduler.commit(plan, drawn)
            failed = [run.sequence for run in plan.runs if run.sequence.is_finished]
        for sequence in [*failed, *(sequence for sequence, _ in plan.ended)]:
            scheduler.end(sequence)
            ended[alive.pop(sequence.number).number] += 1
        now_s += 1.0
    assert not left
    assert not alive, "a request starves"
    assert set(ended.values()) <= {1}
    assert sum(ended.values()) + refused == num_requests
    assert scheduler.check() is None
    assert scheduler.pages.num_free == given_limits.num_pages
    assert scheduler.slots.num_free == given_limits.num_slots


def test_a_long_prompt_is_read_in_chunks_beside_others_that_answer():
    scheduler = Scheduler(SMALL)
    short = add(scheduler, asks(2), now_s=0)
    assert step(scheduler) == {short: 2}
    long = add(scheduler, asks(15), now_s=0)
    assert step(scheduler) == {short: 1, long: 9}
    assert step(scheduler) == {short: 1, long: 6}
    assert step(scheduler) == {short: 1, long: 1}


def test_who_ranks_last_is_preempted_when_pages_run_out_and_goes_on_later():
    scheduler = Scheduler(Limits(num_slots=2, num_pages=4, page_size=4, budget_tokens=10, max_positions=16))
    first, second = (add(scheduler, asks(4, 12), now_s=0) for _ in range(2))
    for _ in range(5):
        step(scheduler)
    assert scheduler.num_preemptions == 0
    while second.is_running:
        step(scheduler)
    known = list(second.known)
    assert second.num_computed == 0
    assert second.pages == []
    assert run_down(scheduler) == [first, second]
    assert second.known[: len(known)] == known
    assert second.answer_length == 12


def test_a_higher_priority_goes_first_and_takes_the_room_of_a_lower_one():
    scheduler = Scheduler(Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=10, max_positions=24))
    low = add(scheduler, asks(priority=0), now_s=0)
    step(scheduler)
    urgent = add(scheduler, asks(priority=1), now_s=0)
    assert list(step(scheduler)) == [urgent]
    assert not low.is_running
    assert run_down(scheduler) == [urgent, low]


def test_who_pauses_for_a_higher_priority_keeps_its_room_and_computes_no_token_twice():
    scheduler = Scheduler(SMALL)
    low = add(scheduler, asks(4, 5, priority=0), now_s=0)
    step(scheduler)
    owned = (list(low.pages), low.slot, low.num_computed)
    urgent = add(scheduler, asks(20, 3, priority=1), now_s=0)
    for _ in range(2):  # its prompt takes the whole budget of two steps
        assert step(scheduler) == {urgent: 10}
        assert (low.pages, low.slot, low.num_computed) == owned
    assert step(scheduler) == {urgent: 1, low: 1}
    assert scheduler.num_preemptions == 0


def test_a_tenant_with_many_requests_does_not_keep_another_waiting():
    scheduler = Scheduler(Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=10, max_positions=24))
    many = [add(scheduler, asks(tenant="many"), now_s=0) for _ in range(10)]
    step(scheduler)
    one = add(scheduler, asks(tenant="one"), now_s=0)
    order = run_down(scheduler)
    assert order.index(one) == 1
    assert set(order) == {*many, one}


def test_shares_are_by_weight():
    scheduler = Scheduler(Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=10, max_positions=24))
    for _ in range(40):
        add(scheduler, asks(tenant="light"), now_s=0)
        add(scheduler, asks(tenant="heavy", weight=3.0), now_s=0)
    first = Counter(sequence.request.tenant for sequence in run_down(scheduler)[:40])
    assert first["heavy"] == pytest.approx(30, abs=2)


def test_rest_earns_no_credit():
    scheduler = Scheduler(Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=10, max_positions=24))
    for _ in range(8):
        add(scheduler, asks(tenant="busy"), now_s=0)
    for _ in range(20):
        step(scheduler)
    for _ in range(8):
        add(scheduler, asks(tenant="late"), now_s=0)
        add(scheduler, asks(tenant="busy"), now_s=0)
    next_ones = [sequence.request.tenant for sequence in run_down(scheduler)[:8]]
    assert 3 <= next_ones.count("late") <= 5


def test_what_can_never_run_is_refused_with_the_numbers():
    scheduler = Scheduler(SMALL)
    with pytest.raises(
        BadRequest, match="the prompt has 20 tokens and an answer of up to 5, there is room for 24 in all"
    ):
        add(scheduler, asks(20, 5), now_s=0)
    assert add(scheduler, asks(20, None), now_s=0).num_tokens == 4
    small = Scheduler(Limits(num_slots=4, num_pages=2, page_size=4, budget_tokens=10, max_positions=24))
    with pytest.raises(BadRequest, match="there is room for 8 in all"):
        add(small, asks(8, None), now_s=0)


def test_more_waiting_than_there_may_be_are_refused_and_those_there_are_kept():
    scheduler = Scheduler(
        Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=9, max_positions=24, max_waiting=2)
    )
    kept = [add(scheduler, asks(), now_s=0) for _ in range(2)]
    with pytest.raises(Overloaded):
        add(scheduler, asks(), now_s=0)
    assert set(run_down(scheduler)) == set(kept)


@pytest.mark.parametrize(
    ("requests", "error"), [([asks(), asks(20, 5)], BadRequest), ([asks(), asks()], Overloaded)], ids=["long", "many"]
)
def test_requests_that_belong_together_are_taken_in_all_or_none(requests, error):
    scheduler = Scheduler(
        Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=9, max_positions=24, max_waiting=2)
    )
    before = add(scheduler, asks(), now_s=0)
    with pytest.raises(error):
        scheduler.add(requests, now_s=0)
    assert scheduler.num_waiting == 1
    assert run_down(scheduler) == [before]


@pytest.mark.parametrize("runs_first", [True, False])
def test_a_deadline_ends_a_request_that_runs_or_waits(runs_first):
    scheduler = Scheduler(Limits(num_slots=1, num_pages=8, page_size=4, budget_tokens=10, max_positions=24))
    requests = [asks(deadline_s=2.0), asks()]
    late, other = (add(scheduler, r, now_s=0) for r in (requests if runs_first else requests[::-1]))
    late, other = (late, other) if runs_first else (other, late)
    step(scheduler, now_s=1.9)
    plan = scheduler.plan(now_s=2.0)
    assert [(sequence, finish.reason) for sequence, finish in plan.ended] == [(late, "deadline")]
    assert run_down(scheduler) == [other]


def test_those_of_a_step_that_failed_run_alone_until_one_fails_alone():
    scheduler = Scheduler(SMALL)
    good, bad = (add(scheduler, asks(8, 3), now_s=0) for _ in range(2))
    assert scheduler.suspect(scheduler.plan(now_s=0)) == []
    assert list(step(scheduler)) == [good]
    plan = scheduler.plan(now_s=0)
    assert [run.sequence for run in plan.runs] == [bad]
    assert scheduler.suspect(plan) == [bad]
    scheduler.end(bad)
    assert run_down(scheduler) == [good]


def test_who_had_no_part_in_a_step_that_failed_pauses_and_computes_no_token_twice():
    scheduler = Scheduler(SMALL)
    bystander = add(scheduler, asks(4, 5), now_s=0)
    step(scheduler)
    suspects = [add(scheduler, asks(3, 3, priority=1), now_s=0) for _ in range(2)]
    plan = scheduler.plan(now_s=0)
    plan.runs = [run for run in plan.runs if run.sequence in suspects]
    assert scheduler.suspect(plan) == []
    owned = (list(bystander.pages), bystander.slot, bystander.num_computed)
    for suspect in suspects:
        assert step(scheduler) == {suspect: 3}
        assert (bystander.pages, bystander.slot, bystander.num_computed) == owned
    assert step(scheduler)[bystander] == 1
