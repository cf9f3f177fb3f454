"""Whole GGUF models of all four architectures become the decoder that they were written from."""

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from checkpoint.builders import STRING, key, raw_gguf, tensor, text
from checkpoint.gguf_models import Array, Quantization, gguf_metadata, gguf_tensors, quantized, write_gguf_model
from freehold.checkpoint.load import open_described
from freehold.checkpoint.rules import stored_tensors
from freehold.errors import BadFile, BadInput, CheckpointMismatch, UnsupportedModel
from freehold.evaluate.laws import relative_difference
from freehold.models.families import family_of_config
from freehold.models.families.llama import PUBLISHED_SCALINGS
from freehold.models.spec import Llama3Scaling
from models.tiny import CONFIGS, LATENT, LLAMA, MTP, NEMOTRON, QWEN, random_tokens, tiny_decoder
from models.witness import load_ours, our_logits, witness_logits

# A_log goes through exp and log, and the rope divisors through a division: a few units in the last place of float32.
FLOAT32_TOLERANCE = 5e-6

# What GGUF can hold of the tiny models: it has no name for experts and MLPs in one model.
NAMES = """
    llama llama-tied llama-without-groups llama-wide-heads llama-yarn qwen qwen-tied qwen-yarn nemotron-dense
    nemotron-mamba nemotron-router-groups nemotron-one-group nemotron-group-per-head
""".split()
GGUF_CONFIGS = {name: CONFIGS[name] for name in NAMES} | {
    "qwen-narrow-heads": QWEN | {"head_dim": 8},  # width / heads, all that transformers reads of Qwen in GGUF
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


def as_q8_0_and_q4_0(name: str) -> Quantization | None:
    """Quantize what has rows of whole blocks in the tiny models: everything that reads the hidden values."""
    if name.endswith(("attn_q.weight", "attn_k.weight", "ffn_up.weight", "ffn_up_exps.weight", "ssm_in.weight")):
        return Quantization.Q4_0
    return Quantization.Q8_0 if name in ("token_embd.weight", "output.weight") else None


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen", "nemotron-dense", "nemotron-moe"])
def test_a_quantized_model_has_the_logits_of_its_dequantized_weights(name, tmp_path):
    config, tokens_L = GGUF_CONFIGS[name], random_tokens(40)
    decoder, expected = tiny_decoder(config), tiny_decoder(config)
    rules = family_of_config(config).gguf_names(decoder.spec, ()).rules
    parameters, num_quantized = dict(expected.named_parameters()), 0
    for rule in rules:
        # Blocks lie along rows, so quantizing before or after a change of the rows' order is the same.
        if kind := as_q8_0_and_q4_0(rule.stored):
            parameters[rule.parameter].copy_(quantized(parameters[rule.parameter], kind))
            num_quantized += 1
    assert num_quantized >= 4
    loaded = load_ours(write_gguf_model(tmp_path / "m.gguf", decoder, config, quantize=as_q8_0_and_q4_0), torch.float32)
    assert relative_difference(our_logits(decoder, tokens_L), our_logits(expected, tokens_L)) > 0.01
    assert relative_difference(our_logits(loaded, tokens_L), our_logits(expected, tokens_L)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "qwen-narrow-heads"])
def test_transformers_reads_the_same_model_from_the_file(name, tmp_path):
    """The witness undoes the order of q and k with code of its own."""
    config, tokens_L = GGUF_CONFIGS[name], random_tokens(40)
    decoder = tiny_decoder(config)
    path = write_gguf_model(tmp_path / "m.gguf", decoder, config)
    witness = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    expected_LV = witness_logits(witness, tokens_L)
    assert relative_difference(our_logits(load_ours(path, torch.float32), tokens_L), expected_LV) <= FLOAT32_TOLERANCE


