"""What a config may say: unknown keys, kinds and values are refused by name; spellings of one thing are the same."""

import pytest

from freehold.errors import BadFile, BadInput, UnsupportedModel
from freehold.models.families import FAMILIES, family_of_config, family_of_gguf
from freehold.models.families.fields import NEUTRAL_KEYS
from freehold.models.spec import Llama3Scaling, RopeSpec, YarnScaling
from freehold.ops.rope import yarn_attention_factor
from models.tiny import CONFIGS, LATENT, LLAMA, LLAMA3_SCALING, MTP, NEMOTRON, QWEN, YARN_SCALING, tiny_spec

FAMILY_CONFIGS = {"llama": LLAMA, "qwen": QWEN, "nemotron": NEMOTRON}


@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_an_unknown_key_is_refused_by_name(config):
    with pytest.raises(UnsupportedModel, match=r"`logit_softcap`, `surprise`"):
        tiny_spec(config | {"surprise": 1, "logit_softcap": 30.0})


@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_keys_that_change_no_result_are_accepted(config):
    assert tiny_spec(config | dict.fromkeys(NEUTRAL_KEYS - {"model_type"}, "anything")) == tiny_spec(config)


@pytest.mark.parametrize("model_type", ["gpt2", "nemotron", "", None, 3, ["llama"]])
def test_an_unknown_model_type_is_refused_with_the_known_ones(model_type):
    with pytest.raises(UnsupportedModel, match="model_type") as caught:
        family_of_config({"model_type": model_type})
    assert caught.value.hint == "known: llama, qwen2, nemotron_h"


@pytest.mark.parametrize("architecture", ["gemma", None, 7, ["llama"]])
def test_an_unknown_gguf_architecture_is_refused(architecture):
    with pytest.raises(UnsupportedModel, match="GGUF architecture"):
        family_of_gguf(architecture)


def test_every_family_is_found_by_its_names():
    for family in FAMILIES:
        assert family_of_config({"model_type": family.model_type}) is family
        assert [family_of_gguf(name) for name in family.gguf_architectures] == [family] * len(family.gguf_architectures)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (NEMOTRON, {"residual_in_fp32": True}),
        (NEMOTRON, {"use_bias": True}),
        (NEMOTRON, {"attention_bias": True}),
        (NEMOTRON, {"mlp_bias": True}),
        (NEMOTRON, {"mamba_proj_bias": True}),
        (NEMOTRON, {"use_conv_bias": False}),
        (NEMOTRON, {"mamba_hidden_act": "gelu"}),
        (NEMOTRON, {"mlp_hidden_act": "silu"}),
        (NEMOTRON, {"sliding_window": 512}),
        (NEMOTRON, {"n_shared_experts": 2}),
        (NEMOTRON, {"norm_eps": 1e-6}),
        (LLAMA, {"attention_bias": True}),
        (LLAMA, {"mlp_bias": True}),
        (LLAMA, {"hidden_act": "gelu"}),
        (LLAMA, {"pretraining_tp": 2}),
        (QWEN, {"use_sliding_window": True}),
        (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
    ids=lambda value: next(iter(value)) if len(value) == 1 else value["model_type"],
)
def test_a_value_that_is_not_implemented_is_refused_by_its_key(config, change):
    with pytest.raises(UnsupportedModel, match=f"`{next(iter(change))}`"):
        tiny_spec(config | change)


@pytest.mark.parametrize("value", ["32", 32.0, 0, -4, True, None, [32]])
@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_a_size_that_is_no_positive_integer_is_a_bad_file(config, value):
    with pytest.raises(BadFile, match="`hidden_size`"):
        tiny_spec(config | {"hidden_size": value})


@pytest.mark.parametrize("key", ["vocab_size", "num_attention_heads", "max_position_embeddings", "intermediate_size"])
@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_a_missing_size_is_named(config, key):
    with pytest.raises(BadFile, match=f"lacks `{key}`"):
        tiny_spec({name: value for name, value in config.items() if name != key})


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(BadInput, match="4 query heads"):
        tiny_spec(LLAMA | {"num_key_value_heads": 3})


