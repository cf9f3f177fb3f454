"""Steps of tiny models by one process or by many, their weights whole or in parts; and runs that are saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.parallel.checkpoint import Saver
from freehold.parallel.data import Gradients, like, local, shard, whole_decoder
from freehold.parallel.model import Divided
from freehold.parallel.processes import Processes
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.state import Run, finish_saving, resume_run, save_run
from freehold.train.step import Objective, StepReport, train_step
from models.tiny import LATENT, LLAMA, MTP, QWEN, Config
from train.steps import batch_of, training

MODELS: dict[str, tuple[Config, torch.dtype]] = {
    "llama": (LLAMA, torch.float32),
    "qwen-tied": (QWEN | {"tie_word_embeddings": True}, torch.float32),
    "nemotron": (MTP, torch.float32),
    "latent-bfloat16": (LATENT, torch.bfloat16),
}
# Whether weights are in parts, and how many copies of all parts there are.
FORMS = {"replicated": (False, 1), "sharded": (True, 1), "mixed": (True, 2)}
NUM_STEPS, NUM_BATCHES, RATE = 2, 4, 1e-2
OBJECTIVE = Objective(mtp_weight=1.0, balance_weight=0.1, max_gradient_norm=0.5)  # clips in every step


class Recording(Optimizer):
    """Keeps the gradient by which the first step moved the weights, of all processes together."""

    first: dict[str, Tensor] | None = None

    def step(self, learning_rate: float) -> None:
        if self.first is None:
            self.first = {
                name: whole(like(master.grad.clone(), self._parameters[name]))
                for name, master in self._masters.items()
                if master.grad is not None
            }
        super().step(learning_rate)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if local(tensor) is not tensor else tensor


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What steps made: their reports, the gradient of the first, weights after the last; whole ones."""

    reports: list[StepReport]
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]


def new_run(processes: Processes, name: str, form: str) -> Run:
    """Return a run that has taken no step."""
    config, dtype = MODELS[name]
    decoder: Decoder = training(config, dtype=dtype)
    is_sharded, copies = FORMS[form]
    if is_sharded and processes.count > 1:
        shard(decoder, processes, copies=copies)
    return Run(
        decoder=decoder,
        optimizer=Recording(decoder, OptimizerSettings(), Gradients.of(decoder, processes, copies=copies)),
        config={"name": name},
        machine={"processes": f"{processes.count} {form}"},
        divided=Divided(processes=processes),
        saver=Saver() if is_sharded and processes.count > 1 else None,
    )


def take_step(run: Run) -> StepReport:
    """Take the next step, on batches by its number. Mutates: run."""
    run.step += 1
    batches = [batch_of(seed=run.step * NUM_BATCHES + i) for i in range(NUM_BATCHES)]
    report = train_step(
        run.decoder,
        run.optimizer,
        batches[run.processes.rank :: run.processes.count],
        number=run.step,
        learning_rate=RATE,
        objective=OBJECTIVE,
        sum_over_processes=run.processes.sum,
    )
    run.num_tokens += report.num_tokens
    return report


def take_steps(processes: Processes, name: str, form: str) -> Taken | None:
    """Return what the first steps of a model made, in the first process."""
    run = new_run(processes, name, form)
    reports = [take_step(run) for _ in range(NUM_STEPS)]
    weights = whole_weights(run)
    assert isinstance(run.optimizer, Recording)
    assert run.optimizer.first is not None
    return weights and Taken(reports=reports, gradient=run.optimizer.first, weights=weights)


def whole_weights(run: Run) -> dict[str, Tensor] | None:
    made = whole_decoder(run.decoder, run.processes)
    return made and {name: p.detach().clone() for name, p in made.named_parameters()}


def save_twice(processes: Processes, folder: Path, form: str) -> dict[str, Tensor] | None:
    """Save after each of two steps, and return the weights after a third."""
    run = new_run(processes, "nemotron", form)
    for _ in range(2):
        take_step(run)
        save_run(folder, run)
    take_step(run)  # while the last save is written
    finish_saving(run)
    return whole_weights(run)


def go_on(processes: Processes, folder: Path, form: str, until: int) -> tuple[Sequence[str], int, Any]:
    """Take up what is saved and go on to a step, and save; return notes, the step begun with, and the weights."""
    run = new_run(processes, "nemotron", form)
    if folder.exists():
        with torch.no_grad():
            for parameter in run.decoder.parameters():
                parameter.zero_()
    notes = resume_run(folder, run)
    first = run.step
    while run.step < until:
        take_step(run)
    save_run(folder, run)
    finish_saving(run)
    return notes, first, whole_weights(run)


def save_where_one_disk_is_full(processes: Processes, folder: Path) -> str:
    """Save a step where one process can write no file of that size, and return what is said of it."""
    from train.test_state import files_of_at_most

    run = new_run(processes, "nemotron", "sharded")
    take_step(run)
    with files_of_at_most(10_000 if processes.rank == processes.count - 1 else 1 << 40):
        save_run(folder, run)
        try:
            finish_saving(run)
        except BadInput as error:
            return error.message
    return "saved"
