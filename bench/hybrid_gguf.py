"""Write a GGUF file of Nemotron 3 Nano's shape with random weights, where the real ones cannot be had.

    python bench/hybrid_gguf.py TO.gguf [--shape quarter|nano] [--format Q4_0|Q8_0|BF16] [--seed 0]

`quarter` has Nano's 52 blocks at a quarter of its width (741.5M parameters), `nano` is Nano 30B-A3B itself (31.6G,
18 GB as Q4_0). Blocks are drawn as they are stored, nothing is quantized; the head of a Q4_0 file is Q8_0. Scales keep
the residual stream near unit size, and the router spreads tokens over all experts as a trained one does. The tokenizer
knows single bytes and fills the vocabulary with names.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

Array = NDArray[np.generic]
Random = np.random.Generator

ARCHITECTURE = "nemotron_h_moe"
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
CONV_KERNEL, NORM_EPS, MAX_POSITIONS, ROUTER_SCALE = 4, 1e-5, 262144, 2.5
BLOCK = 32  # values that share a scale, in Q4_0 and Q8_0
BLOCK_RMS = {Format.Q4_0: math.sqrt(21.5), Format.Q8_0: math.sqrt(5461.0)}  # of -8..7 and of -128..127, evenly drawn
CHUNK_BYTES = 32 << 20
# A scale's factor on top of its matrix's: blocks differ, as trained ones do. The mean of its square is near 1.
SCALE_RANGE = (0.6, 1.35)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model with Nano's pattern."""

    width: int
    vocab_size: int
    mamba_heads: int
    mamba_groups: int
    num_experts: int
    expert_width: int
    shared_width: int
    num_heads: int
    num_kv_heads: int = 2
    head_dim: int = 128
    mamba_head_dim: int = 64
    state_size: int = 128
    num_chosen: int = 6

    @property
    def inner_width(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        return self.inner_width + 2 * self.mamba_groups * self.state_size


SHAPES = {
    "quarter": Shape(
        width=768,
        vocab_size=32768,
        mamba_heads=16,
        mamba_groups=2,
        num_experts=32,
        expert_width=512,
        shared_width=1024,
        num_heads=8,
    ),
    "nano": Shape(
        width=2688,
        vocab_size=131072,
        mamba_heads=64,
        mamba_groups=8,
        num_experts=128,
        expert_width=1856,
        shared_width=3712,
        num_heads=32,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A tensor still to be drawn. gain: the size of its product with a vector whose values have unit size."""

    name: str
    shape: tuple[int, ...]
    gain: float
    format: Format

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in bytes."""
        return gguf.quant_shape_to_byte_shape(self.shape, self.format)

    def chunks(self, random: Random) -> Iterator[NDArray[np.uint8]]:
        """Yield its bytes, a few rows at a time."""
        *outer, row_bytes = self.stored_shape
        num_rows, rows_at_once = math.prod(outer), max(1, CHUNK_BYTES // row_bytes)
        for begin in range(0, num_rows, rows_at_once):
            count = min(rows_at_once, num_rows - begin)
            yield random_rows(random, count, self.shape[-1], self.gain / math.sqrt(self.shape[-1]), self.format)


def random_rows(random: Random, num_rows: int, row_size: int, size: float, kind: Format) -> NDArray[np.uint8]:
    """Return the stored bytes of rows whose values have that root mean square.

    Signs of scales are drawn too: the levels of Q4_0 have a mean of -1/2, which would else add up along a row.
    """
    if kind not in BLOCK_RMS:
        values = random.standard_normal((num_rows, row_size), dtype=np.float32) * np.float32(size)
        return gguf.quants.quantize(values, kind).view(np.uint8).ravel()
    num_blocks = num_rows * row_size // BLOCK
    scales = random.uniform(*SCALE_RANGE, num_blocks) * random.choice((-1.0, 1.0), num_blocks) * size / BLOCK_RMS[kind]
    levels = random.integers(0, 256, (num_blocks, BLOCK // 2 if kind is Format.Q4_0 else BLOCK), dtype=np.uint8)
    return np.hstack([scales.astype(np.float16)[:, None].view(np.uint8), levels]).ravel()


def matrices(shape: Shape, kind: Format) -> Iterator[Matrix]:
    """Yield the large tensors, those of a block in the order in which the block reads them."""
    head = Format.Q8_0 if kind is Format.Q4_0 else kind
    into_stream = 1 / math.sqrt(len(PATTERN))  # all blocks together add as much as the embeddings brought
    yield _matrix("token_embd", shape.vocab_size, shape.width, math.sqrt(shape.width), kind)
    yield _matrix("output", shape.vocab_size, shape.width, 1.0, head)
    for index, letter in enumerate(PATTERN):
        for name, rows, columns, is_output in _block_matrices(shape, letter):
            gain = into_stream if is_output else 1.0
            if name.endswith("_exps"):
                yield Matrix(
                    name=f"blk.{index}.{name}.weight",
                    shape=(shape.num_experts, rows, columns),
                    gain=gain,
                    format=kind,
                )
            else:
                yield _matrix(f"blk.{index}.{name}", rows, columns, gain, kind)


def _matrix(name: str, rows: int, columns: int, gain: float, kind: Format) -> Matrix:
    return Matrix(name=f"{name}.weight", shape=(rows, columns), gain=gain, format=kind)


def _block_matrices(shape: Shape, letter: str) -> list[tuple[str, int, int, bool]]:
    """Return name, rows, columns, and whether the product goes into the residual stream."""
    width, heads, kv = shape.width, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    match letter:
        case "M":
            projected = shape.inner_width + shape.conv_width + shape.mamba_heads  # z, xBC, dt
            return [("ssm_in", projected, width, False), ("ssm_out", width, shape.inner_width, True)]
        case "*":
            sizes = {"attn_q": heads, "attn_k": kv, "attn_v": kv}
            return [*((name, rows, width, False) for name, rows in sizes.items()), ("attn_output", width, heads, True)]
        case _:
            inner = {"exps": shape.expert_width, "shexp": shape.shared_width}
            ups = [(f"ffn_up_{kind}", size, width, False) for kind, size in inner.items()]
            return ups + [(f"ffn_down_{kind}", width, size, True) for kind, size in inner.items()]


def vectors(shape: Shape, random: Random) -> Iterator[tuple[str, Array]]:
    """Yield the small tensors, float32: norms, routers, and what a Mamba-2 head has of its own."""
    ones = np.ones(shape.width)
    yield "output_norm.weight", ones
    for index, letter in enumerate(PATTERN):
        prefix = f"blk.{index}."
        yield f"{prefix}attn_norm.weight", ones
        if letter == "M":
            yield from ((prefix + name, values) for name, values in _mamba_vectors(shape, random).items())
        if letter == "E":
            spread = 1 / math.sqrt(shape.width)
            yield f"{prefix}ffn_gate_inp.weight", random.normal(0, spread, (shape.num_experts, shape.width))
            yield f"{prefix}exp_probs_b.bias", random.normal(0, 0.01, shape.num_experts)


def _mamba_vectors(shape: Shape, random: Random) -> dict[str, Array]:
    """Return a head's own tensors as Mamba-2 initialises them: A from -16 to -1, dt from 0.001 to 0.1."""
    heads = shape.mamba_heads
    dt = np.exp(random.uniform(math.log(0.001), math.log(0.1), heads))
    return {
        "ssm_conv1d.weight": random.uniform(-0.5, 0.5, (shape.conv_width, CONV_KERNEL)),
        "ssm_conv1d.bias": np.zeros(shape.conv_width),
        "ssm_dt.bias": dt + np.log(-np.expm1(-dt)),  # softplus of it is dt
        "ssm_a": -random.uniform(1, 16, (heads, 1)),
        "ssm_d": np.ones((heads, 1)),
        "ssm_norm.weight": np.ones((shape.mamba_groups, shape.inner_width // shape.mamba_groups)),
    }


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Write the keys that llama.cpp and Freehold read."""
    is_kind = {letter: [kind == letter for kind in PATTERN] for letter in "*E"}
    writer.add_block_count(len(PATTERN))
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(shape.width)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv([shape.num_kv_heads * is_one for is_one in is_kind["*"]])
    writer.add_feed_forward_length([shape.expert_width * is_one for is_one in is_kind["E"]])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_eps(NORM_EPS)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_ssm_conv_kernel(CONV_KERNEL)
    writer.add_ssm_inner_size(shape.inner_width)
    writer.add_ssm_state_size(shape.state_size)
    writer.add_ssm_time_step_rank(shape.mamba_heads)
    writer.add_ssm_group_count(shape.mamba_groups)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.num_chosen)
    writer.add_expert_feed_forward_length(shape.expert_width)
    writer.add_expert_shared_feed_forward_length(shape.shared_width)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(ROUTER_SCALE)
    writer.add_expert_group_count(1)
    writer.add_expert_group_used_count(1)


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Write a byte-level BPE with one merge, which is as few as readers take."""
    known = [*sorted(ByteLevel.alphabet()), "Ġt", "<|endoftext|>"]
    fillers = [f"<unused{number}>" for number in range(vocab_size - len(known))]
    kinds = [gguf.TokenType.NORMAL] * (len(known) - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(known + fillers)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(fillers))
    writer.add_token_merges(["Ġ t"])
    writer.add_eos_token_id(len(known) - 1)
    writer.add_add_bos_token(False)


def write_model(path: Path, shape: Shape, kind: Format, *, seed: int) -> None:
    """Write the file, holding little more than one chunk of it in memory, and say how far it is."""
    random = np.random.default_rng(seed)
    small = [(name, values.astype(np.float32)) for name, values in vectors(shape, random)]
    large = list(matrices(shape, kind))
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_metadata(writer, shape)
    add_tokenizer(writer, shape.vocab_size)
    for name, values in small:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for matrix in large:
        num_bytes = math.prod(matrix.stored_shape)
        writer.add_tensor_info(matrix.name, matrix.stored_shape, np.dtype(np.uint8), num_bytes, matrix.format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for _, values in small:
        file.write(values.tobytes())
        writer.write_padding(file, values.nbytes)
    total, done = sum(math.prod(matrix.stored_shape) for matrix in large), 0
    for matrix in large:
        for chunk in matrix.chunks(random):
            file.write(chunk.data)
            done += len(chunk)
            print(f"\r{path.name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)
        writer.write_padding(file, math.prod(matrix.stored_shape))
    writer.close()
    print(file=sys.stderr)


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="quarter")
    parser.add_argument("--format", choices=("Q4_0", "Q8_0", "BF16"), default="Q4_0")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_model(arguments.path, SHAPES[arguments.shape], Format[arguments.format], seed=arguments.seed)


if __name__ == "__main__":
    main()
