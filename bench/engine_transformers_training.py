"""transformers' training step as the benchmark runs it: the model's own loss, torch's fused AdamW, clipping."""

import time
from pathlib import Path

import torch
import transformers
from engine_process import Prompt
from torch import nn
from transformers import AutoModelForCausalLM

LEARNING_RATE, MAX_NORM = 1e-4, 1.0


def open_engine(path: Path, *, weights: str, num_threads: int) -> "TrainingEngine":
    """Return the engine. path: a Hugging Face folder. weights: a dtype, of weights, gradients and moments alike."""
    torch.set_num_threads(num_threads)
    return TrainingEngine(path, getattr(torch, weights))


class TrainingEngine:
    """One model and its optimizer."""

    version = transformers.__version__

    def __init__(self, path: Path, dtype: torch.dtype):
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()
        self._vocab_size = self._model.config.vocab_size
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds of a step on one row."""
        return self.train([prompt])

    def train(self, rows: list[Prompt]) -> float:
        """Return the seconds of one step, the loss read as a training loop reads it."""
        ids_BL = torch.tensor(rows) % self._vocab_size
        start = time.perf_counter()
        loss = self._model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - start
