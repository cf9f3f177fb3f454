"""Law 1 on tiny models: what transformers saves, Freehold loads, and both compute the same; and the other way round."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from freehold.checkpoint.save import save_checkpoint
from freehold.evaluate.laws import relative_difference
from freehold.models.families import family_of_config
from freehold.models.layout import Layout
from freehold.models.spec import MoeSpec
from models.tiny import CONFIGS, MTP, random_tokens, saved_names, tiny_decoder
from models.witness import load_ours, load_witness, our_logits, save_witness, witness_logits, witness_model

# Relative length of the difference of all logits. float32: sums in another order over five blocks; 5e-7 at most.
FLOAT32_TOLERANCE = 5e-6
# bfloat16: the witness rounds in other places (softplus of dt, cosine and sine, the weights of experts); 1e-2 at most.
BFLOAT16_TOLERANCE = 2e-2
# Where a rounding may decide which expert is chosen; 8e-2 at most.
ROUTED_BFLOAT16_TOLERANCE = 0.25
# Of one parameter's gradient, float32: small sums of large terms in the scan's decays; 7e-5 at most.
GRADIENT_TOLERANCE = 3e-4

LENGTH = 40  # not a multiple of either side's chunks; past the original context of the scaled RoPEs
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@ALL
def test_logits_equal_the_witness_in_float32(config, tmp_path):
    witness, tokens_L = witness_model(config), random_tokens(LENGTH)
    save_witness(witness, tmp_path)
    found_LV = our_logits(load_ours(tmp_path, torch.float32), tokens_L)
    assert relative_difference(found_LV, witness_logits(witness, tokens_L)) <= FLOAT32_TOLERANCE


@ALL
def test_logits_equal_the_witness_in_bfloat16(config, tmp_path):
    witness, tokens_L = witness_model(config).bfloat16(), random_tokens(LENGTH)
    save_witness(witness, tmp_path)
    decoder = load_ours(tmp_path, torch.bfloat16)
    is_routed = any(isinstance(block, MoeSpec) for block in decoder.spec.blocks)
    tolerance = ROUTED_BFLOAT16_TOLERANCE if is_routed else BFLOAT16_TOLERANCE
    expected_LV = witness_logits(load_witness(tmp_path), tokens_L)
    assert relative_difference(our_logits(decoder, tokens_L), expected_LV) <= tolerance


@ALL
def test_what_we_save_transformers_loads_and_computes_the_same(config, tmp_path):
    decoder, tokens_L = tiny_decoder(config), random_tokens(LENGTH)
    save_checkpoint(tmp_path / "saved", decoder, family=family_of_config(config), config=config)
    expected_LV = witness_logits(load_witness(tmp_path / "saved"), tokens_L)
    assert relative_difference(our_logits(decoder, tokens_L), expected_LV) <= FLOAT32_TOLERANCE


@ALL
def test_gradients_equal_those_of_the_witness(config):
    witness, tokens_L = witness_model(config).requires_grad_(True), random_tokens(LENGTH)
    decoder = decoder_with_weights_of(witness, config).requires_grad_(True)
    hidden_LD = decoder(tokens_L[:-1], Layout.packed([LENGTH - 1]))
    cross_entropy(decoder.logits(hidden_LD), tokens_L[1:]).backward()
    cross_entropy(witness(tokens_L[None, :-1], use_cache=False).logits[0], tokens_L[1:]).backward()
    expected = {name: parameter.grad for name, parameter in witness.named_parameters()}
    names = family_of_config(config).tensor_names(decoder.spec, expected.keys())
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    for rule in names.rules:
        if rule.parameter.endswith("e_score_correction_bias"):
            assert gradients[rule.parameter] is None  # it only chooses
            continue
        for stored, gradient in rule.stored_parts(gradients[rule.parameter]):
            assert relative_difference(gradient, expected[stored]) <= GRADIENT_TOLERANCE, stored


def decoder_with_weights_of(witness, config):
    """Return our decoder with the weights of a witness, through the names that it has in memory."""
    decoder, stored = tiny_decoder(config, seed=1), witness.state_dict()
    parameters = dict(decoder.named_parameters())
    for rule in family_of_config(config).tensor_names(decoder.spec, stored.keys()).rules:
        parameters[rule.parameter].copy_(rule.transform.load(stored[rule.stored]))
    return decoder


@pytest.mark.parametrize("name", ["llama-llama3", "qwen-yarn", "nemotron", "nemotron-latent"])
def test_greedy_continuation_equals_the_witness(name):
    config, prompt_L = CONFIGS[name], random_tokens(9, seed=5)
    witness = witness_model(config)
    decoder = decoder_with_weights_of(witness, config)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": 97}  # 97 cannot occur
    expected = witness.generate(prompt_L[None], attention_mask=torch.ones(1, 9), **settings)[0]
    tokens_L = prompt_L
    for _ in range(16):
        tokens_L = torch.cat((tokens_L, our_logits(decoder, tokens_L)[-1:].argmax(dim=-1)))
    assert tokens_L.tolist() == expected.tolist()


# What must not be left out of the comparison.


@pytest.mark.parametrize("name", ["nemotron-mamba", "nemotron"])
def test_with_its_clamp_of_dt_left_alone_the_witness_differs(name):
    config, tokens_L = CONFIGS[name], random_tokens(LENGTH)
    witness = witness_model(config)
    decoder = decoder_with_weights_of(witness, config)
    assert relative_difference(our_logits(decoder, tokens_L), witness_logits(witness, tokens_L)) <= FLOAT32_TOLERANCE
    for block in witness.model.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (witness.config.time_step_min, float("inf"))
    assert relative_difference(our_logits(decoder, tokens_L), witness_logits(witness, tokens_L)) > 1e-3


@ALL
def test_every_parameter_has_an_effect(config):
    decoder, tokens_L = tiny_decoder(config), random_tokens(LENGTH)
    before_LV = our_logits(decoder, tokens_L)
    without_effect = []
    for name, parameter in decoder.named_parameters():
        kept = parameter.clone()
        parameter.copy_(kept.flip(0) + 0.5 * torch.randn_like(kept))
        if relative_difference(our_logits(decoder, tokens_L), before_LV) < 1e-4:
            without_effect.append(name)
        parameter.copy_(kept)
    assert without_effect == []


# Names.


def respelled(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of `backbone.` with each expert apart as `model.` with the experts stacked."""
    tensors = {name.replace("backbone.", "model."): tensor for name, tensor in stored.items()}
    stacked = {}
    for name in [name for name in tensors if ".experts.0." in name]:
        parts = [name.replace(".experts.0.", f".experts.{expert}.") for expert in range(8)]
        stacked[name.replace(".experts.0.", ".experts.").removesuffix(".weight")] = torch.stack(
            [tensors.pop(part) for part in parts]
        )
    return tensors | stacked


