"""The balance of experts: after each step the corrections of routers favour those that too few tokens chose.

Paper: Wang et al., 2024, arXiv 2408.15664; DeepSeek-V3 technical report, 2024, arXiv 2412.19437, section 2.1.2.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from freehold.models.block import Block
from freehold.models.decoder import Decoder
from freehold.models.layout import ExpertLoad
from freehold.models.moe import Moe
from freehold.models.spec import MoeSpec

Loads = tuple[ExpertLoad | None, ...]  # one entry per block of `all_blocks`


def all_blocks(decoder: Decoder) -> tuple[Block, ...]:
    """Return the decoder's blocks, then those of its MTP module."""
    return cast(tuple[Block, ...], (*decoder.blocks, *(decoder.mtp.blocks if decoder.mtp else ())))


def new_loads(decoder: Decoder) -> Loads:
    """Return an empty load for each block of experts, None for each other block."""
    return tuple(
        ExpertLoad(
            counts=torch.zeros(block.spec.num_experts, dtype=torch.int64, device=decoder.device),
            balance=torch.zeros((), device=decoder.device),
        )
        if isinstance(block.spec, MoeSpec)
        else None
        for block in all_blocks(decoder)
    )


def total_balance(loads: Loads) -> Tensor:
    """Return the sum of the balance losses of all blocks, float32."""
    balances = [load.balance for load in loads if load]
    return torch.stack(balances).sum() if balances else torch.zeros(())


def count_choices(loads: Loads) -> tuple[Tensor, ...]:
    """Return how many tokens chose each expert, int64 [E] for each block of experts."""
    return tuple(load.counts for load in loads if load)


@torch.no_grad()
def correct_routers(decoder: Decoder, counts: Sequence[Tensor], rate: float) -> None:
    """Move each expert's correction by `rate`: up where fewer tokens than the mean chose it, down where more did.

    counts: of the whole global batch, as `count_choices` returns them. Mutates: the corrections.
    """
    routers = [block.mixer.gate for block in all_blocks(decoder) if isinstance(block.mixer, Moe)]
    for router, counts_E in zip(routers, counts, strict=True):
        missing_E = counts_E.sum() - len(counts_E) * counts_E  # of the mean, times the number of experts: exact
        router.e_score_correction_bias.add_(missing_E.sign(), alpha=rate)


def worst_violation(counts: Sequence[Tensor]) -> float:
    """Return how much more than its share the busiest expert of any block had (MaxVio): 0 is an even load."""
    busy = [counts_E for counts_E in counts if counts_E.any()]
    return max((float(c.max() * len(c) / c.sum()) - 1.0 for c in busy), default=0.0)
