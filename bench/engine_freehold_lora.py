"""Freehold's training step on an adapter beside every projection."""

from functools import partial
from pathlib import Path

from engine_freehold_training import TrainingEngine
from engine_process import LORA_ALPHA, LORA_RANK

# isort: split
import torch

from freehold.adapt.lora import LoraSettings, wrap


def open_engine(path: Path, *, weights: str, num_threads: int) -> TrainingEngine:
    """Return the engine. path: a Hugging Face folder. weights: a dtype of the base; the adapter is float32."""
    prepare = partial(wrap, settings=LoraSettings(rank=LORA_RANK, alpha=LORA_ALPHA), seed=0)
    return TrainingEngine(path, getattr(torch, weights), num_threads, prepare=prepare)
