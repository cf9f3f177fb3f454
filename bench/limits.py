"""What this machine can do at most: memory bandwidth and matrix rate, measured beside each benchmark."""

import time
from collections.abc import Callable
from statistics import median

import torch

READ_BYTES = 512 << 20  # far beyond any cache
MATRIX_WIDTH = 2048


def read_bandwidth() -> float:
    """Return bytes per second of reading memory, as a float32 sum over a large tensor does it."""
    data = torch.ones(READ_BYTES // 4)
    return READ_BYTES / timed(lambda: data.sum())


def matrix_rate(dtype: torch.dtype) -> float:
    """Return floating-point operations per second of a square matrix product."""
    left, right = (torch.randn(MATRIX_WIDTH, MATRIX_WIDTH).to(dtype) for _ in range(2))
    return 2 * MATRIX_WIDTH**3 / timed(lambda: left @ right)


def timed(work: Callable[[], object], rounds: int = 7) -> float:
    """Return the median seconds of a piece of work, after one run that is not counted."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
