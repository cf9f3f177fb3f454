"""Freehold's training step as the benchmark runs it, on rows packed into one batch."""

import time
from collections.abc import Callable
from pathlib import Path

from engine_process import Prompt

import freehold
from freehold.checkpoint.load import load_decoder, open_described

# isort: split
import torch

from freehold.models.decoder import Decoder
from freehold.ops.native import keep_freed_memory
from freehold.train.batch import Batch, Example
from freehold.train.optim import Optimizer, OptimizerSettings, train_all
from freehold.train.step import Objective, train_step

LEARNING_RATE = 1e-4


def open_engine(path: Path, *, weights: str, num_threads: int) -> "TrainingEngine":
    """Return the engine. path: a Hugging Face folder. weights: a dtype."""
    return TrainingEngine(path, getattr(torch, weights), num_threads, prepare=train_all)


class TrainingEngine:
    """One model and its optimizer."""

    version = freehold.__version__

    def __init__(self, path: Path, dtype: torch.dtype, num_threads: int, *, prepare: Callable[[Decoder], object]):
        """Load a model. prepare: has what is trained ask for a gradient."""
        torch.set_num_threads(num_threads)
        keep_freed_memory()
        source, described = open_described(path)
        with source:
            self._decoder, _ = load_decoder(source, described, dtype=dtype, device=torch.device("cpu"))
        prepare(self._decoder)
        self._vocab_size = self._decoder.spec.vocab_size
        self._optimizer = Optimizer(self._decoder, OptimizerSettings())
        self._step = 0

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds of a step on one row."""
        return self.train([prompt])

    def train(self, rows: list[Prompt]) -> float:
        """Return the seconds of one step."""
        tokens = [torch.tensor(row) % self._vocab_size for row in rows]
        start = time.perf_counter()
        self._step += 1
        batch = Batch.packed([Example(tokens_L=row_L[:-1], labels_L=row_L[1:]) for row_L in tokens])
        train_step(
            self._decoder,
            self._optimizer,
            [batch],
            number=self._step,
            learning_rate=LEARNING_RATE,
            objective=Objective(),
        )
        return time.perf_counter() - start
