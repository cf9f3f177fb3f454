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
    return TrainingEngine(open_model(path, weights))


def open_model(path: Path, weights: str) -> nn.Module:
    """Return a model that is to be trained."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, weights))
    return model.train()


class TrainingEngine:
    """One model and its optimizer."""

    version = transformers.__version__

    def __init__(self, model: nn.Module):
        self._model = model
        self._vocab_size = model.config.vocab_size
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

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
