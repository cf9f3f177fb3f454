"""Steps for tests: batches of random documents, decoders that train, and the gradient that a step moves by."""

import torch
from torch import Tensor

from freehold.models.decoder import Decoder
from freehold.train.batch import Batch, Example
from freehold.train.optim import Optimizer, OptimizerSettings, train_all
from freehold.train.step import Objective, StepReport, train_step
from models.tiny import Config, random_tokens, tiny_decoder

# Lengths of documents: shorter than the convolution, than MTP's depths, and longer than a chunk of the scan.
LENGTHS = (7, 1, 34, 2, 3, 12)
UNCLIPPED = Objective(max_gradient_norm=float("inf"))


def document(length: int, *, seed: int = 0) -> Example:
    """Return random tokens that are all trained on but each fifth."""
    tokens_L = random_tokens(length + 1, seed=1000 * seed + length)
    labels_L = tokens_L[1:].clone()
    labels_L[4::5] = -100
    return Example(tokens_L=tokens_L[:-1], labels_L=labels_L)


def batch_of(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> Batch:
    return Batch.packed([document(length, seed=seed) for length in lengths])


def training(config: Config, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """Return a tiny decoder that trains in full."""
    decoder = tiny_decoder(config, dtype=dtype, seed=seed)
    train_all(decoder)
    return decoder


class Recording(Optimizer):
    """Keeps the gradient of the last step of a float32 decoder, as it moved the weights."""

    def __init__(self, decoder: Decoder, settings: OptimizerSettings | None = None):
        super().__init__(decoder, settings or OptimizerSettings())
        self.decoder = decoder
        self.gradients: dict[str, Tensor] = {}

    def step(self, learning_rate: float) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.decoder.named_parameters() if p.grad is not None}
        super().step(learning_rate)


def step_on(
    decoder: Decoder, batches: list[Batch], *, objective: Objective = UNCLIPPED, **more: object
) -> tuple[StepReport, dict[str, Tensor]]:
    """Take a first step, and return its report and gradients. Mutates: decoder."""
    optimizer = Recording(decoder)
    report = train_step(decoder, optimizer, batches, number=1, learning_rate=1e-3, objective=objective, **more)
    return report, optimizer.gradients
