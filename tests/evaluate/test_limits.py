"""What this machine can do: rates that are numbers, and the type of product that it is judged by."""

import pytest
import torch

from evaluate.quick import measure_limits_quickly
from freehold.evaluate import limits


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    measure_limits_quickly(monkeypatch)


def test_rates_are_measured_on_the_threads_that_were_asked_for(monkeypatch):
    seen = []

    def one_second(work):
        work()
        seen.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(limits, "_seconds", one_second)
    before = torch.get_num_threads()
    assert limits.read_bandwidth(1) == 1 << 20
    assert limits.matrix_rate(torch.float32, 1) == 2 * 64**3
    assert seen == [1, 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_each_type_has_a_rate(dtype):
    assert limits.matrix_rate(dtype, 1) > 0


def test_a_product_that_torch_lacks_here_is_out(monkeypatch):
    def refuse(left, right):
        raise RuntimeError("no such product on this processor")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert limits.fastest_type((torch.int8, torch.float32), 1) is torch.float32