# RoPE.


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "ntk"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rope_type_is_refused_by_name(key, kind):
    with pytest.raises(UnsupportedModel, match=f"RoPE type '{kind}'"):
        tiny_spec(LLAMA | {key: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("extra", [{"mscale": 1.0}, {"truncate": False}])
def test_a_rope_setting_that_is_not_implemented_is_refused_by_name(extra):
    with pytest.raises(UnsupportedModel, match=f"`{next(iter(extra))}`"):
        tiny_spec(LLAMA | {"rope_scaling": YARN_SCALING | extra})


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        pytest.param(
            LLAMA3_SCALING,
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32),
            id="llama3",
        ),
        pytest.param(
            YARN_SCALING,
            YarnScaling(factor=4.0, original_max_positions=64, attention_factor=yarn_attention_factor(4.0)),
            id="yarn",
        ),
        pytest.param({"rope_type": "default"}, None, id="default"),
    ],
)
def test_every_spelling_of_rope_gives_the_same_spec(scaling, expected):
    without = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    early = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    spelled = [
        without | {"rope_theta": 5e5, "rope_scaling": scaling},
        without | {"rope_theta": 5e5, "rope_scaling": early},
        without | {"rope_theta": 5e5, "rope_scaling": early | scaling},
        without | {"rope_parameters": scaling | {"rope_theta": 5e5}},
    ]
    assert {tiny_spec(config).blocks[0].rope for config in spelled} == {RopeSpec(theta=5e5, scaling=expected)}


def test_llama3_scaling_without_room_for_its_ramp_is_a_bad_file():
    with pytest.raises(BadFile, match="low_freq_factor < high_freq_factor"):
        tiny_spec(LLAMA | {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}})


def test_nemotron_attention_has_no_positions_whatever_its_config_says():
    spec = tiny_spec(NEMOTRON | {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "hybrid_override_pattern": "*"})
    assert spec.blocks[0].rope is None


# Nemotron's layer list.


def test_an_unknown_kind_of_layer_is_refused():
    with pytest.raises(UnsupportedModel, match="hybrid_override_pattern"):
        tiny_spec(NEMOTRON | {"hybrid_override_pattern": "M*X"})


def test_a_config_without_layers_is_a_bad_file():
    with pytest.raises(BadFile, match="no layer list"):
        tiny_spec(NEMOTRON | {"hybrid_override_pattern": ""})


def test_two_layer_lists_that_disagree_are_a_bad_file():
    with pytest.raises(BadFile, match="disagree"):
        tiny_spec(NEMOTRON | {"hybrid_override_pattern": "M*", "layers_block_type": ["mamba", "moe"]})
    both = {"hybrid_override_pattern": "M*", "layers_block_type": ["mamba", "full_attention"]}
    assert len(tiny_spec(NEMOTRON | both).blocks) == 2


def test_the_length_of_the_layer_list_overrides_num_hidden_layers():
    assert len(tiny_spec(NEMOTRON | {"num_hidden_layers": 52}).blocks) == 4


def test_the_inner_width_is_heads_times_their_size_and_not_expand():
    assert tiny_spec(NEMOTRON | {"expand": 7}) == tiny_spec(NEMOTRON)
    assert tiny_spec(NEMOTRON).blocks[0].inner_width == 8 * 16


def test_router_groups_and_mamba_groups_are_not_mixed_up():
    spec = tiny_spec(CONFIGS["nemotron-router-groups"])
    assert (spec.blocks[0].num_groups, spec.blocks[1].num_groups) == (2, 2)
    assert tiny_spec(NEMOTRON | {"n_groups": 4}).blocks[3].num_groups == 1


