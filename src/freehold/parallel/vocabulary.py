"""Embeddings and output head divided by rows of the vocabulary.

Every process looks up the tokens that it has, and the sum over processes is the embedding; each computes the logits of
its rows, and three numbers a token are all that a loss needs of the others.
Paper: Shoeybi et al., 2019, arXiv 1909.08053, section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.models.linear import Embedding, Head
from freehold.ops.linear import embed, linear
from freehold.ops.loss import IGNORED, chunks
from freehold.ops.weight import Weight
from freehold.parallel.cuts import Cut, cut_parameter, plain
from freehold.parallel.exchange import shared, summed, total


class EmbeddingPart(Embedding):
    """The rows of some tokens; a forward of all processes finds all."""

    def __init__(self, weight: Weight, group: dist.ProcessGroup):
        nn.Module.__init__(self)
        self.weight, self.group = weight, group

    def forward(self, tokens_T: Tensor) -> Tensor:
        rows_T, is_here_T = _rows_here(tokens_T, self.weight.shape[0], self.group)
        return summed(embed(rows_T, self.weight) * is_here_T[:, None], self.group)


class HeadPart(Head):
    """The rows of some tokens; a forward, or a loss, of all processes is over all."""

    def __init__(self, weight: Weight, group: dist.ProcessGroup):
        nn.Module.__init__(self)
        self.weight, self.bias, self.group = weight, None, group

    def forward(self, hidden_TD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return all logits [T, V], everywhere."""
        part_TV = linear(shared(hidden_TD, self.group), self.weight, dtype=dtype)
        num_rows, index, count = self.weight.shape[0], self.group.rank(), self.group.size()
        return summed(functional.pad(part_TV, (index * num_rows, (count - 1 - index) * num_rows)), self.group)

    def loss(self, hidden_TD: Tensor, labels_T: Tensor) -> tuple[Tensor, int]:
        rows_S = (labels_T != IGNORED).nonzero()[:, 0]
        weight = plain(self.weight)
        if not torch.is_grad_enabled():
            weight = weight.detach()  # no gradient of it is made then
        found: Tensor = _LossOfParts.apply(  # type: ignore[no-untyped-call]
            hidden_TD[rows_S], weight, labels_T[rows_S], self.group
        )
        return found, len(rows_S)


def divide_vocabulary(decoder: Decoder, group: dist.ProcessGroup) -> dict[str, Cut]:
    """Leave a decoder this process's rows of embeddings and output head, and return the cuts by name.

    Mutates: decoder. Raises: BadInput where the vocabulary does not divide evenly.
    """
    size = decoder.spec.vocab_size
    if size % group.size():
        raise BadInput(
            f"a vocabulary of {size:,} cannot be divided over {group.size()} processes",
            hint="give the model's config a `vocab_size` that is a multiple, past the tokenizer's last id",
        )
    cut = Cut(axis=0, segments=(size,))
    names = ["embeddings.weight"] if decoder.spec.tied_embeddings else ["embeddings.weight", "lm_head.weight"]
    for name in names:
        cut_parameter(decoder, name, cut, index=group.rank(), count=group.size())
    decoder.tie_embeddings()
    decoder.embeddings = EmbeddingPart(decoder.embeddings.weight, group)
    decoder.lm_head = HeadPart(decoder.lm_head.weight, group)
    return dict.fromkeys(names, cut)


def _rows_here(tokens_T: Tensor, num_rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return which of this process's rows each token has, and whether it has one; row 0 where it has none."""
    rows_T = tokens_T - group.rank() * num_rows
    is_here_T = (rows_T >= 0) & (rows_T < num_rows)
    return rows_T * is_here_T, is_here_T


class _LossOfParts(Function):
    """`ops.loss.linear_cross_entropy` where each process has the logits of some tokens.

    The largest logit, the sum of exponentials and the label's logit are all that is exchanged of a row, and at the end
    the gradient of the hidden states.
    """

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, head_VD: Tensor, labels_S: Tensor, group: dist.ProcessGroup) -> Tensor:
        wants_hidden, wants_head, *_ = ctx.needs_input_grad
        hidden_gradient = torch.zeros_like(hidden_SD, dtype=torch.float32) if wants_hidden else None
        head_gradient = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        loss, done = torch.zeros((), device=hidden_SD.device), 0
        for rows_SD, rows_S in chunks(hidden_SD, labels_S, head_VD):
            losses_S, gradient_SV = _losses(linear(rows_SD, head_VD).float(), rows_S, group)
            loss += losses_S.sum()
            gradient_SV = gradient_SV.to(rows_SD.dtype)
            if hidden_gradient is not None:
                hidden_gradient[done : done + len(rows_S)] = gradient_SV @ head_VD
            if head_gradient is not None:
                head_gradient += gradient_SV.T @ rows_SD
            done += len(rows_S)
        ctx.gradients = (None if hidden_gradient is None else total(hidden_gradient, group), head_gradient)
        ctx.dtypes = (hidden_SD.dtype, head_VD.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        made: Sequence[Tensor | None] = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return *made, None, None


def _losses(logits_SV: Tensor, labels_S: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, and its gradient with respect to this process's logits. Mutates: logits_SV."""
    top_S = logits_SV.amax(dim=1)
    dist.all_reduce(top_S, op=dist.ReduceOp.MAX, group=group)
    columns_S, is_here_S = _rows_here(labels_S, logits_SV.shape[1], group)
    logits_SV -= top_S[:, None]
    label_S = logits_SV.gather(1, columns_S[:, None])[:, 0] * is_here_S
    gradient_SV = logits_SV.exp_()
    sum_S, label_S = total(torch.stack((gradient_SV.sum(dim=1), label_S)), group)
    gradient_SV /= sum_S[:, None]
    gradient_SV[torch.arange(len(labels_S), device=labels_S.device), columns_S] -= is_here_S.float()
    return sum_S.log() - label_S, gradient_SV
