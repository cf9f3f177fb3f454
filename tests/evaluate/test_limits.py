"""What this machine can do: rates that are numbers, of memory and of each kind of product."""

from types import SimpleNamespace

import pytest

from evaluate.quick import measure_limits_quickly
from freehold.evaluate import limits
from models.forms import FORMS, running


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    measure_limits_quickly(monkeypatch)


@pytest.mark.parametrize("form", [*FORMS, "off"])
def test_memory_and_products_have_rates(form):
    with running(form):
        assert limits.read_bandwidth(2) > 0
        assert all(limits.product_rate(arithmetic, 2) > 0 for arithmetic in limits.ARITHMETICS)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_multiplied_until_they_have_taken_long_enough(form, monkeypatch):
    """Each look at the clock is a second later, and a run has to take two: none does, until a third is asked for."""
    monkeypatch.setattr(limits, "LEAST_S", 2.0)
    seconds = iter([0.0, 1.0, 1.0, 2.0, 2.0, 6.0])
    monkeypatch.setattr(limits, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    with running(form):
        rate = limits.product_rate("float32", 1)
    assert rate * 4.0 % (2 * 16 * 16 * limits.FIRST_ROUNDS) == 0  # 16 lanes, 4 * 4 times as many rounds as at first