@pytest.mark.parametrize("name", ["nemotron", "nemotron-latent"])
def test_both_spellings_of_nemotron_names_load_to_the_same_decoder(name, tmp_path):
    config = CONFIGS[name]
    save_checkpoint(tmp_path / "apart", tiny_decoder(config), family=family_of_config(config), config=config)
    stored = load_file(tmp_path / "apart" / "model.safetensors")
    assert "backbone.layers.3.mixer.experts.7.up_proj.weight" in stored
    (tmp_path / "stacked").mkdir()
    (tmp_path / "stacked" / "config.json").write_bytes((tmp_path / "apart" / "config.json").read_bytes())
    tensors = respelled(stored)
    assert "model.layers.3.mixer.experts.up_proj" in tensors
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    apart, stacked = (load_ours(tmp_path / folder, torch.float32) for folder in ("apart", "stacked"))
    found = dict(stacked.named_parameters())
    assert [key for key, value in apart.named_parameters() if not torch.equal(value, found[key])] == []


@pytest.mark.parametrize("name", ["llama", "qwen", "nemotron-latent"])
def test_what_transformers_saves_has_the_names_that_we_save(name, tmp_path):
    witness_model(CONFIGS[name]).save_pretrained(tmp_path)
    decoder = tiny_decoder(CONFIGS[name])
    ours = {
        stored
        for rule in saved_names(decoder, CONFIGS[name]).rules
        for stored in rule.stored_names(decoder.get_parameter(rule.parameter))
    }
    assert load_file(tmp_path / "model.safetensors").keys() == ours


def test_transformers_leaves_out_the_mtp_module_that_we_save(tmp_path):
    decoder, tokens_L = tiny_decoder(MTP), random_tokens(LENGTH)
    save_checkpoint(tmp_path / "saved", decoder, family=family_of_config(MTP), config=MTP)
    expected_LV = witness_logits(load_witness(tmp_path / "saved"), tokens_L)
    assert relative_difference(our_logits(decoder, tokens_L), expected_LV) <= FLOAT32_TOLERANCE
