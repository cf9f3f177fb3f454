"""Every published size builds from its config, without memory, and has exactly the published tensors and elements."""

from dataclasses import replace

import pytest
import torch

from freehold.checkpoint.rules import stored_tensors
from freehold.models.decoder import build_decoder
from freehold.models.families import family_of_config
from freehold.models.layout import kv_bytes_per_token, recurrent_bytes_per_sequence
from freehold.models.spec import AttentionSpec, DecoderSpec, Llama3Scaling, block_pattern
from models.published import (
    LIGHTNING,
    LLAMAS,
    NANO,
    NANO_4B,
    NEMOTRONS,
    PUBLISHED,
    QWENS,
    SUPER,
    ULTRA,
    ULTRA_PATTERN,
    Config,
    listed,
)

# The spelling of transformers since 5.13.
TRANSFORMERS_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def spec_of(config: Config) -> DecoderSpec:
    return family_of_config(config).read_config(config)


def stored_sizes(config: Config, spec: DecoderSpec) -> tuple[int, int]:
    """Return how many tensors a checkpoint stores, and of how many elements."""
    names = family_of_config(config).tensor_names(spec, ())
    shapes = [tensor.shape for _, tensor in stored_tensors(build_decoder(spec, dtype=torch.bfloat16), names)]
    return len(shapes), sum(shape.numel() for shape in shapes)


WITH_COUNTS = {name: published for name, published in PUBLISHED.items() if published.elements}


@pytest.mark.parametrize("published", WITH_COUNTS.values(), ids=WITH_COUNTS)
def test_a_published_model_has_its_tensors_and_elements(published):
    found = stored_sizes(published.config, spec_of(published.config))
    assert found == (published.tensors, published.elements)


@pytest.mark.parametrize("name", ["nemotron-3-super", "nemotron-3-ultra", "nemotron-3.5-lightning"])
def test_without_its_mtp_module_it_has_so_many_fewer(name):
    published = PUBLISHED[name]
    found = stored_sizes(published.config, replace(spec_of(published.config), mtp=None))
    assert found == (published.tensors_without_mtp, published.elements_without_mtp)


@pytest.mark.parametrize(
    ("name", "tensors", "billions"),
    [
        ("nemotron-h-8b", 311, 8.10),
        ("nemotron-h-4b", 311, None),
        ("nemotron-nano-9b-v2", 341, 8.89),  # 27 Mamba of 9 tensors, 4 attention of 5, 25 MLP of 3, and 3 outside
        ("nemotron-nano-12b-v2", 369, None),  # 28, 6 and 28
    ],
)
def test_a_model_whose_elements_were_published_in_billions(name, tensors, billions):
    found, elements = stored_sizes(PUBLISHED[name].config, spec_of(PUBLISHED[name].config))
    assert found == tensors
    assert billions is None or round(elements / 1e9, 2) == billions


def test_stored_names_are_the_published_ones():
    spec = spec_of(SUPER)
    names = family_of_config(SUPER).tensor_names(spec, ())
    stored = {name: tuple(t.shape) for name, t in stored_tensors(build_decoder(spec, dtype=torch.bfloat16), names)}
    assert stored["backbone.embeddings.weight"] == (131072, 4096)
    assert stored["backbone.layers.0.mixer.in_proj.weight"] == (18560, 4096)
    assert stored["backbone.layers.0.mixer.conv1d.weight"] == (10240, 1, 4)
    assert stored["backbone.layers.1.mixer.experts.511.up_proj.weight"] == (2688, 1024)
    assert stored["backbone.layers.1.mixer.gate.e_score_correction_bias"] == (512,)
    assert stored["mtp.layers.0.eh_proj.weight"] == (4096, 8192)
    assert stored["mtp.layers.1.mixer.fc2_latent_proj.weight"] == (4096, 1024)
    assert stored["mtp.layers.1.final_layernorm.weight"] == (4096,)


@pytest.mark.parametrize("config", [p.config for p in NEMOTRONS.values()], ids=NEMOTRONS)
def test_all_three_spellings_of_the_layer_list_give_the_same_spec(config):
    expected = spec_of(config)
    spec_pattern = block_pattern(expected.blocks)
    kept = {key: value for key, value in config.items() if "layers_block_type" not in key and "pattern" not in key}
    mtp_pattern = "*E" if expected.mtp else None
    pattern = kept | {"hybrid_override_pattern": spec_pattern, "mtp_hybrid_override_pattern": mtp_pattern}
    transformers = kept | {
        "layers_block_type": [TRANSFORMERS_KINDS[letter] for letter in spec_pattern],
        "mtp_layers_block_type": ["full_attention", "moe"],
    }
    alias = {("layer_types" if key == "layers_block_type" else key): value for key, value in transformers.items()}
    assert [spec_of(spelled) for spelled in (pattern, listed(pattern), transformers, alias)] == [expected] * 4


def test_attention_layers_lie_where_the_models_have_them():
    def attention_layers(config: Config) -> list[int]:
        return [i for i, block in enumerate(spec_of(config).blocks) if isinstance(block, AttentionSpec)]

    assert attention_layers(NANO) == attention_layers(LIGHTNING) == [5, 12, 19, 26, 33, 42]
    assert attention_layers(SUPER) == [7, 16, 25, 36, 47, 58, 69, 78]
    assert attention_layers(ULTRA) == [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98]
    assert attention_layers(NANO_4B) == [12, 17, 24, 32]
    assert [ULTRA_PATTERN.count(letter) for letter in "ME*"] == [48, 48, 12]


@pytest.mark.parametrize(
    ("config", "ssm_bytes", "conv_bytes", "kv_bytes"),
    [
        pytest.param(NANO, 48_234_496, 847_872, 6_144, id="nano"),
        pytest.param(SUPER, 167_772_160, 2_457_600, 8_192, id="super"),
        pytest.param(ULTRA, 402_653_184, 5_308_416, 12_288, id="ultra"),
        pytest.param(NANO_4B, 82_575_360, 1_225_728, 16_384, id="nano-4b"),
    ],
)
def test_states_take_their_published_bytes(config, ssm_bytes, conv_bytes, kv_bytes):
    blocks = spec_of(config).blocks
    assert recurrent_bytes_per_sequence(blocks, torch.bfloat16) == ssm_bytes + conv_bytes
    assert kv_bytes_per_token(blocks, torch.bfloat16) == kv_bytes


def test_a_layer_of_llama_or_qwen_is_two_blocks():
    assert block_pattern(spec_of(LLAMAS["llama-3.2-1b"].config).blocks) == "*-" * 16
    assert block_pattern(spec_of(QWENS["qwen-2.5-0.5b"].config).blocks) == "*-" * 24


@pytest.mark.parametrize(("name", "factor"), [("3-8b", None), ("3.1-8b", 8.0), ("3.2-3b", 32.0), ("3.3-70b", 8.0)])
def test_each_generation_of_llama_3_stretches_its_positions_by_its_own_factor(name, factor):
    attention = spec_of(LLAMAS[f"llama-{name}"].config).blocks[0]
    scaling = attention.rope.scaling
    assert factor == (scaling.factor if isinstance(scaling, Llama3Scaling) else None)
