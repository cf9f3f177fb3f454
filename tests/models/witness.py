"""transformers as witness: its models with the weights of ours, and the same tokens through both.

Its Nemotron-H clamps the step size dt from below in prefill, against the published configs; `free_dt` undoes that.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from freehold.checkpoint.load import load_decoder, open_described
from freehold.models.decoder import Decoder
from freehold.models.layout import Layout
from models.tiny import randomize

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # it warns of YaRN factors that are not the ratio of two lengths

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "nemotron_h": (NemotronHConfig, NemotronHForCausalLM),
}


def witness_model(config: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """Return a random model of transformers in float32, made from a config.json, without a clamp of dt."""
    make_config, make_model = CLASSES[config["model_type"]]
    taken = deepcopy({key: value for key, value in config.items() if key != "model_type"})  # it writes into RoPE dicts
    model = make_model(make_config(**taken)).eval()
    _tie(model)
    randomize(model, seed=seed)
    return free_dt(model).requires_grad_(False)


def save_witness(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as transformers does; it refuses a Nemotron-H with one tensor for both uses, so it gets two."""
    if model.config.tie_word_embeddings and isinstance(model, NemotronHForCausalLM):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)


def free_dt(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with no clamp of dt. Mutates: model."""
    for module in model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = (0.0, float("inf"))
    return model


def load_witness(folder: Path) -> PreTrainedModel:
    """Return what transformers loads from a folder, without a clamp of dt."""
    model = free_dt(transformers.AutoModelForCausalLM.from_pretrained(folder)).eval().requires_grad_(False)
    _tie(model)
    return model


def _tie(model: PreTrainedModel) -> None:
    """Share the embeddings where the config says so: transformers does not do it for Nemotron-H."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight


def load_ours(path: Path, dtype: torch.dtype) -> Decoder:
    """Return what Freehold loads from a folder or file."""
    source, described = open_described(path)
    with source:
        return load_decoder(source, described, dtype=dtype, device=torch.device("cpu"))[0]


@torch.inference_mode()
def witness_logits(model: PreTrainedModel, tokens_L: Tensor) -> Tensor:
    """Return float32 logits [L, V] of one sequence."""
    return model(tokens_L[None], use_cache=False).logits[0].float()


@torch.inference_mode()
def our_logits(decoder: Decoder, tokens_L: Tensor) -> Tensor:
    """Return float32 logits [L, V] of one sequence."""
    return decoder.logits(decoder(tokens_L, Layout.packed([len(tokens_L)])))