@pytest.mark.parametrize(
    "limit", [None, (0.0, float("inf")), [0.0, float("inf")], [0.0, {"__float__": "Infinity"}]], ids=str
)
def test_no_clamp_of_dt_may_be_spelled_as_absent_or_as_infinity(limit):
    spec = tiny_spec(NEMOTRON | {"time_step_limit": limit})
    assert spec.blocks[0].time_step_limit == (0.0, float("inf"))


def test_a_clamp_of_dt_is_kept_and_time_step_min_is_none():
    spec = tiny_spec(NEMOTRON | {"time_step_limit": [0.01, 1], "time_step_min": 0.5})
    assert spec.blocks[0].time_step_limit == (0.01, 1.0)


@pytest.mark.parametrize("limit", [[0.0], "(0, inf)", [0.0, "inf"], [0.0, {"__float__": 3}], 5], ids=str)
def test_a_clamp_of_dt_that_is_not_two_numbers_is_a_bad_file(limit):
    with pytest.raises(BadFile, match="time_step_limit"):
        tiny_spec(NEMOTRON | {"time_step_limit": limit})


def test_an_mtp_pattern_counts_only_with_mtp_layers():
    assert tiny_spec(MTP | {"num_nextn_predict_layers": 0}).mtp is None
    assert tiny_spec(MTP).mtp.blocks == (tiny_spec(MTP).blocks[1], tiny_spec(MTP).blocks[3])


@pytest.mark.parametrize("change", [{"num_nextn_predict_layers": 2}, {"mtp_hybrid_override_pattern": "E*"}], ids=str)
def test_an_mtp_module_of_another_shape_is_refused(change):
    with pytest.raises(UnsupportedModel, match="MTP"):
        tiny_spec(MTP | change)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("num_experts_per_tok", {"num_experts_per_tok": 9}),
        ("num_experts_per_tok", {"n_group": 4, "topk_group": 1}),
        ("topk_group", {"n_group": 2, "topk_group": 3}),
        ("n_group", {"n_group": 3}),
        ("n_groups", {"n_groups": 3}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_each_other_are_a_bad_file(key, change):
    with pytest.raises(BadFile, match=f"`{key}`"):
        tiny_spec(NEMOTRON | change)


@pytest.mark.parametrize("value", ["64", -1, 2.0, True], ids=str)
def test_a_latent_size_that_is_no_positive_integer_is_a_bad_file(value):
    with pytest.raises(BadFile, match="moe_latent_size"):
        tiny_spec(LATENT | {"moe_latent_size": value})


def test_an_attention_factor_of_yarn_is_taken_as_it_is_given():
    spec = tiny_spec(LLAMA | {"rope_scaling": YARN_SCALING | {"attention_factor": 1.0}})
    assert spec.blocks[0].rope.scaling.attention_factor == 1.0


def test_two_spellings_of_rope_that_disagree_are_refused():
    with pytest.raises(BadFile, match="disagree"):
        tiny_spec(LLAMA | {"rope_scaling": LLAMA3_SCALING, "rope_parameters": {"rope_type": "default"}})


def test_the_keys_that_smollm2_and_nemotron_h_8b_are_published_with_are_read():
    smollm2 = {"transformers.js_config": {}, "rope_interleaved": False, "is_llama_config": True, "rope_scaling": None}
    assert tiny_spec(LLAMA | smollm2) == tiny_spec(LLAMA)
    head_dim, eps = NEMOTRON["head_dim"], NEMOTRON.get("layer_norm_epsilon", 1e-5)
    early = {key: value for key, value in NEMOTRON.items() if key != "head_dim"}
    assert tiny_spec(early | {"attention_head_dim": head_dim, "rms_norm_eps": eps}) == tiny_spec(NEMOTRON)
    with pytest.raises(UnsupportedModel, match="rms_norm_eps"):
        tiny_spec(NEMOTRON | {"rms_norm_eps": 0.25})


def test_quantized_weights_are_refused_for_what_they_are():
    with pytest.raises(UnsupportedModel, match="the weights are quantized"):
        family_of_config(LLAMA | {"quantization_config": {"quant_method": "fp8"}})
