"""A run as a program that can be killed: `python -m train.whole_run FOLDER STEPS KIND`.

Before each step it says, as a line of JSON, what decides the step. It saves after every one.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from freehold.train.batch import Batch
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.schedule import Schedule
from freehold.train.state import Run, resume_run, save_run
from freehold.train.step import Objective, train_step
from models.tiny import MTP
from train.steps import batch_of, training

KINDS = {
    "float32-adamw": (torch.float32, OptimizerSettings()),
    "bfloat16-muon": (torch.bfloat16, OptimizerSettings(matrices="muon")),
}
SCHEDULE = Schedule(peak=1e-2, end=1e-3, warmup=3, decay=4, total=10)


def new_run(kind: str) -> Run:
    """Return a hybrid with experts and MTP that has not taken a step."""
    dtype, settings = KINDS[kind]
    decoder = training(MTP | {"hybrid_override_pattern": "ME*-E"}, dtype=dtype)
    torch.manual_seed(5)
    return Run(
        decoder=decoder, optimizer=Optimizer(decoder, settings), config={"kind": kind}, cursor={"next": 0, "of": "a"}
    )


def next_batches(run: Run) -> list[Batch]:
    """Return two micro-batches, their documents by the cursor, the lengths of these by torch's random numbers.

    Mutates: run.
    """
    number = run.cursor["next"]
    run.cursor = run.cursor | {"next": number + 2}
    return [batch_of(tuple(torch.randint(1, 20, (3,)).tolist()), seed=number + i) for i in range(2)]


def digest(tensors: Iterable[Tensor]) -> str:
    data = b"".join(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()


def take_step(run: Run) -> dict[str, object]:
    """Take the next step, and return what decided it. Mutates: run."""
    weights, state = digest(run.decoder.parameters()), digest(t for _, t in sorted(run.optimizer.tensors().items()))
    random, batches, rate = digest([torch.get_rng_state()]), next_batches(run), SCHEDULE.at(run.step + 1)
    report = train_step(
        run.decoder, run.optimizer, batches, number=run.step + 1, learning_rate=rate, objective=Objective()
    )
    run.step, run.num_tokens = run.step + 1, run.num_tokens + report.num_tokens
    return {
        "step": run.step,
        "weights": weights,
        "optimizer": state,
        "random": random,
        "batches": digest(tensor for batch in batches for tensor in (batch.tokens_T, batch.labels_T)),
        "learning_rate": rate,
        "loss": report.loss,
        "gradient_norm": report.gradient_norm,
    }


def main(folder: Path, num_steps: int, kind: str) -> None:
    torch.set_num_threads(1)
    run = new_run(kind)
    resume_run(folder, run)
    while run.step < num_steps:
        print(json.dumps(take_step(run)), flush=True)
        save_run(folder, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
