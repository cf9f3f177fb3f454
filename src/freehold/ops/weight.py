"""What a weight may be: a plain tensor, or values packed at the width they are stored at; with an adapter or without.

Belongs here: `Packed`, `Adapted` and how a kernel sees each kind. Not here: files, what the blocks of a file look like.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freehold.ops.native import extension, is_native

PACKED_FORMATS = frozenset(("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"))
PANEL_ROWS = 16  # rows of a matrix that lie side by side


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Matrices [..., N, K] whose values stay in a GGUF format, rearranged for the kernels (native/matrix.h).

    data: uint8, the packed matrices one after the other. No value is changed: `dense` gives what the format's formula
    says in float32.
    """

    format: str
    shape: tuple[int, ...]
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def is_quantized(self) -> bool:
        """Whether rows are quantized, too, before they meet the matrices."""
        return self.format != "BF16"

    @property
    def num_matrices(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix_bytes(self) -> int:
        """Bytes from one matrix to the next."""
        return self.nbytes // self.num_matrices

    @cached_property
    def native(self) -> Any:
        """The first matrix, as kernels read it."""
        return self._matrix(0)

    def _matrix(self, index: int) -> Any:
        address = self.data.data_ptr() + index * self.matrix_bytes
        return extension().Matrix(_panels_of(self.format), address, *self.shape[-2:])

    def rows(self, numbers: Tensor) -> Tensor:
        """Return rows of the (first) matrix, float32 [len(numbers), K]."""
        assert bool(((numbers >= 0) & (numbers < self.shape[-2])).all()), f"rows {numbers.tolist()} of {self.shape[-2]}"
        out = torch.empty(len(numbers), self.shape[-1])
        numbers = numbers.to(torch.int64).contiguous()
        extension().unpack_rows(torch.get_num_threads(), self.native, numbers.data_ptr(), len(numbers), out.data_ptr())
        return out

    def matrices(self) -> Iterator[Tensor]:
        """Yield the values of each matrix, float32 [N, K], one after the other."""
        num_rows, num_columns = self.shape[-2:]
        numbers = torch.arange(num_rows)
        for index in range(self.num_matrices):
            out = torch.empty(num_rows, num_columns)
            extension().unpack_rows(
                torch.get_num_threads(), self._matrix(index), numbers.data_ptr(), num_rows, out.data_ptr()
            )
            yield out

    def dense(self) -> Tensor:
        """Return all values, float32 of `shape`."""
        return torch.stack(list(self.matrices())).view(self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapted:
    """A weight W beside which a product of two thin matrices counts: x W^T + scale * (x A^T) B^T.

    Shapes: base [..., N, K], a [..., R, K], b [..., N, R].
    """

    base: Tensor | Packed
    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)


Weight = Tensor | Packed | Adapted


def bare(weight: Weight) -> Weight:
    """Return a weight without its adapter, where that adds nothing: B is zero, as in every adapter at first."""
    return weight.base if isinstance(weight, Adapted) and not weight.b.any() else weight


def matrix_at(weight: Weight, index: int) -> Weight:
    """Return one matrix of a stack."""
    match weight:
        case Packed():
            size = weight.matrix_bytes
            return Packed(format=weight.format, shape=weight.shape[1:], data=weight.data[index * size :][:size])
        case Adapted():
            base = matrix_at(weight.base, index)
            assert not isinstance(base, Adapted), "a weight has one adapter"
            return Adapted(base=base, a=weight.a[index], b=weight.b[index], scale=weight.scale)
        case _:
            return weight[index]


def _panels_of(format: str) -> Any:
    """Return the native name of a GGUF format in panels."""
    return getattr(extension().Format, "BF16_PANELS" if format == "BF16" else format)


def is_quantized(weight: Weight) -> bool:
    """Return whether a weight is a quantized one, kept at its width; an adapted one is where its base is."""
    weight = weight.base if isinstance(weight, Adapted) else weight
    return isinstance(weight, Packed) and weight.is_quantized


def packed_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that matrices of this shape take when packed; 0 where they cannot be."""
    if format not in PACKED_FORMATS or extension() is None or len(shape) not in (2, 3):
        return 0
    one = extension().packed_bytes(_panels_of(format), *shape[-2:])
    return one * (shape[0] if len(shape) == 3 else 1)


def large_bytes(num_bytes: int) -> Tensor:
    """Return uninitialised uint8 memory for weights, in large pages where the system gives them, on all memory nodes in
    turn: weights are read in full for every token, and small pages cost a tenth of that."""
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    extension().place_weights(memory.data_ptr(), num_bytes)
    return memory


def pack(stored: Tensor, format: str, *, shape: tuple[int, ...], out: Tensor) -> Packed:
    """Return matrices packed from a file's blocks.

    stored: uint8, the blocks of all matrices, row after row, contiguous. out: uint8 of `packed_bytes`.
    Mutates: out, which the result holds.
    """
    packed = Packed(format=format, shape=shape, data=out)
    step = stored.numel() // packed.num_matrices
    for index in range(packed.num_matrices):
        extension().pack(torch.get_num_threads(), packed._matrix(index), stored.data_ptr() + index * step)
    return packed


def matrix_of(weight: Weight) -> Any | None:
    """Return a weight as kernels read it, None where they cannot."""
    if isinstance(weight, Adapted):
        return None
    if isinstance(weight, Packed):
        return weight.native
    if not is_native(weight):
        return None
    format = extension().Format.F32 if weight.dtype is torch.float32 else extension().Format.BF16
    return extension().Matrix(format, weight.data_ptr(), *weight.shape[-2:])


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return a weight's values as a tensor of a dtype; a plain one that has it already as it is."""
    assert not isinstance(weight, Adapted), "an adapter is no part of a tensor before it is merged"
    return (weight.dense() if isinstance(weight, Packed) else weight).to(dtype)
