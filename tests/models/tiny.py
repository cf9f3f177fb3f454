"""Tiny models of every family and kind of block: their configs, and weights that leave no part without effect."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from freehold.models.decoder import Decoder, build_decoder
from freehold.models.families import family_of_config
from freehold.models.names import TensorNames
from freehold.models.spec import DecoderSpec

Config = dict[str, Any]

LLAMA: Config = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN: Config = LLAMA | {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
NEMOTRON: Config = {
    "model_type": "nemotron_h",
    "vocab_size": 97,
    "hidden_size": 32,
    "hybrid_override_pattern": "M*-E",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LATENT = NEMOTRON | {"moe_latent_size": 16}

# One of each: family, kind of block, variant of RoPE and of the router. MTP has its own entry, for no witness runs it.
CONFIGS: dict[str, Config] = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-without-groups": LLAMA | {"num_key_value_heads": 4},
    "llama-wide-heads": LLAMA | {"head_dim": 48},
    "llama-narrow-heads": LLAMA | {"head_dim": 8},  # not of the attention kernel's sixteen: the reference runs
    "llama-llama3": LLAMA | {"rope_scaling": LLAMA3_SCALING},
    "llama-yarn": LLAMA | {"rope_scaling": YARN_SCALING},
    "qwen": QWEN,
    "qwen-tied": QWEN | {"tie_word_embeddings": True},
    "qwen-yarn": QWEN | {"rope_scaling": YARN_SCALING},
    "nemotron": NEMOTRON,
    "nemotron-tied": NEMOTRON | {"tie_word_embeddings": True},
    "nemotron-dense": NEMOTRON | {"hybrid_override_pattern": "M-M*-"},
    "nemotron-mamba": NEMOTRON | {"hybrid_override_pattern": "M"},
    "nemotron-attention": NEMOTRON | {"hybrid_override_pattern": "*"},
    "nemotron-mlp": NEMOTRON | {"hybrid_override_pattern": "-"},
    "nemotron-moe": NEMOTRON | {"hybrid_override_pattern": "E"},
    "nemotron-latent": LATENT,
    "nemotron-router-groups": NEMOTRON | {"hybrid_override_pattern": "ME", "n_group": 2, "topk_group": 1},
    "nemotron-unnormalized": NEMOTRON | {"hybrid_override_pattern": "E*", "norm_topk_prob": False},
    "nemotron-one-group": NEMOTRON | {"hybrid_override_pattern": "MM", "n_groups": 1},
    "nemotron-group-per-head": NEMOTRON | {"hybrid_override_pattern": "MM", "n_groups": 8},
}
MTP = LATENT | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def tiny_spec(config: Config) -> DecoderSpec:
    """Return the spec of a config, read by its family."""
    return family_of_config(config).read_config(config)


def tiny_decoder(config: Config, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """Return a decoder with random weights, the same for the same seed."""
    decoder = build_decoder(tiny_spec(config), dtype=dtype).to_empty(device="cpu")
    randomize(decoder, seed=seed)
    decoder.tie_embeddings()
    return decoder.requires_grad_(False)


def saved_names(decoder: Decoder, config: Config) -> TensorNames:
    """Return the rules by which a decoder of this config is saved."""
    return family_of_config(config).tensor_names(decoder.spec, ())


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int) -> None:
    """Fill the parameters (and the buffers of a router) of our model or a witness's. Mutates: model."""
    random = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in sorted(tensors.items()):
        if "rotary" not in name:
            tensor.copy_(_random_values(name, tensor.shape, random))


def _random_values(name: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    """Return values of a size that keeps activations near one, by what the parameter is for.

    Steps lie between 1e-5 and 1: some below transformers' clamp of 0.001, all with an effect.
    """
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0.5, 16.0, generator=random).log()
    if name.endswith("dt_bias"):
        step = torch.empty(shape).uniform_(math.log(1e-5), 0.0, generator=random).exp()
        return step + torch.log(-torch.expm1(-step))  # softplus of it is the step
    normal = torch.randn(shape, generator=random)
    if "norm" in name or name.endswith(".D"):
        return 1.0 + 0.3 * normal
    if len(shape) < 2:
        return 0.3 * normal
    return normal if "embed" in name else normal / math.sqrt(shape[-1])


def random_tokens(length: int, *, vocab_size: int = 97, seed: int = 0) -> Tensor:
    """Return token ids, the same for the same seed."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
