"""The block formats of GGUF files: how many values and bytes a block has, and what values its bytes stand for.

Belongs here: one decoder per format, and `dequantize`, which runs it over a tensor. Not here: reading files
(checkpoint), products with packed weights (ops).

A tensor is a row of blocks, little-endian and without padding; a row of the tensor is a whole number of blocks. `f16`
is an IEEE half, `u6` an unsigned integer of six bits; byte ranges are half-open.

    format  values  bytes  fields                                                  value i of the block
    F32          1      4  f32
    F16          1      2  f16
    BF16         1      2  the upper half of an f32
    Q8_0        32     34  d f16 [0,2)  q i8[32] [2,34)                            d q[i]
    Q4_0        32     18  d f16 [0,2)  q u4[32] [2,18)                            d (q[i] - 8)
    Q4_1        32     20  d f16 [0,2)  m f16 [2,4)  q u4[32] [4,20)               d q[i] + m
    Q5_0        32     22  d f16 [0,2)  h u1[32] [2,6)  q u4[32] [6,22)            d (q[i] + 16 h[i] - 16)
    Q5_1        32     24  d f16 [0,2)  m f16 [2,4)  h u1[32] [4,8)  q u4[32]      d (q[i] + 16 h[i]) + m
                           [8,24)
    Q4_K       256    144  d f16 [0,2)  m f16 [2,4)  s, t u6[8] [4,16)  q u4[256]  d s[i/32] q[i] - m t[i/32]
                           [16,144)
    Q5_K       256    176  as Q4_K to 16, h u1[256] [16,48)  q u4[256] [48,176)    d s[i/32] (q[i] + 16 h[i])
                                                                                   - m t[i/32]
    Q6_K       256    210  q u4[256] [0,128)  h u2[256] [128,192)  s i8[16]        d s[i/16] (q[i] + 16 h[i] - 32)
                           [192,208)  d f16 [208,210)

Where the small integers sit (byte b, counted from the start of the field):

    u4 of the 32-value formats   values 0..15 are the low nibbles of bytes 0..15, values 16..31 the high nibbles
    u4 of Q4_K, Q5_K             per 64 values: 32 bytes, low nibbles first, then high nibbles
    u4 of Q6_K                   per 128 values: 64 bytes, low nibbles first, then high nibbles
    h of Q5_0, Q5_1              bit i of a 32-bit integer belongs to value i
    h of Q5_K                    bit i/32 of byte i%32
    h of Q6_K                    per 128 values: 32 bytes; bits 2k and 2k+1 of byte b belong to value 32k + b
    s, t of Q4_K, Q5_K           for j < 4: s[j] is the low six bits of byte j, t[j] those of byte 4+j; for j >= 4:
                                 byte 4+j holds the low four bits of s[j] (low nibble) and of t[j] (high nibble), the
                                 top two bits of bytes j-4 and j hold the rest

Source: ggml's block structures and the `gguf` library's `quants.py`, which is the witness of the tests.
Precision: every step is float32, products before sums as written, so that float32 results equal the witness bit for
bit; other dtypes are rounded once from that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# Values decoded at once: scratch is a few MB, and each torch call has enough work to pay for itself and its threads.
CHUNK_VALUES = 1 << 19

_NIBBLES = 0x0F0F0F0F0F0F0F0F


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """One storage format: values and bytes per block, and the decoder of whole blocks.

    decode: (blocks [blocks, bytes] uint8, values [blocks, values] float32) -> None; writes all of `values`.
    """

    num_values: int
    num_bytes: int
    decode: Callable[[Tensor, Tensor], None]

    def bytes_of_shape(self, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor of this shape; its rows must be whole blocks."""
        assert shape[-1] % self.num_values == 0, f"a row of {shape} is no whole number of blocks"
        return prod(shape) // self.num_values * self.num_bytes


