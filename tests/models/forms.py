"""Which form of the kernels runs and on how many threads, for as long as a test wants; and equality of bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from freehold.ops import native

FORMS = list(native.forms())
THREADS = (1, 2, 3, 5)

needs_kernels = pytest.mark.skipif(not FORMS, reason="the native extension is not built here")
needs_two_forms = pytest.mark.skipif(len(FORMS) < 2, reason="only the portable form, or none, runs here")


@contextmanager
def running(form: str) -> Iterator[None]:
    """Run the kernels in this form; "off" leaves the references."""
    with patch.object(native, "native_report", lambda: form):
        native.kernels.cache_clear()
        native.kernels()
    try:
        yield
    finally:
        native.kernels.cache_clear()


@contextmanager
def on_threads(num_threads: int) -> Iterator[None]:
    """Let torch, and with it the kernels, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors hold the same bits; any NaN is as good as any other."""
    same_kind = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return same_kind and torch.equal(_bits(found), _bits(expected))


def _bits(values: Tensor) -> Tensor:
    numbers = torch.where(values.isnan(), torch.nan, values)
    return numbers.view({2: torch.int16, 4: torch.int32}[values.itemsize])
