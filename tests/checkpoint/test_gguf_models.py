"""Whole GGUF models of all four architectures become the decoder that they were written from."""

import logging

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoint.gguf_models import Quantization, gguf_metadata, gguf_tensors, quantized, write_gguf_model

from freehold.checkpoint.load import describe, open_described
from freehold.checkpoint.rules import stored_tensors
from freehold.checkpoint.source import open_source
from freehold.errors import BadFile, BadInput, CheckpointMismatch, UnsupportedModel
from freehold.evaluate.laws import relative_difference
from freehold.models.attention import rope_table_frequencies
from freehold.models.families import family_of_config, family_of_gguf
from freehold.models.families.llama import PUBLISHED_SCALINGS
from freehold.models.spec import RopeSpec, block_pattern
from models.tiny import CONFIGS, LATENT, LLAMA, MTP, NEMOTRON, QWEN, random_tokens, tiny_decoder
from models.witness import load_ours, our_logits

# A_log goes through exp and log, and the rope divisors through a division: a few units in the last place of float32.
FLOAT32_TOLERANCE = 5e-6

# What GGUF can hold of the tiny models: it has no name for experts and MLPs in one model.
NAMES = """
    llama llama-tied llama-without-groups llama-head-dim llama-yarn qwen qwen-tied qwen-yarn nemotron-dense
    nemotron-mamba nemotron-router-groups nemotron-one-group nemotron-group-per-head
""".split()
GGUF_CONFIGS = {name: CONFIGS[name] for name in NAMES} | {
    "nemotron-moe": NEMOTRON | {"hybrid_override_pattern": "ME*E"},
    "nemotron-moe-tied": NEMOTRON | {"hybrid_override_pattern": "ME*E", "tie_word_embeddings": True},
    "nemotron-latent": LATENT | {"hybrid_override_pattern": "ME*"},
    "nemotron-unnormalized": NEMOTRON | {"hybrid_override_pattern": "ME*", "norm_topk_prob": False},
    "nemotron-unscaled": NEMOTRON | {"hybrid_override_pattern": "ME*", "routed_scaling_factor": 1.0},
    "nemotron-mtp": MTP | {"hybrid_override_pattern": "ME*"},
}
ALL = pytest.mark.parametrize("config", GGUF_CONFIGS.values(), ids=GGUF_CONFIGS)


@ALL
def test_a_gguf_model_has_the_logits_it_was_written_from(config, tmp_path):
    decoder, tokens_L = tiny_decoder(config), random_tokens(40)
    path = write_gguf_model(tmp_path / "m.gguf", decoder, config)
    loaded = load_ours(path, torch.float32)
    assert loaded.spec == decoder.spec
    assert relative_difference(our_logits(loaded, tokens_L), our_logits(decoder, tokens_L)) <= FLOAT32_TOLERANCE


@ALL
def test_every_parameter_comes_back(config, tmp_path):
    decoder = tiny_decoder(config)
    loaded = load_ours(write_gguf_model(tmp_path / "m.gguf", decoder, config), torch.float32)
    for (name, found), expected in zip(loaded.named_parameters(), decoder.parameters(), strict=True):
        tolerance = 1e-6 if name.endswith("A_log") else 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=name)


@ALL
def test_the_rules_read_backwards_give_the_file(config):
    decoder = tiny_decoder(config)
    family = family_of_config(config)
    written = dict(stored_tensors(decoder, family.gguf_names(decoder.spec, ())))
    expected = gguf_tensors(decoder, config)
    assert written.keys() == expected.keys()
    for name, values in written.items():
        torch.testing.assert_close(values.contiguous(), torch.from_numpy(expected[name].copy()), msg=name)
