import gguf
import numpy as np
import pytest
import torch

from freehold.checkpoint.source import open_source
from freehold.quantize import gguf_blocks
from freehold.quantize.gguf_blocks import BLOCKS, dequantize
from inputs import qwen_coder_gguf, smollm2_gguf

FORMATS = list(BLOCKS)
HALF_FIELDS = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}  # others: at 0


def random_blocks(format: str, num_blocks: int, seed: int = 0) -> torch.Tensor:
    """Return blocks with any bits, except that their scales are finite, from the smallest halves to the largest."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[format]
    blocks = rng.integers(0, 256, (num_blocks, block.num_bytes), dtype=np.uint8)
    if block.num_values > 1:
        for at in HALF_FIELDS.get(format, (0,)):
            blocks[:, at + 1] &= 0xBF  # the exponent's top bit: neither infinity nor NaN
    return torch.from_numpy(blocks)


def witness(blocks: torch.Tensor, format: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[format])
    return torch.from_numpy(np.ascontiguousarray(values))


def bits(values: torch.Tensor) -> torch.Tensor:
    """Return float32 bits, with one pattern for every NaN."""
    return torch.where(values.isnan(), torch.nan, values).view(torch.int32)


def test_block_sizes_are_those_of_the_library():
    library = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {name: (block.num_values, block.num_bytes) for name, block in BLOCKS.items()} == {
        name: library[name] for name in BLOCKS
    }


@pytest.mark.parametrize("format", FORMATS)
def test_values_equal_the_witness_bit_for_bit(format):
    blocks = random_blocks(format, 300)
    got = dequantize(blocks.flatten(), format, shape=(3, 100 * BLOCKS[format].num_values))
    want = witness(blocks, format)
    if BLOCKS[format].num_values > 1:
        assert want.isfinite().all()
    assert torch.equal(bits(got).flatten(), bits(want).flatten())


@pytest.mark.parametrize("format", FORMATS)
def test_infinite_and_undefined_scales_give_what_the_witness_gives(format):
    blocks = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2000, BLOCKS[format].num_bytes), np.uint8))
    blocks[:500, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    got = dequantize(blocks.flatten(), format, shape=(2000 * BLOCKS[format].num_values,))
    assert torch.equal(bits(got), bits(witness(blocks, format)).flatten())


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_do_not_show(format, monkeypatch):
    blocks = random_blocks(format, 37)
    shape = (37, BLOCKS[format].num_values)
    whole = dequantize(blocks.flatten(), format, shape=shape)
    monkeypatch.setattr(gguf_blocks, "CHUNK_VALUES", 5 * BLOCKS[format].num_values)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(
            bits(dequantize(blocks.flatten(), format, shape=shape, dtype=dtype).float()), bits(whole.to(dtype).float())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", ["Q4_1", "Q6_K", "BF16"])
def test_other_dtypes_are_rounded_once_from_float32(format, dtype):
    blocks = random_blocks(format, 64)
    shape = (64, BLOCKS[format].num_values)
    got = dequantize(blocks.flatten(), format, shape=shape, dtype=dtype)
    want = witness(blocks, format).to(dtype)
    torch.testing.assert_close(got.flatten(), want.flatten(), rtol=0, atol=0, equal_nan=True)


def test_out_is_written_and_returned():
    blocks = random_blocks("Q8_0", 4)
    out = torch.empty(2, 64, dtype=torch.bfloat16)
    assert dequantize(blocks.flatten(), "Q8_0", shape=(2, 64), out=out) is out
    assert torch.equal(out.flatten(), witness(blocks, "Q8_0").bfloat16().flatten())


def test_bytes_of_another_shape_are_our_mistake():
    with pytest.raises(AssertionError, match="68 bytes are no Q8_0 tensor"):
        dequantize(torch.zeros(68, dtype=torch.uint8), "Q8_0", shape=(3, 32))


@pytest.mark.parametrize("model", [smollm2_gguf, qwen_coder_gguf], ids=["smollm2", "qwen"])
def test_real_tensors_equal_the_witness_bit_for_bit(model):
    with open_source(model()) as source:
        one_of_each = {tensor.format: tensor for tensor in source.tensors.values()}
        for format, tensor in one_of_each.items():
            row_bytes = BLOCKS[format].bytes_of_shape(tensor.shape[-1:])
            data = source.bytes_of(tensor.name)[: 64 * row_bytes]
            got = dequantize(data, format, shape=(len(data) // row_bytes, tensor.shape[-1]))
            assert torch.equal(bits(got).flatten(), bits(witness(data.clone(), format)).flatten()), tensor.name
