"""What a training step receives: packed documents, and which token each of their tokens should foretell.

Belongs here: `Batch`, and how it is made of sequences. Not here: which sequences go together (packing.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from freehold.models.layout import Layout
from freehold.ops.loss import IGNORED


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One sequence: a document, or a part of one.

    tokens_L, labels_L: int64; a label is the token that follows in the document, also where that is past this part.
    """

    tokens_L: Tensor
    labels_L: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Packed sequences and their labels.

        tokens      a0 a1 a2 | b0 b1 | c0 ...
        labels      a1 a2  -   b1  -   c1 ...        - is IGNORED: a label never crosses an edge

    tokens_T, labels_T: int64, on the layout's device.
    num_supervised: labels that are not IGNORED, over which a loss is averaged.
    """

    tokens_T: Tensor
    labels_T: Tensor
    layout: Layout
    num_supervised: int

    @staticmethod
    def packed(examples: Sequence[Example], device: torch.device | str = "cpu") -> "Batch":
        """Return sequences in one batch, in their order."""
        labels_T = torch.cat([example.labels_L for example in examples])
        return Batch(
            tokens_T=torch.cat([example.tokens_L for example in examples]).to(device),
            labels_T=labels_T.to(device),
            layout=Layout.packed([len(example.tokens_L) for example in examples], device),
            num_supervised=int((labels_T != IGNORED).sum()),
        )

    @cached_property
    def next_tokens_T(self) -> Tensor:
        """The token after each one in its sequence, whose embedding MTP reads; of a sequence's last token, itself.

        No label depends on that last one: MTP's labels there are IGNORED, and no token before it sees it.
        """
        next_T = self.tokens_T.roll(-1)
        return torch.where(self._is_last_T, self.tokens_T, next_T)

    @cached_property
    def next_labels_T(self) -> Tensor:
        """The label of the token after each one: what MTP foretells. IGNORED where a sequence ends."""
        return self.labels_T.roll(-1).masked_fill(self._is_last_T, IGNORED)

    @cached_property
    def _is_last_T(self) -> Tensor:
        is_last_T = torch.zeros_like(self.tokens_T, dtype=torch.bool)
        is_last_T[torch.tensor(self.layout.starts[1:], device=is_last_T.device) - 1] = True
        return is_last_T
