"""Schedules against their formulas, at every edge, and the published ones at the points that were published."""

import math
from itertools import pairwise

import pytest

from freehold.errors import BadInput
from freehold.train.schedule import BILLION, NEMOTRON_3, Schedule, cosine, linear

WSD = Schedule(peak=1.0, end=0.1, warmup=10, decay=20, total=100)


def test_warm_up_rises_in_a_line_from_above_zero_to_the_peak():
    assert [WSD.at(done) for done in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_the_stable_time_has_the_peak_up_to_its_last_step():
    assert {WSD.at(done) for done in range(10, 81)} == {1.0}
    assert WSD.at(81) < 1.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "minus_sqrt"])
def test_decay_starts_at_the_peak_falls_at_every_step_and_ends_at_the_end(shape):
    schedule = Schedule(peak=1.0, end=0.1, warmup=10, decay=20, total=100, shape=shape)
    rates = [schedule.at(done) for done in range(80, 101)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(earlier > later for earlier, later in pairwise(rates))
    assert schedule.at(101) == schedule.at(10_000) == pytest.approx(0.1)


def test_shapes_have_their_formulas_half_way():
    half = {
        shape: Schedule(peak=3.0, end=1.0, decay=8, total=8, shape=shape).at(4)
        for shape in ("linear", "cosine", "minus_sqrt")
    }
    assert half == pytest.approx({"linear": 2.0, "cosine": 2.0, "minus_sqrt": 1.0 + 2.0 * (1.0 - math.sqrt(0.5))})


def test_cosine_and_linear_are_all_decay():
    assert [cosine(peak=2.0, total=12, warmup=4).at(done) for done in (2, 4, 8, 12)] == pytest.approx([1, 2, 1, 0])
    assert [linear(peak=2.0, total=12, warmup=4).at(done) for done in (2, 4, 6, 12)] == pytest.approx([1, 2, 1.5, 0])


def test_without_decay_the_rate_stays():
    assert {Schedule(peak=0.5, total=10).at(done) for done in range(1, 20)} == {0.5}


def test_a_stable_run_can_be_made_longer_without_changing_its_past():
    longer = Schedule(peak=1.0, end=0.1, warmup=10, decay=20, total=1000)
    assert [WSD.at(done) for done in range(1, 81)] == [longer.at(done) for done in range(1, 81)]


def test_a_scaled_schedule_has_the_same_rates_at_the_same_share_of_the_run():
    whole, small = NEMOTRON_3["super"], NEMOTRON_3["super"].scaled(25_000)
    assert (small.warmup, small.decay, small.total) == (200, 5000, 25_000)
    for share in (0.004, 0.5, 0.85, 1.0):
        assert small.at(int(share * small.total)) == pytest.approx(whole.at(int(share * whole.total)), rel=1e-6)


def test_published_schedules_have_their_published_points():
    nano = NEMOTRON_3["nano"]
    assert nano.at(4_200_000_000) == pytest.approx(5e-4)
    assert nano.at(8_400_000_000) == nano.at(20_000 * BILLION) == 1e-3
    assert nano.at(25_000 * BILLION) == pytest.approx(1e-5)
    assert nano.decay == 0.2 * nano.total
    assert NEMOTRON_3["super"].at(25_000 * BILLION) == pytest.approx(4.5e-6)
    assert NEMOTRON_3["super"].at(21_250 * BILLION) == pytest.approx(4.5e-6 + (4.5e-4 - 4.5e-6) * 0.5)
    assert NEMOTRON_3["ultra"].at(20_000 * BILLION) == pytest.approx(2.5e-6)


@pytest.mark.parametrize("wrong", [{"warmup": 90}, {"decay": 95}])
def test_parts_that_do_not_fit_are_refused(wrong):
    with pytest.raises(BadInput, match="a schedule of 100 is too short"):
        Schedule(**({"peak": 1.0, "end": 0.1, "warmup": 10, "decay": 20, "total": 100} | wrong))


def test_a_negative_rate_is_a_bug():
    with pytest.raises(AssertionError):
        Schedule(peak=-1.0, total=100)