def divisors_of(scaling: Llama3Scaling, *, head_dim: int = 16, theta: float = 10000.0) -> Array:
    """Return a table as llama.cpp's converter computes it, formula and float64 of its own."""
    rows = []
    for i in range(head_dim // 2):
        wave_length = 2 * math.pi * theta ** (2 * i / head_dim)
        if wave_length < scaling.original_max_positions / scaling.high_freq_factor:
            rows.append(1.0)
        elif wave_length > scaling.original_max_positions / scaling.low_freq_factor:
            rows.append(scaling.factor)
        else:
            smooth = (scaling.original_max_positions / wave_length - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            rows.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("scaling", PUBLISHED_SCALINGS, ids=["llama-3.1", "llama-3.2"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_a_published_table_of_rope_divisors_becomes_its_scaling(scaling, theta, tmp_path):
    config = LLAMA | {"rope_theta": theta, "max_position_embeddings": 131072}
    decoder = tiny_decoder(config)
    table = {"rope_freqs.weight": divisors_of(scaling, theta=theta)}
    path = write_gguf_model(tmp_path / "m.gguf", decoder, config, extra=table)
    source, described = open_described(path)
    source.close()
    assert described.spec.blocks[0].rope.scaling == scaling
    assert described.config["rope_parameters"]["rope_type"] == "llama3"
    assert described.notes == ("`rope_freqs.weight` holds no weight: ignored",)


FOREIGN_TABLES = {
    "of-ones": np.ones(4, dtype=np.float32),
    "of-another-factor": np.array([1, 1, 1, 16], dtype=np.float32),
    "too-short": np.ones(3, dtype=np.float32),
    "of-two-dimensions": np.ones((1, 4), dtype=np.float32),
    "of-nan": np.full(4, np.nan, dtype=np.float32),
}


@pytest.mark.parametrize("table", FOREIGN_TABLES.values(), ids=FOREIGN_TABLES)
def test_a_foreign_table_of_rope_divisors_is_refused(table, tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", tiny_decoder(LLAMA), LLAMA, extra={"rope_freqs.weight": table})
    with pytest.raises(BadInput, match=r"rope_freqs\.weight"):
        open_described(path)


def test_a_table_of_rope_divisors_beside_another_scaling_is_refused(tmp_path):
    config = GGUF_CONFIGS["llama-yarn"]
    table = {"rope_freqs.weight": divisors_of(PUBLISHED_SCALINGS[0])}
    path = write_gguf_model(tmp_path / "m.gguf", tiny_decoder(config), config, extra=table)
    with pytest.raises(UnsupportedModel, match="another RoPE scaling"):
        open_described(path)


@pytest.mark.parametrize("name", ["qwen", "nemotron-moe"])
def test_a_table_of_rope_divisors_is_refused_where_nothing_would_use_it(name, tmp_path):
    config = GGUF_CONFIGS[name]
    table = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    path = write_gguf_model(tmp_path / "m.gguf", tiny_decoder(config), config, extra=table)
    with pytest.raises(CheckpointMismatch, match=r"1 stored tensors have no use: `rope_freqs\.weight`"):
        open_described(path)


def test_a_huge_table_of_rope_divisors_is_refused_before_it_is_read(tmp_path):
    tables = [tensor("rope_freqs.weight", [1 << 38])]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([key("general.architecture", STRING, text("llama"))], tables))
    os.truncate(path, path.stat().st_size + (1 << 40))
    with pytest.raises(BadFile, match="wanted is a short list of divisors"):
        open_described(path)


# What is changed in the metadata, and what the refusal says.
BAD_METADATA = {
    "no-architecture-key": ("llama", "block_count", None, "lacks `block_count`"),
    "unknown-key": ("llama", "attention.sliding_window", 128, "does not know: `attention.sliding_window`"),
    "unknown-rope": ("llama", "rope.scaling.type", "longrope", "RoPE type 'longrope' is not implemented"),
    "experts-in-llama": ("llama", "expert_count", 8, "`expert_count` is 8"),
    "two-head-sizes": ("llama", "attention.value_length", 8, "`attention.value_length` is 8"),
    "odd-heads": ("llama", "attention.key_length", 7, "7"),
    "vocabulary": ("llama", "vocab_size", 98, "`vocab_size` is 98"),
    "width": ("llama", "embedding_length", 64, r"has shape \[97, 32\], the config makes it \[97, 64\]"),
    "one-block-too-many": ("llama", "block_count", 3, "9 tensors are missing: `blk.2.attn_norm.weight`"),
    "a-million-blocks": ("llama", "block_count", 1000000, "the config has 2000000 blocks, the file 21 tensors"),
    "too-few-blocks": ("llama", "block_count", 1, "9 stored tensors have no use: `blk.1.attn_norm.weight`"),
    "kv-heads-as-one-number": ("nemotron-moe", "attention.head_count_kv", 2, "as an array of 4 integers"),
    "kv-heads-negative": ("nemotron-moe", "attention.head_count_kv", [0, 0, -2, 0], "as an array of 4 integers"),
    "kv-heads-differ": ("nemotron-moe", "attention.head_count_kv", [0, 1, 2, 0], "differs between layers"),
    "array-too-short": ("nemotron-moe", "feed_forward_length", [0, 24], "as an array of 4 integers"),
    "all-mamba": ("nemotron-moe", "attention.head_count_kv", [0, 0, 0, 0], "are missing: `blk.2.ssm_in.weight`"),
    "softmax-router": ("nemotron-moe", "expert_gating_func", 1, "`expert_gating_func` is 1"),
    "two-epsilons": ("nemotron-moe", "attention.layer_norm_rms_epsilon", 1e-3, "two different norm epsilons"),
    "inner-size": ("nemotron-moe", "ssm.inner_size", 65, "does not divide by 8 heads"),
    "mtp-twice": ("nemotron-mtp", "nextn_predict_layers", 2, "2 MTP modules"),
    "mtp-unannounced": ("nemotron-mtp", "nextn_predict_layers", None, "have no use: .*nextn"),
}


@pytest.mark.parametrize(("name", "changed", "value", "message"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_metadata_that_do_not_fit_are_refused(name, changed, value, message, tmp_path):
    config = GGUF_CONFIGS[name]

    def change(metadata: dict[str, Any]) -> None:
        full = f"{metadata['general.architecture']}.{changed}"
        metadata.pop(full, None)
        metadata.update({} if value is None else {full: value})

    path = write_gguf_model(tmp_path / "m.gguf", tiny_decoder(config), config, change=change)
    with pytest.raises(BadInput, match=message):
        open_described(path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([key("general.architecture", STRING, text("mamba"))]))
    with pytest.raises(UnsupportedModel, match="GGUF architecture 'mamba' is not implemented"):
        open_described(path)


def test_an_mtp_module_that_is_announced_and_not_stored_is_left_out(tmp_path):
    with_mtp, without = GGUF_CONFIGS["nemotron-mtp"], LATENT | {"hybrid_override_pattern": "ME*"}
    decoder = tiny_decoder(without)
    metadata = gguf_metadata(tiny_decoder(with_mtp), with_mtp)
    path = write_gguf_model(tmp_path / "m.gguf", decoder, without, change=lambda keys: keys.update(metadata))
    source, described = open_described(path)
    source.close()
    assert described.spec == decoder.spec
    assert any("MTP module" in note for note in described.notes)
