"""Packed weights for tests: random blocks of any format, and tiny decoders whose matrices are packed."""

import gguf
import numpy as np
import torch
from torch import Tensor

from freehold.models.decoder import Decoder
from freehold.models.linear import Embedding, Linear, set_weight
from freehold.models.moe import Experts
from freehold.ops.weight import PACKED_FORMATS, Packed, pack, packed_bytes
from freehold.quantize.gguf_blocks import BLOCKS
from models.tiny import LLAMA, NEMOTRON, QWEN

FORMATS = sorted(PACKED_FORMATS)
QUANTIZED_FORMATS = [format for format in FORMATS if format != "BF16"]
# Where a block's halves are: scales first, then minimums.
HALF_FIELDS = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}  # others: at 0
# Tiny models whose rows are whole blocks of 32 columns, and of 256.
PACKED_LLAMA = LLAMA | {"hidden_size": 64, "intermediate_size": 96}
PACKED_NEMOTRON = NEMOTRON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}
SUPER_QWEN = QWEN | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "tie_word_embeddings": True}
# The largest value of a block whose halves are one: what the library cannot quantize is made up in its size.
LARGEST_OF_SCALE = {"Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 128 * 32}


def random_blocks(format: str, shape: tuple[int, ...], *, seed: int = 0, scale: float | None = None) -> Tensor:
    """Return the bytes of a tensor of this shape: any bits, with finite halves.

    scale: what the halves are at most; None for any finite ones, the smallest and the largest too.
    """
    rng = np.random.default_rng(seed)
    if format == "BF16":
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(1.0 if scale is None else scale)
        return torch.from_numpy(values).bfloat16().view(torch.uint8).flatten()
    block = BLOCKS[format]
    blocks = rng.integers(0, 256, (block.bytes_of_shape(shape) // block.num_bytes, block.num_bytes), dtype=np.uint8)
    for at in HALF_FIELDS.get(format, (0,)):
        if scale is None:
            blocks[:, at + 1] &= 0xBF  # the exponent's top bit: neither infinity nor NaN
        else:
            halves = rng.uniform(-scale, scale, len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(blocks).flatten()


def pack_blocks(stored: Tensor, format: str, shape: tuple[int, ...]) -> Packed:
    """Return a file's blocks packed."""
    return pack(stored, format, shape=shape, out=torch.empty(packed_bytes(format, shape), dtype=torch.uint8))


def random_packed(format: str, shape: tuple[int, ...], *, seed: int = 0, scale: float | None = 0.01) -> Packed:
    """Return packed matrices with random values."""
    return pack_blocks(random_blocks(format, shape, seed=seed, scale=scale), format, shape)


def quantize_and_pack(weight: Tensor, format: str) -> Packed:
    """Return a weight quantized by the `gguf` library, and packed; random values of its size where that cannot."""
    if format in LARGEST_OF_SCALE:
        scale = 1.0 / (LARGEST_OF_SCALE[format] * weight.shape[-1] ** 0.5)
        return random_packed(format, tuple(weight.shape), seed=weight.numel(), scale=scale)
    kind = gguf.GGMLQuantizationType[format]
    stored = torch.from_numpy(gguf.quants.quantize(weight.detach().float().numpy(), kind))
    return pack_blocks(stored.flatten(), format, tuple(weight.shape))


def pack_decoder(decoder: Decoder, format: str) -> Decoder:
    """Return the decoder with every matrix packed whose rows are whole blocks, its router's apart. Mutates: decoder."""
    for module in decoder.modules():
        for name in _matrices_of(module):
            weight = getattr(module, name)
            if isinstance(weight, Tensor) and packed_bytes(format, tuple(weight.shape)):
                set_weight(module, name, quantize_and_pack(weight, format))
    decoder.tie_embeddings()
    return decoder


def _matrices_of(module: torch.nn.Module) -> tuple[str, ...]:
    match module:
        case Linear() | Embedding():
            return ("weight",)
        case Experts():
            return ("up_proj", "down_proj")
        case _:
            return ()
