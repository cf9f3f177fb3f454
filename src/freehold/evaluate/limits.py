"""What this machine can do at most: how fast it reads memory, and how fast it multiplies.

Belongs here: measurements that owe nothing to how Freehold's kernels are written, so that these can be held against
them. Not here: what a model asks of the machine (work.py).
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from freehold.ops.native import extension, kernels
from freehold.ops.weight import large_bytes

# What weights are multiplied as: floats, or integers of so many bits by int8.
Arithmetic = Literal["float32", "up_to_six_bits", "eight_bits"]
ARITHMETICS: tuple[Arithmetic, ...] = ("float32", "up_to_six_bits", "eight_bits")

READ_BYTES = 512 << 20  # far beyond any cache
MATRIX_WIDTH = 1024
DEVICE_MATRIX_WIDTH, DEVICE_ROUNDS = 8192, 10
FIRST_ROUNDS, LEAST_S = 1 << 12, 0.02  # of a loop in registers: more until it has taken so long


def read_bandwidth(num_threads: int) -> float:
    """Return bytes per second at which 512 MiB of memory are read, once."""
    data, form = _data_to_read(), kernels()
    if form is None:
        return data.nbytes / _seconds(data.view(torch.float32).sum)
    return data.nbytes / _seconds(lambda: form.read_memory(num_threads, data.data_ptr(), data.nbytes))


def product_rate(arithmetic: Arithmetic, num_threads: int) -> float:
    """Return operations per second, two for each product, of multiplying and adding in registers.

    The instructions are those of the kernels' form; without kernels it is a square matrix product of torch in float32,
    on torch's own threads.
    """
    form, num_rounds = kernels(), FIRST_ROUNDS
    if form is None:
        factor = torch.ones(MATRIX_WIDTH, MATRIX_WIDTH)
        return 2 * MATRIX_WIDTH**3 / _seconds(lambda: factor @ factor)
    kind = getattr(extension().Arithmetic, arithmetic)
    while True:
        start = time.perf_counter()
        num_operations: float = form.multiply_in_registers(num_threads, kind, num_rounds)
        seconds = time.perf_counter() - start
        if seconds >= LEAST_S:
            return num_operations / seconds
        num_rounds *= 4


def device_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of a large square matrix product on a GPU, by the library that torch uses there."""
    factor = torch.randn(DEVICE_MATRIX_WIDTH, DEVICE_MATRIX_WIDTH, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(DEVICE_ROUNDS):
            factor @ factor
        torch.cuda.synchronize(device)

    multiply()  # the library chooses its kernel
    return DEVICE_ROUNDS * 2 * DEVICE_MATRIX_WIDTH**3 / _seconds(multiply)


@cache
def _data_to_read() -> Tensor:
    return (large_bytes(READ_BYTES) if extension() else torch.empty(READ_BYTES, dtype=torch.uint8)).fill_(1)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
