"""transformers' training step on PEFT's adapter beside every projection."""

from pathlib import Path

import peft
import torch
from engine_process import LORA_ALPHA, LORA_RANK
from engine_transformers_training import TrainingEngine, open_model


def open_engine(path: Path, *, weights: str, num_threads: int) -> TrainingEngine:
    """Return the engine. path: a Hugging Face folder. weights: a dtype of the base; PEFT's adapter is float32."""
    torch.set_num_threads(num_threads)
    settings = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return TrainingEngine(peft.get_peft_model(open_model(path, weights), settings))
