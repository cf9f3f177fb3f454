"""What the fixed order of Freehold's products costs: the same shapes by torch's, which may sum as they like.

    python bench/vs_gemm.py [--threads 2] [--rounds 9]

Weights of 4096 x 4096, more of them than the caches hold, met by rows in float32. By turns, medians. torch has no
product of Q8_0 or Q4_0: beside them stand its own of int8 with a scale a row, and of int4 with scales for groups of 32.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import freehold  # noqa: F401  # first, for it has torch's threads sleep between its loops

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from freehold.ops.linear import linear
from freehold.ops.weight import large_bytes, pack, packed_bytes

WIDTH, ROWS = 4096, (1, 8, 512)
CACHES_BYTES = 128 << 20
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}

Product = Callable[[Tensor], object]


def products() -> dict[str, tuple[list[Product], list[Product]]]:
    """Return ours and torch's by what weights are held in, each with as many weights as the caches cannot hold."""
    found: dict[str, tuple[list[Product], list[Product]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(WIDTH, WIDTH).to(dtype) for _ in range(_copies(dtype.itemsize * WIDTH**2))]
        ours = [lambda rows, w=w: linear(rows, w) for w in weights]
        found[str(dtype).removeprefix("torch.")] = (
            ours,
            [lambda rows, w=w: torch_linear(rows.to(w.dtype), w) for w in weights],
        )
    int8 = [torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8) for _ in range(_copies(WIDTH**2))]
    scales = torch.ones(WIDTH, dtype=torch.bfloat16)
    found["Q8_0"] = (
        _packed("Q8_0"),
        [lambda rows, w=w: torch._weight_int8pack_mm(rows.bfloat16(), w, scales) for w in int8],
    )
    nibbles = [
        torch._convert_weight_to_int4pack_for_cpu(torch.randint(16, (WIDTH, WIDTH), dtype=torch.int32), 1)
        for _ in range(_copies(WIDTH**2 // 2))
    ]
    groups = torch.ones(WIDTH // 32, WIDTH, 2, dtype=torch.bfloat16)
    found["Q4_0"] = (
        _packed("Q4_0"),
        [lambda rows, w=w: torch._weight_int4pack_mm_for_cpu(rows.bfloat16(), w, 32, groups) for w in nibbles],
    )
    return found


def _packed(format: str) -> list[Product]:
    num_bytes = WIDTH * WIDTH // 32 * BLOCK_BYTES[format]
    weights = [
        pack(
            torch.randint(60, (num_bytes,), dtype=torch.uint8),
            format,
            shape=(WIDTH, WIDTH),
            out=large_bytes(packed_bytes(format, (WIDTH, WIDTH))),
        )
        for _ in range(_copies(num_bytes))
    ]
    return [lambda rows, w=w: linear(rows, w) for w in weights]


def _copies(num_bytes: int) -> int:
    return max(1, CACHES_BYTES // num_bytes)


def seconds_of(made: list[Product], rows: Tensor) -> float:
    """Return the seconds of one product, the mean over the weights."""
    start = time.perf_counter()
    for product in made:
        product(rows)
    return (time.perf_counter() - start) / len(made)


@torch.inference_mode()
def main() -> None:
    """Print a line for each kind of weights and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, pair in products().items():
        for num_rows in ROWS:
            rows = torch.randn(num_rows, WIDTH)
            turns = [[seconds_of(made, rows) for made in pair] for _ in range(1 + arguments.rounds)][1:]
            ours, theirs = (median(seconds) for seconds in zip(*turns, strict=True))
            print(f"{name:9} {num_rows:4} rows: {ours * 1e6:9.0f} us, torch {theirs * 1e6:9.0f}, {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
