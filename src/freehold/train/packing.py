"""Sequences that share a step: packed to a budget of tokens, isolated from each other by the layout.

    order    s0 s1 s2 s3 s4 s5 s6 s7 | s8 ...      a group of sequences that follow each other, packed among themselves
    packs    [s0 s1 s3] [s2 s4 s6] [s5 s7]         as they come, each where it fits best; packs by their earliest

A group depends on its number alone, so a place in the stream is two numbers, and no buffer has to be kept to go on.
"""

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from freehold.errors import BadInput
from freehold.train.batch import Batch
from freehold.train.order import Order

# Packs that a group has about: its last ones are less full, which costs a share of one in so many.
PACKS_PER_GROUP = 64

Pack = tuple[int, ...]  # places in the order


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A place in a stream of packs: how many groups, and packs of the next, were taken. stream: which stream."""

    stream: str
    group: int = 0
    pack: int = 0

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Cursor":
        """Return the cursor that `dataclasses.asdict` made these fields of. Raises: BadInput."""
        counts = [fields.get("group"), fields.get("pack")]
        if fields.keys() != {"stream", "group", "pack"} or not all(type(n) is int and n >= 0 for n in counts):
            raise BadInput(f"no cursor of a data stream: {json.dumps(fields)[:80]}")
        return Cursor(**fields)


class Stream:
    """An endless stream of packs. All workers see the same one, and take slices of what they take from it together."""

    def __init__(self, order: Order, *, budget_tokens: int) -> None:
        """Raises: BadInput where a sequence may be longer than the budget."""
        longest = max(source.sequences.max_tokens for source in order.sources)
        if longest > budget_tokens:
            raise BadInput(f"sequences of up to {longest:,} tokens do not fit into a budget of {budget_tokens:,}")
        self._order, self._budget_tokens = order, budget_tokens
        mean = sum(s.sequences.num_tokens for s in order.sources) / len(order)
        self._group_size = max(1, round(PACKS_PER_GROUP * budget_tokens / mean))
        self._groups_per_pass = -(-len(order) // self._group_size)
        self.packs_of = lru_cache(maxsize=2)(self._packs_of)

    @property
    def start(self) -> Cursor:
        """Where the stream begins."""
        return Cursor(stream=self._digest)

    def take(self, cursor: Cursor, count: int) -> tuple[list[Pack], Cursor]:
        """Return the next packs, and the place behind them. Worker w of n computes `packs[w::n]`.

        Raises: BadInput for a cursor of another stream.
        """
        if cursor.stream != self._digest:
            raise BadInput(
                "the data is not what the run began with: other data sets, lengths, weights, budget or seed",
                hint="go on with the same data and options, or begin a new run",
            )
        packs: list[Pack] = []
        group, done = cursor.group, cursor.pack
        while len(packs) < count:
            found = self.packs_of(group)[done : done + count - len(packs)]
            packs += found
            done += len(found)
            if done == len(self.packs_of(group)):
                group, done = group + 1, 0
        return packs, Cursor(stream=self._digest, group=group, pack=done)

    def one_pass(self) -> Iterator[Pack]:
        """Yield the packs of the first pass: every sequence once, where weights are sizes."""
        for group in range(self._groups_per_pass):
            yield from self.packs_of(group)

    def batch(self, pack: Pack, device: torch.device | str = "cpu") -> Batch:
        """Return a pack as a step receives it."""
        places = [self._order.at(place) for place in pack]
        examples = [self._order.sources[source].sequences.example(number) for source, number in places]
        return Batch.packed(examples, device)

    def _packs_of(self, group: int) -> list[Pack]:
        """Return the packs of a group; groups end where a pass does."""
        passes, part = divmod(group, self._groups_per_pass)
        begin = part * self._group_size
        end = min(begin + self._group_size, len(self._order))
        places = range(passes * len(self._order) + begin, passes * len(self._order) + end)
        return best_fit({place: self._length(place) for place in places}, self._budget_tokens)

    def _length(self, place: int) -> int:
        source, number = self._order.at(place)
        return self._order.sources[source].sequences.length(number)

    @property
    def _digest(self) -> str:
        sources = [(s.sequences.digest, s.sequences.max_tokens, s.weight) for s in self._order.sources]
        return hashlib.sha256(json.dumps([sources, self._order.seed, self._budget_tokens]).encode()).hexdigest()


def best_fit(lengths: dict[int, int], budget_tokens: int) -> list[Pack]:
    """Return packs that hold each of some places once, none with more tokens than the budget.

    They come in order, and each goes to the fullest pack that has room for it. With the longest first packs would be
    fuller by a little, but each of sequences of one length, and what is alike in length is often alike in kind.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens that are left, and whose they are, in order
    for place, length in lengths.items():
        fitting = bisect_left(room, (length, 0))
        if fitting == len(room):
            packs.append([])
            left, number = budget_tokens, len(packs) - 1
        else:
            left, number = room.pop(fitting)
        packs[number].append(place)
        insort(room, (left - length, number))
    return sorted(tuple(sorted(pack)) for pack in packs)
