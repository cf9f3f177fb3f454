"""Packed sequences cut into pieces of one length, so that one call computes all of them: how a GPU is kept busy.

    tokens   a0 a1 a2 a3 a4 | b0 b1        pieces of 2    a0 a1 | a2 a3 | a4  - | b0 b1

Belongs here: which token lies where. Not here: what is computed of the pieces (attention.py, ssm.py).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Where the tokens of packed sequences lie when each is cut into pieces of `length`, its last one filled up.

    starts: the first piece of each sequence, and the end of the last: pieces are packed as tokens are.
    places_T: of each token among the places of all pieces, int64.
    """

    length: int
    starts: tuple[int, ...]
    places_T: Tensor

    def spread(self, values_T: Tensor) -> Tensor:
        """Return the pieces [C, L, ...] of tokens [T, ...]; zeros where there is no token."""
        num_pieces = self.starts[-1]
        if self.is_full:
            return values_T.unflatten(0, (num_pieces, self.length))
        places = values_T.new_zeros(num_pieces * self.length, *values_T.shape[1:])
        return places.index_copy(0, self.places_T, values_T).unflatten(0, (num_pieces, self.length))

    def gather(self, values_CL: Tensor) -> Tensor:
        """Return the tokens [T, ...] of pieces [C, L, ...]."""
        tokens = values_CL.flatten(0, 1)
        return tokens if self.is_full else tokens[self.places_T]

    @property
    def is_full(self) -> bool:
        """Whether every place has a token, which are then in order as they are."""
        return self.starts[-1] * self.length == len(self.places_T)


@lru_cache(maxsize=8)
def cut(starts: tuple[int, ...], length: int, device: torch.device) -> Pieces:
    """Return the pieces of packed sequences; the last call's are at hand, for every block of a model asks for them.

    starts: the first token of each sequence, and the end of the last.
    """
    with torch.inference_mode(False):  # what is kept outlives this step and may meet a gradient later
        starts_B = torch.tensor(starts)
        lengths_B = starts_B.diff()
        first_piece_B = torch.cat((torch.zeros(1, dtype=torch.int64), (-(-lengths_B // length)).cumsum(0)))
        shift_T = (first_piece_B[:-1] * length - starts_B[:-1]).repeat_interleave(lengths_B)
        return Pieces(
            length=length,
            starts=tuple(first_piece_B.tolist()),
            places_T=(torch.arange(starts[-1]) + shift_T).to(device),
        )


def whole(starts: tuple[int, ...], device: torch.device) -> Pieces:
    """Return one piece for each sequence, as long as the longest."""
    return cut(starts, max(stop - start for start, stop in pairwise(starts)), device)
