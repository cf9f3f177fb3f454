"""What a model asks of a machine for one token, and what the machine gives: the limits beside each benchmark."""

from dataclasses import dataclass
from pathlib import Path

import torch

from freehold.checkpoint.load import open_described
from freehold.engine.plan import count_parts
from freehold.evaluate.limits import ARITHMETICS, product_rate


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model reads and computes for one token.

    decode_bytes: weights, but for embeddings that are only looked up and experts not chosen. States are not counted.
    prefill_operations: two for each weight that a token meets, without the head, which only the last token meets.
    """

    decode_bytes: float
    prefill_operations: float


def work_of(path: Path, weights: str) -> Work:
    """Return what a checkpoint asks for. weights: a dtype to count all of them in, or `stored` as the file has them."""
    source, described = open_described(path)
    source.close()
    parts = [part for part in count_parts(described.spec, described) if part.num_active]
    if weights == "stored":
        decode_bytes = sum((part.stored_bytes or 0) * part.num_active / part.num_parameters for part in parts)
    else:
        decode_bytes = sum(part.num_active for part in parts) * getattr(torch, weights).itemsize
    body = sum(part.num_active for part in parts if part.name not in ("head", "embeddings and head"))
    return Work(decode_bytes=decode_bytes, prefill_operations=2 * body)


def product_rates(num_threads: int) -> dict[str, float]:
    """Return operations per second of multiplying and adding in registers, of each kind that kernels use."""
    return {arithmetic: product_rate(arithmetic, num_threads) for arithmetic in ARITHMETICS}
