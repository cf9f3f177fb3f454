"""Rotary position embedding: the frequencies of its variants, and the rotation itself."""

import math

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Return the plain frequencies theta ** (-2i / head_dim), float32.

    Shapes: [head_dim / 2].
    Units: radians per position.
    Paper: Su et al., 2021, arXiv 2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def llama3_frequencies(
    plain: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_positions: int
) -> Tensor:
    """Return the frequencies of Llama 3.1: long waves slowed by `factor`, short ones kept, a ramp between.

    wave length > original / low_freq_factor    plain / factor
    wave length < original / high_freq_factor   plain
    between                                     both, mixed linearly in original / wave length
    """
    turns = original_max_positions * plain / (2 * math.pi)  # full turns within the original context
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    slowed = torch.where(turns < low_freq_factor, plain / factor, mixed)
    return torch.where(turns > high_freq_factor, plain, slowed)


def yarn_frequencies(
    plain: Tensor, *, theta: float, factor: float, beta_fast: float, beta_slow: float, original_max_positions: int
) -> Tensor:
    """Return the frequencies of YaRN: interpolated where a wave turns less than `beta_slow` times in the original
    context, plain where it turns more than `beta_fast` times, a linear ramp over the dimensions between.

    Paper: Peng et al., 2023, arXiv 2309.00071, section 3.2.
    """
    half = len(plain)

    def dimension_of(turns: float) -> float:
        return half * math.log(original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension_of(beta_fast)), 0)
    high = min(math.ceil(dimension_of(beta_slow)), 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / factor * interpolated + plain * (1 - interpolated)


def yarn_attention_factor(factor: float) -> float:
    """Return what YaRN multiplies cosine and sine by (arXiv 2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(heads_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Return the heads turned by their positions' angles, rotate-half layout: channel i pairs with i + K/2.

    Shapes: [T, H, K]; cos and sin hold each angle twice, [T, K].
    """
    first_THK, second_THK = heads_THK.chunk(2, dim=-1)
    turned_THK = torch.cat((-second_THK, first_THK), dim=-1)
    return heads_THK * cos_TK[:, None] + turned_THK * sin_TK[:, None]
