"""Steps of tiny models in several processes: `python -m parallel.steps_program FOLDER FORM...` in each of them.

For each form and each model, the first process writes what all of them made: losses and the like of each step, the
gradient of the first, and the weights after the last. Alone, it is the run that the others are held against.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from freehold.models.decoder import Decoder
from freehold.parallel.data import Gradients, like, local, shard, whole_decoder
from freehold.parallel.processes import Processes, joined
from freehold.settings import Settings
from freehold.train.optim import Optimizer, OptimizerSettings
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
NUM_STEPS, NUM_BATCHES, RATE = 3, 4, 1e-2
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
    """What steps made. weights, gradient: whole ones; of the first step before its move, of the last after it."""

    reports: list[StepReport]
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]


def take_steps(name: str, form: str, processes: Processes) -> Taken | None:
    """Return what steps of a model made, in the first process."""
    config, dtype = MODELS[name]
    decoder: Decoder = training(config, dtype=dtype)
    is_sharded, copies = FORMS[form]
    if is_sharded and processes.count > 1:
        shard(decoder, processes, copies=copies)
    optimizer = Recording(decoder, OptimizerSettings(), Gradients.of(decoder, processes, copies=copies))
    reports = []
    for number in range(1, NUM_STEPS + 1):
        batches = [batch_of(seed=number * NUM_BATCHES + i) for i in range(NUM_BATCHES)]
        reports.append(
            train_step(
                decoder,
                optimizer,
                batches[processes.rank :: processes.count],
                number=number,
                learning_rate=RATE,
                objective=OBJECTIVE,
                sum_over_processes=processes.sum,
            )
        )
    made = whole_decoder(decoder, processes)
    assert optimizer.first is not None
    if made is None:
        return None
    return Taken(reports=reports, gradient=optimizer.first, weights=dict(made.named_parameters()))


def main(folder: Path, forms: list[str]) -> None:
    torch.set_num_threads(1)
    with joined(Settings().launch) as processes:
        for form in forms:
            for name in MODELS:
                if taken := take_steps(name, form, processes):
                    write(folder / f"{name}-{form}", taken)


def write(path: Path, taken: Taken) -> None:
    reports: list[dict[str, Any]] = [asdict(report) for report in taken.reports]
    path.with_suffix(".json").write_text(json.dumps(reports))
    tensors = {f"gradient/{n}": t for n, t in taken.gradient.items()} | {
        f"weight/{n}": t for n, t in taken.weights.items()
    }
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path.with_suffix(".safetensors")
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