def dequantize(
    data: Tensor, format: str, *, shape: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Return the values that `data` stands for, as a tensor of `shape`.

    data: the tensor's bytes, contiguous. out: where to write instead of a new tensor; then its dtype decides.
    Shapes: data is uint8 [num_bytes], out has `shape` and is contiguous.
    Precision: float32 inside, rounded once to the dtype of the result.
    Units: needs a few MB beside the result, whatever the tensor's size.
    Mutates: out.
    """
    block = BLOCKS[format]
    assert data.numel() == block.bytes_of_shape(shape), f"{data.numel()} bytes are no {format} tensor of shape {shape}"
    out = torch.empty(tuple(shape), dtype=dtype, device=data.device) if out is None else out
    assert (out.is_contiguous(), tuple(out.shape)) == (True, tuple(shape)), "out is contiguous and has the wanted shape"
    stored, values = data.view(-1, block.num_bytes), out.view(-1, block.num_values)
    step = CHUNK_VALUES // block.num_values
    direct = out.dtype == torch.float32
    scratch = torch.empty(0 if direct else min(step, len(stored)), block.num_values, device=data.device)
    for start in range(0, len(stored), step):
        part, target = stored[start : start + step], values[start : start + step]
        decoded = target if direct else scratch[: len(part)]
        block.decode(part, decoded)
        if not direct:
            target.copy_(decoded)
    return out


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the f16 at byte `at` of each block as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Return a copy of a byte range of each block as int64 words: the integer steps then handle eight bytes at once."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(torch.int64)


def _nibbles(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high nibble of each byte, as bytes of words."""
    return words & _NIBBLES, (words >> 4) & _NIBBLES


def _bits_at(words: Tensor, *, bit: int, target: int, mask: int) -> Tensor:
    """Return each byte's bits that start at `bit`, moved to start at `target`, where `mask` is the bits to keep."""
    moved = words << (target - bit) if target >= bit else words >> (bit - target)
    return moved & (mask * 0x0101010101010101)


def _fifth_bits(blocks: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Return the 32 bits at byte `at`, one per byte at bit 4, as words: those of values 0..15 and of 16..31."""
    stored = blocks[:, at : at + 4].clone(memory_format=torch.contiguous_format)
    spread = stored.long() * 0x0101010101010101  # eight copies of the byte; copy k keeps its bit k:
    spread &= -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as a signed integer
    spread += 0x7F7F7F7F7F7F7F7F  # bit 7 of a byte is now set exactly where its bit was
    bits = _bits_at(spread, bit=7, target=4, mask=0x10)
    return bits[:, :2], bits[:, 2:]


def _store_halves(values: Tensor, low: Tensor, high: Tensor) -> None:
    values[:, :16].copy_(low.view(torch.uint8))
    values[:, 16:].copy_(high.view(torch.uint8))


def _decode_f32(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks.view(torch.float32))


def _decode_f16(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks.view(torch.float16))


def _decode_bf16(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks.view(torch.bfloat16))


def _decode_q8_0(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks[:, 2:].view(torch.int8))
    values.mul_(_half(blocks, 0))


def _decode_q4_0(blocks: Tensor, values: Tensor) -> None:
    _store_halves(values, *_nibbles(_words(blocks, 2, 18)))
    values.sub_(8).mul_(_half(blocks, 0))


def _decode_q4_1(blocks: Tensor, values: Tensor) -> None:
    _store_halves(values, *_nibbles(_words(blocks, 4, 20)))
    values.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _decode_q5_0(blocks: Tensor, values: Tensor) -> None:
    (low, high), (low_bits, high_bits) = _nibbles(_words(blocks, 6, 22)), _fifth_bits(blocks, 2)
    _store_halves(values, low | low_bits, high | high_bits)
    values.sub_(16).mul_(_half(blocks, 0))


def _decode_q5_1(blocks: Tensor, values: Tensor) -> None:
    (low, high), (low_bits, high_bits) = _nibbles(_words(blocks, 8, 24)), _fifth_bits(blocks, 4)
    _store_halves(values, low | low_bits, high | high_bits)
    values.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return d*s and m*t of the eight sub-blocks of Q4_K and Q5_K, each float32 [blocks, 8, 1]."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], dim=1)
    minimums = torch.cat([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], dim=1)
    return (_half(blocks, 0) * scales).unsqueeze(2), (_half(blocks, 2) * minimums).unsqueeze(2)


def _decode_q4_k(blocks: Tensor, values: Tensor) -> None:
    scales, minimums = _scales_and_minimums(blocks)
    pairs = values.view(-1, 4, 2, 32)
    for half, nibbles in enumerate(_nibbles(_words(blocks, 16, 144))):
        pairs[:, :, half].copy_(nibbles.view(torch.uint8).view(-1, 4, 32))
    values.view(-1, 8, 32).mul_(scales).sub_(minimums)


def _decode_q5_k(blocks: Tensor, values: Tensor) -> None:
    scales, minimums = _scales_and_minimums(blocks)
    nibbles, fifth = _nibbles(_words(blocks, 48, 176)), _words(blocks, 16, 48)
    subs = values.view(-1, 8, 32)
    for sub in range(8):
        low = nibbles[sub % 2].view(-1, 4, 4)[:, sub // 2]
        subs[:, sub].copy_((low | _bits_at(fifth, bit=sub, target=4, mask=0x10)).view(torch.uint8))
    subs.mul_(scales).sub_(minimums)


def _decode_q6_k(blocks: Tensor, values: Tensor) -> None:
    nibbles, upper = _nibbles(_words(blocks, 0, 128)), _words(blocks, 128, 192).view(-1, 2, 4)
    quarters = values.view(-1, 2, 4, 32)
    for quarter in range(4):
        low = nibbles[quarter // 2].view(-1, 2, 2, 4)[:, :, quarter % 2]
        quarters[:, :, quarter].copy_((low | _bits_at(upper, bit=2 * quarter, target=4, mask=0x30)).view(torch.uint8))
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    values.view(-1, 16, 16).sub_(32).mul_(scales.unsqueeze(2))


BLOCKS: Mapping[str, BlockFormat] = {
    "F32": BlockFormat(num_values=1, num_bytes=4, decode=_decode_f32),
    "F16": BlockFormat(num_values=1, num_bytes=2, decode=_decode_f16),
    "BF16": BlockFormat(num_values=1, num_bytes=2, decode=_decode_bf16),
    "Q8_0": BlockFormat(num_values=32, num_bytes=34, decode=_decode_q8_0),
    "Q4_0": BlockFormat(num_values=32, num_bytes=18, decode=_decode_q4_0),
    "Q4_1": BlockFormat(num_values=32, num_bytes=20, decode=_decode_q4_1),
    "Q5_0": BlockFormat(num_values=32, num_bytes=22, decode=_decode_q5_0),
    "Q5_1": BlockFormat(num_values=32, num_bytes=24, decode=_decode_q5_1),
    "Q4_K": BlockFormat(num_values=256, num_bytes=144, decode=_decode_q4_k),
    "Q5_K": BlockFormat(num_values=256, num_bytes=176, decode=_decode_q5_k),
    "Q6_K": BlockFormat(num_values=256, num_bytes=210, decode=_decode_q6_k),
}
