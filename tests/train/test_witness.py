"""transformers and torch.optim.AdamW as witness: the same tiny Llama learns the same, step for step."""

import torch
from torch import Tensor

from freehold.train.batch import Batch, Example
from freehold.train.optim import Optimizer, OptimizerSettings, train_all
from freehold.train.schedule import Schedule
from freehold.train.step import Objective, train_step
from models.tiny import LLAMA, random_tokens
from models.witness import load_ours, save_witness, witness_model

STEPS, LENGTH = 12, 24
SCHEDULE = Schedule(peak=1e-2, warmup=4, decay=4, total=STEPS)
MAX_NORM = 1.0
# Nats. float32, sums in another order, over 12 steps in which the loss falls from 5.2 to 0.6: 4e-7 at most.
LOSS_TOLERANCE = 5e-6


def texts() -> list[Tensor]:
    """Return texts of one length, as the witness takes them, with something to learn."""
    return [random_tokens(LENGTH // 2, vocab_size=20, seed=seed).repeat(2) for seed in range(4)]


def witness_losses(model) -> list[float]:
    model.requires_grad_(True).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, ids_BL, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95)), torch.stack(texts()), []
    for number in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.at(number)
        loss = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_losses(decoder) -> list[float]:
    """Return the losses of packed texts in two micro-batches."""
    train_all(decoder)
    optimizer, objective = Optimizer(decoder, OptimizerSettings()), Objective(max_gradient_norm=MAX_NORM)
    examples = [Example(tokens_L=text[:-1], labels_L=text[1:]) for text in texts()]
    batches = [Batch.packed(examples[:3]), Batch.packed(examples[3:])]
    return [
        train_step(
            decoder, optimizer, batches, number=number, learning_rate=SCHEDULE.at(number), objective=objective
        ).loss
        for number in range(1, STEPS + 1)
    ]


def test_a_llama_learns_as_it_does_in_transformers(tmp_path):
    model = witness_model(LLAMA)
    save_witness(model, tmp_path)
    decoder = load_ours(tmp_path, torch.float32)
    expected, found = witness_losses(model), our_losses(decoder)
    assert expected[-1] < 0.2 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=LOSS_TOLERANCE)
