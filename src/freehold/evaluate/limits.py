"""What this machine can do at most: how fast it reads memory, and how fast it multiplies.

Belongs here: measurements that owe nothing to Freehold's kernels, so that these can be held against them. Not here:
what a model asks of the machine (work.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

READ_BYTES = 512 << 20  # far beyond any cache
MATRIX_WIDTH = 2048
PROBE_WIDTH = (
    256  # tells which type is fast here; where one has no instructions of its own, the full width takes minutes
)
PROBES = 3


def read_bandwidth(num_threads: int) -> float:
    """Return bytes per second at which memory is read: a float32 sum of torch over 512 MiB, once."""
    data = _data_to_read()
    with _threads(num_threads):
        return data.nbytes / _seconds(data.sum)


def matrix_rate(dtype: torch.dtype, num_threads: int) -> float:
    """Return operations per second of a square matrix product of torch, once: two for each pair that is multiplied.

    int8 is summed in int32.
    """
    return _rate(dtype, num_threads, MATRIX_WIDTH)


def fastest_type(candidates: Sequence[torch.dtype], num_threads: int) -> torch.dtype:
    """Return the type whose products are fastest on this machine, judged by small ones; one that fails is out."""

    def rate(dtype: torch.dtype) -> float:
        try:
            return max(_rate(dtype, num_threads, PROBE_WIDTH) for _ in range(PROBES))
        except RuntimeError:  # of torch, where it has no such product for this processor
            return 0.0

    return max(candidates, key=rate)


def _rate(dtype: torch.dtype, num_threads: int, width: int) -> float:
    left, right = _factors(dtype, width)
    with _threads(num_threads):
        seconds = _seconds((lambda: torch._int_mm(left, right)) if dtype is torch.int8 else (lambda: left @ right))
    return 2 * width**3 / seconds


@cache
def _data_to_read() -> Tensor:
    return torch.ones(READ_BYTES // 4)


@cache
def _factors(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    if dtype is torch.int8:
        left, right = (torch.randint(-127, 128, (width, width), dtype=dtype) for _ in range(2))
    else:
        left, right = (torch.randn(width, width).to(dtype) for _ in range(2))
    return left, right


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Have torch run on so many threads while a `with` statement lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
