"""A machine whose limits are measured at once: little memory to read, and short loops."""

import pytest

from freehold.evaluate import limits


def measure_limits_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pieces of work that measure the machine small, until the test ends."""
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_data_to_read", limits._data_to_read.__wrapped__)
    monkeypatch.setattr(limits, "MATRIX_WIDTH", 64)
    monkeypatch.setattr(limits, "LEAST_S", 1e-4)
