"""What a training step receives: packed documents, and which token each of their tokens should foretell.

Belongs here: `Batch`, and how it is made of sequences. Not here: which sequences go together (packing.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from freehold.models.layout import Layout
from freehold.ops.loss import IGNORED
from freehold.parallel.context import Part, part_of


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
            num_supervised=count_supervised(labels_T),
        )

    @cached_property
    def further(self) -> "Batch":
        """What MTP reads and foretells: in the place of each token and label those of the token after it.

        At the end of a sequence the label is IGNORED, and the token itself stays: no label depends on that one, and no
        token before it sees it.
        """
        labels_T = self.labels_T.roll(-1).masked_fill(self._is_last_T, IGNORED)
        return replace(
            self,
            tokens_T=torch.where(self._is_last_T, self.tokens_T, self.tokens_T.roll(-1)),
            labels_T=labels_T,
            num_supervised=count_supervised(labels_T),
        )

    def part(self, group: ProcessGroup) -> "BatchPart":
        """Return this process's consecutive tokens (parallel/context.py)."""
        layout = part_of(self.layout, group)
        labels_T = self.labels_T[layout.slice]
        return BatchPart(
            tokens_T=self.tokens_T[layout.slice],
            labels_T=labels_T,
            layout=layout,
            num_supervised=count_supervised(labels_T),
            whole=self,
        )

    @cached_property
    def _is_last_T(self) -> Tensor:
        is_last_T = torch.zeros_like(self.tokens_T, dtype=torch.bool)
        is_last_T[torch.tensor(self.layout.starts[1:], device=is_last_T.device) - 1] = True
        return is_last_T


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPart(Batch):
    """Some consecutive tokens of a batch; what follows the last of them is in the next part."""

    whole: Batch

    @cached_property
    def further(self) -> Batch:
        assert isinstance(self.layout, Part), "this is a part"
        return self.whole.further.part(self.layout.group)


def count_supervised(labels_T: Tensor) -> int:
    """Return how many labels count."""
    return int((labels_T != IGNORED).sum())
