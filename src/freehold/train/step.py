"""One step of training: losses of all micro-batches, their gradient, a move of the weights.

Belongs here: what is averaged over what, and what stops a run. Not here: which batches (packing.py), which rate
(schedule.py), when to save (state.py); a recipe is the loop around this.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.errors import BadInput, Diverged
from freehold.models.decoder import Decoder
from freehold.train.balance import Loads, correct_routers, count_choices, new_loads, total_balance, worst_violation
from freehold.train.batch import Batch
from freehold.train.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step makes smaller, and how far it may go; the defaults are those of Nemotron 3 Super's pre-training.

    mtp_weight: of the mean over MTP's depths; mtp_depths: how many tokens past the next one are foretold, all by the
    one module; both mean nothing to a model without it. balance_weight: of the sequence-wise balance loss.
    correction_rate: by how much a step moves the corrections of routers. max_gradient_norm: where gradients are
    clipped.
    """

    mtp_weight: float = 0.3
    mtp_depths: int = 2
    balance_weight: float = 1e-4
    correction_rate: float = 1e-3
    max_gradient_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step found, before it moved the weights.

    loss: mean negative log-likelihood of the supervised tokens, nats. mtp_losses: the same of each of MTP's depths.
    balance: mean of the balance loss, summed over blocks. worst_violation: see balance.py. gradient_norm: before
    clipping.
    """

    loss: float
    mtp_losses: tuple[float, ...]
    balance: float
    worst_violation: float
    gradient_norm: float
    learning_rate: float
    num_supervised: int
    num_tokens: int


def train_step(
    decoder: Decoder,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    number: int,
    learning_rate: float,
    objective: Objective,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda values: values,
) -> StepReport:
    """Take one step on a global batch that comes in micro-batches, and return what it found.

    Every mean is over the global batch, counted before the first backward: it does not matter how tokens are divided
    into micro-batches, or over processes. Losses are divided by counts of all processes, so gradients have to be summed
    over them, not averaged.

    number: of the step, for messages. sum_over_processes: returns the sum of a tensor over all processes.
    Mutates: the decoder, the optimizer.
    Raises: BadInput where nothing is supervised; Diverged where a loss or the gradient is no number, with the weights
        as they were.
    """
    depths = objective.mtp_depths if decoder.mtp else 0
    counts = sum_over_processes(torch.stack([_count(batch, depths) for batch in batches]).sum(dim=0))
    if not counts[0]:
        raise BadInput(f"step {number} has {int(counts[1])} tokens, and none of them is trained on")
    try:
        sums, choices = _accumulate(decoder, batches, counts, objective, number)
        optimizer.sum_gradients()
        norm = optimizer.clip(objective.max_gradient_norm)
        if not math.isfinite(norm):
            raise _diverged(f"the gradient's norm is {norm} in step {number}")
        optimizer.step(learning_rate)
    finally:
        optimizer.forget_gradients()
    choices = [sum_over_processes(counts_E) for counts_E in choices]
    correct_routers(decoder, choices, objective.correction_rate)
    loss, balance, *mtp_losses = (sum_over_processes(sums) / counts.clamp(min=1)).tolist()
    return StepReport(
        loss=loss,
        mtp_losses=tuple(mtp_losses),
        balance=balance,
        worst_violation=worst_violation(choices),
        gradient_norm=norm,
        learning_rate=learning_rate,
        num_supervised=int(counts[0]),
        num_tokens=int(counts[1]),
    )


def _accumulate(
    decoder: Decoder, batches: Sequence[Batch], counts: Tensor, objective: Objective, number: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the sums of all losses, float64, and how often each expert of each block was chosen.

    Mutates: gradients.
    """
    depths = len(counts) - 2
    weights = torch.tensor([1.0, objective.balance_weight, *[objective.mtp_weight / max(depths, 1)] * depths])
    scales = (weights.double() / counts.clamp(min=1)).float()
    sums = torch.zeros(len(counts), dtype=torch.float64)
    choices: list[Tensor] = [torch.zeros_like(counts_E) for counts_E in count_choices(new_loads(decoder))]
    for index, batch in enumerate(batches, start=1):
        loads = new_loads(decoder)
        losses = _losses(decoder, batch, loads, depths)
        if not losses.isfinite().all():
            raise _diverged(f"the loss is {losses.tolist()} in step {number}, micro-batch {index} of {len(batches)}")
        (losses * scales).sum().backward()
        sums += losses.detach()
        choices = [total_E + counts_E for total_E, counts_E in zip(choices, count_choices(loads), strict=True)]
    return sums, choices


def _losses(decoder: Decoder, batch: Batch, loads: Loads, depths: int) -> Tensor:
    """Return sums over a batch, float32: next tokens, balance, then each of MTP's depths. Mutates: loads."""
    num_blocks = len(decoder.blocks)
    hidden_TD = decoder(batch.tokens_T, batch.layout, loads[:num_blocks])
    text, _ = decoder.lm_head.loss(hidden_TD, batch.labels_T)
    foretold = []
    for further in _further(batch, depths):
        assert decoder.mtp is not None, "depths are those of a module"
        embedded_TD = decoder.embeddings(further.tokens_T).to(decoder.dtype)
        hidden_TD = decoder.mtp(hidden_TD, embedded_TD, batch.layout, loads[num_blocks:])
        foretold.append(decoder.lm_head.loss(hidden_TD, further.labels_T)[0])
    # One copy to the CPU: backward then comes to all losses in the order of blocks, as parts of weights are gathered.
    return torch.stack([text, total_balance(loads).to(text.device), *foretold]).cpu()


def _further(batch: Batch, depths: int) -> Iterator[Batch]:
    """Yield for each of MTP's depths the tokens that it reads, and the labels that it foretells."""
    for _ in range(depths):
        batch = batch.further
        yield batch


def _count(batch: Batch, depths: int) -> Tensor:
    """Return what the sums of `_losses` are divided by, int64: supervised tokens, tokens, supervised ones by depth."""
    further = [deeper.num_supervised for deeper in _further(batch, depths)]
    return torch.tensor([batch.num_supervised, batch.layout.num_tokens, *further])


def _diverged(message: str) -> Diverged:
    return Diverged(
        message, hint="the weights are those of the step before; go on from them with a lower learning rate"
    )
