"""What a model pays for the tokens that came: cross-entropy straight from hidden states, a chunk of logits at a time.

Belongs here: the loss of next tokens and their log-probabilities. Not here: what is averaged over which tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from freehold.ops.linear import linear, linear_reference
from freehold.ops.native import is_native, kernels
from freehold.ops.weight import Weight, dense

# The label of a token whose successor counts for nothing; the one that torch ignores.
IGNORED = -100

# What the float32 logits of one chunk may take; several copies of them live at once. On a GPU each chunk costs one more
# pass over the head's gradient, and memory is wide.
CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 512 << 20


def linear_cross_entropy_reference(hidden_TD: Tensor, head: Weight, labels_T: Tensor) -> Tensor:
    """Return the sum over labels of -log softmax(hidden @ head.T)[label], float32; IGNORED labels add nothing."""
    logits_TV = linear_reference(hidden_TD, head).float()
    return functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(hidden_TD: Tensor, head: Weight, labels_T: Tensor) -> tuple[Tensor, int]:
    """Return `linear_cross_entropy_reference` of the same arguments, and how many labels it is the sum over.

    Logits [T, V] never exist: a chunk of rows at a time they become a loss and, where one is wanted, at once the
    gradient. Rows of IGNORED labels are left out before the product.
    Shapes: head [V, D].
    Precision: logits are those of serving, rounded to the dtype of hidden_TD; softmax and sum are float32, as is the
        sum over chunks of the head's gradient, which bfloat16 would spoil in long runs. On a CPU so are all products.
    """
    rows_S = (labels_T != IGNORED).nonzero()[:, 0]
    hidden_SD, labels_S = hidden_TD[rows_S], labels_T[rows_S]
    total: Tensor = _LinearCrossEntropy.apply(hidden_SD, head, labels_S)  # type: ignore[no-untyped-call]
    return total, len(rows_S)


def token_logprobs(hidden_TD: Tensor, head: Weight, labels_T: Tensor) -> Tensor:
    """Return the log-probability of each label among the whole vocabulary, float64 [T]; 0 for IGNORED.

    Precision: the softmax is float64, as that of an answer's scores in serving: the same bits.
    """
    logprobs_T = hidden_TD.new_zeros(len(labels_T), dtype=torch.float64)
    rows_S = (labels_T != IGNORED).nonzero()[:, 0]
    parts = [
        checkpoint(_chunk_logprobs, rows_SD, head, labels_S, use_reentrant=False, preserve_rng_state=False)
        for rows_SD, labels_S in chunks(hidden_TD[rows_S], labels_T[rows_S], head)
    ]
    return logprobs_T.index_copy(0, rows_S, torch.cat(parts)) if parts else logprobs_T


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss; its gradient is made beside it, for both need the same logits."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, head: Weight, labels_S: Tensor) -> Tensor:
        wants_hidden, wants_head, _ = ctx.needs_input_grad
        # float32 products where a CPU may have none of bfloat16; the table is widened once.
        dtype = torch.float32 if hidden_SD.is_cpu else hidden_SD.dtype
        wide_head = dense(head, dtype) if wants_hidden else None
        hidden_gradients = [torch.zeros_like(hidden_SD[:0])]
        head_gradient = torch.zeros(head.shape, device=hidden_SD.device) if wants_head else None
        total = torch.zeros((), device=hidden_SD.device)
        for rows_SD, rows_S in chunks(hidden_SD, labels_S, head):
            losses_S, gradient_SV = _losses(linear(rows_SD, head).float(), rows_S)
            total += losses_S.sum()
            gradient_SV = gradient_SV.to(dtype)
            if wide_head is not None:
                hidden_gradients.append((gradient_SV @ wide_head).to(hidden_SD.dtype))
            if head_gradient is not None:
                _add_product(head_gradient, gradient_SV.T, rows_SD.to(dtype))
        hidden_gradient = torch.cat(hidden_gradients) if wants_hidden else None
        ctx.gradients, ctx.head_dtype = (hidden_gradient, head_gradient), getattr(head, "dtype", None)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,), (hidden, head) = gradients, ctx.gradients
        return (
            None if hidden is None else (hidden.float() * scale).to(hidden.dtype),  # bfloat16 would round the scale
            None if head is None else (head * scale).to(ctx.head_dtype),
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 total, in one pass over it where they are float32. Mutates: total."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunks(hidden_SD: Tensor, labels_S: Tensor, head: Weight) -> list[tuple[Tensor, Tensor]]:
    """Return rows and their labels in portions whose logits may all exist at once; none where there are no rows."""
    chunk_bytes = GPU_CHUNK_BYTES if hidden_SD.is_cuda else CHUNK_BYTES
    num_rows = max(1, chunk_bytes // (4 * head.shape[0]))
    return list(zip(hidden_SD.split(num_rows), labels_S.split(num_rows), strict=True)) if len(labels_S) else []


def _losses(logits_SV: Tensor, labels_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log softmax(logits)[label] of each row, and its gradient, softmax(logits) - one-hot(label).

    Mutates: logits_SV, which become the gradient where the kernels make it.
    """
    form = kernels()
    if form is not None and is_native(logits_SV):
        assert bool(((labels_S >= 0) & (labels_S < logits_SV.shape[1])).all()), "labels are ids of the vocabulary"
        losses_S, labels_S = logits_SV.new_empty(len(labels_S)), labels_S.contiguous()
        addresses = logits_SV.data_ptr(), labels_S.data_ptr()
        form.cross_entropy(torch.get_num_threads(), *addresses, *logits_SV.shape, losses_S.data_ptr())
        return losses_S, logits_SV
    logprobs_SV = logits_SV.log_softmax(dim=-1)
    losses_S = -logprobs_SV.gather(1, labels_S[:, None])[:, 0]
    gradient_SV = logprobs_SV.exp_()
    gradient_SV[torch.arange(len(labels_S), device=labels_S.device), labels_S] -= 1.0
    return losses_S, gradient_SV


def _chunk_logprobs(hidden_SD: Tensor, head: Weight, labels_S: Tensor) -> Tensor:
    logprobs_SV = linear(hidden_SD, head).float().double().log_softmax(dim=-1)
    return logprobs_SV.gather(1, labels_S[:, None])[:, 0]
