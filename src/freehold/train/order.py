"""Which sequence comes when: a pure function of the seed and of a place in the order.

No state and no table, so that any worker can ask for any place, and an order goes on wherever it was left.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from freehold.errors import BadInput
from freehold.train.dataset import Sequences

NUM_ROUNDS = 8
# Weights are shares of tokens; sequences are drawn by whole numbers, so that no rounding depends on the place.
WEIGHT_UNIT = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mixture. weight: its share of the tokens, beside the other weights; None for its size."""

    name: str
    sequences: Sequences
    weight: float | None = None


class Order:
    """The endless order of sequences of a mixture.

    Each source has an order of its own, shuffled anew in each pass over it, or that of its files without a seed. The
    weights say how sources take turns.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int | None) -> None:
        """Raises: BadInput for weights that are no shares."""
        self.sources, self.seed = tuple(sources), seed
        self._weights = _whole_weights(self.sources)

    def __len__(self) -> int:
        """Sequences of all sources together: one pass where weights are sizes."""
        return sum(len(source.sequences) for source in self.sources)

    def at(self, place: int) -> tuple[int, int]:
        """Return which source comes at a place, and which of its sequences."""
        source, turn = turn_at(place, self._weights)
        count = len(self.sources[source].sequences)
        epoch, index = divmod(turn, count)
        if self.seed is None:
            return source, index
        return source, shuffled(index, count, key=f"{self.seed} {source} {epoch}")


def turn_at(place: int, weights: Sequence[int]) -> tuple[int, int]:
    """Return who has the turn at a place, and how many turns it had before, where turns are shared by weights.

    The first takes its share as evenly as whole numbers allow, and the rest share what it leaves in the same way:
        weights 2, 1, 1:   0 1 0 2 0 1 0 2
    """
    rest = sum(weights)
    for number, weight in enumerate(weights[:-1]):
        before, after = (place * weight + rest - 1) // rest, ((place + 1) * weight + rest - 1) // rest
        if after > before:
            return number, before
        place, rest = place - before, rest - weight
    return len(weights) - 1, place


def shuffled(index: int, count: int, *, key: str) -> int:
    """Return where a permutation of `count` numbers sends one of them; each key is another permutation.

    A Feistel network permutes the numbers below a power of four, and is applied again until the result is below count:
    that is a permutation of those, and takes fewer than four steps on average.
    Paper: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4 (cycle walking).
    """
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        index = left << half | right
        if index < count:
            return index


@lru_cache(maxsize=64)
def _round_keys(key: str) -> tuple[int, ...]:
    return tuple(int.from_bytes(hashlib.sha256(f"{key} {n}".encode()).digest()[:8], "big") for n in range(NUM_ROUNDS))


def _mixed(value: int) -> int:
    """Return 64 bits that all depend on all bits of a value: the finalizer of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def _whole_weights(sources: Sequence[Source]) -> tuple[int, ...]:
    """Return how often each source has its turn: its share of tokens by the mean length of its sequences."""
    if all(source.weight is None for source in sources):
        return tuple(len(source.sequences) for source in sources)
    if wrong := [s for s in sources if s.weight is None or not 0 < s.weight < float("inf")]:
        raise BadInput(
            f"the weight of {wrong[0].name} is {wrong[0].weight}; every source needs a positive one, or none"
        )
    turns = [(s.weight or 0) * len(s.sequences) / s.sequences.num_tokens for s in sources]
    return tuple(max(1, round(WEIGHT_UNIT * share / sum(turns))) for share in turns)
