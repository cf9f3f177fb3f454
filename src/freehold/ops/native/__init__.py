"""The C++ kernels for CPUs, and which form of them runs: the best that this machine has, the portable one, or none.

Belongs here: the choice of form, and what the extension's objects are made of. Not here: any check of a tensor; the op
that calls does that. Without the compiled extension (a source tree on the path) every op runs its torch reference.

The calls of a form take addresses of contiguous CPU memory, and objects that hold addresses; native/mixers.h describes
each. Whoever makes an address keeps its tensor alive for as long as the address is used.
"""

from array import array
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from freehold.settings import Settings

Form = Any  # an object of the extension, which has no type information
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


@cache
def extension() -> Any:
    """Return the compiled extension, or None where there is none."""
    try:
        return import_module("freehold.ops.native._kernels")
    except ModuleNotFoundError:  # only its absence is forgiven; an extension that fails to load is an error
        return None


@cache
def forms() -> dict[str, Form]:
    """Return the forms that this build has and this machine runs, by name, best first; none without the extension."""
    return {form.name: form for form in extension().forms()} if extension() else {}


@cache
def kernels() -> Form | None:
    """Return the form that the settings choose, or None where the torch references run."""
    return forms().get(native_report())


@cache
def native_report() -> str:
    """Return the name of what runs: "avx512vnni", "avx512", "avx2", "portable" or "off"."""
    match Settings().native:
        case "auto":
            return next(iter(forms()), "off")
        case mode:
            return mode if mode in forms() else "off"


def keep_freed_memory() -> None:
    """Ask for what this process frees to be kept, as whoever trains wants it: each step asks for the same memory again.

    A wish: glibc keeps most of what a step frees, not every piece. Nothing happens with another libc, or no extension.
    """
    if extension():
        extension().keep_freed_memory()


def is_native(tensor: Tensor) -> bool:
    """Return whether kernels can take a tensor as it is: on the CPU, float32 or bfloat16, contiguous."""
    return tensor.is_cpu and tensor.dtype in KERNEL_DTYPES and tensor.is_contiguous()


def has_kernels(tensor: Tensor) -> bool:
    """Return whether there are kernels for where a tensor lies, and for its dtype."""
    return tensor.is_cpu and tensor.dtype in KERNEL_DTYPES and kernels() is not None


def keeps_rows_apart(tensor: Tensor) -> bool:
    """Return whether an op has to give each row the bits that it has alone, as the kernels do.

    A function of torch may not: where there are more rows it sums in another order, or rounds otherwise at the end of
    its vectors. It is then called for each row. While a gradient is recorded it is called once: the forward that counts
    is the one without (ops/gradient.py).
    """
    return tensor.is_cpu and kernels() is not None and not torch.is_grad_enabled()


def inner_dtype(tensor: Tensor) -> torch.dtype:
    """Return what a mixer that reads a tensor holds its values in between its products.

    Float32 where there are kernels: a block as one native call keeps that inside, and its ops one by one have to give
    the same bits. The tensor's own dtype elsewhere.
    """
    return torch.float32 if has_kernels(tensor) else tensor.dtype


class Batch:
    """How packed tokens divide into sequences, as the kernels read it; `models.layout.Layout` in 32-bit integers."""

    def __init__(
        self,
        *,
        starts: Sequence[int],
        contexts: Sequence[int],
        slots: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
    ):
        self.num_sequences = len(contexts)
        most = max(map(len, pages), default=0)
        rows = [page for row in pages for page in (*row, *(0 for _ in range(most - len(row))))]
        self._arrays = [array("i", values) for values in (starts, contexts, slots, rows)]
        addresses = [values.buffer_info()[0] for values in self._arrays]
        self.native = extension().Batch(len(contexts), *addresses, most, page_size)
