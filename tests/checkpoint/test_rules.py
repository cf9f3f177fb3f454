"""The match of stored tensors and parameters, and the rules read both ways."""

from dataclasses import replace

import pytest
import torch

from freehold.checkpoint.rules import MOST_MISSING, Matches, match_tensors, stored_tensors
from freehold.checkpoint.stored import StoredTensor
from freehold.errors import CheckpointMismatch, UnsupportedModel
from freehold.models.decoder import build_decoder
from freehold.models.families import FAMILIES, Family, family_of_config
from freehold.models.names import interleaved_heads, reshaped
from models.tiny import CONFIGS, LLAMA, MTP, NEMOTRON, Config, tiny_decoder, tiny_spec

ALL = pytest.mark.parametrize("config", [*CONFIGS.values(), MTP], ids=[*CONFIGS, "nemotron-mtp"])


def headers_of(config: Config, *, dtype: str = "F32") -> dict[str, StoredTensor]:
    """Return what the header of a checkpoint of this config says."""
    decoder = build_decoder(tiny_spec(config), dtype=torch.float32)
    names = family_of_config(config).tensor_names(decoder.spec, ())
    return {
        name: StoredTensor(name=name, format=dtype, shape=tuple(t.shape), file="m", offset=0, num_bytes=t.nbytes)
        for name, t in stored_tensors(decoder, names)
    }


def matched(config: Config, stored: dict[str, StoredTensor]) -> Matches:
    decoder = build_decoder(tiny_spec(config), dtype=torch.float32)
    return match_tensors(decoder, family_of_config(config).tensor_names(decoder.spec, stored), stored)


@ALL
def test_each_stored_tensor_has_one_use_and_each_parameter_one_source(config):
    stored = headers_of(config)
    matches = matched(config, stored).matches
    used = [tensor.name for match in matches for tensor in match.stored]
    assert sorted(used) == sorted(stored)
    parameters = [name for name, _ in build_decoder(tiny_spec(config), dtype=torch.float32).named_parameters()]
    assert sorted(match.name for match in matches) == sorted(parameters)


@ALL
def test_leaving_out_any_one_tensor_or_adding_one_is_found(config):
    stored = headers_of(config)
    for name, tensor in stored.items():
        with pytest.raises(CheckpointMismatch, match=f"1 tensors are missing: `{name}`"):
            matched(config, {n: t for n, t in stored.items() if n != name})
        with pytest.raises(CheckpointMismatch, match=f"1 stored tensors have no use: `{name}.extra`"):
            matched(config, stored | {f"{name}.extra": tensor})


@ALL
def test_any_other_shape_of_any_tensor_is_found(config):
    stored = headers_of(config)
    for name, tensor in stored.items():
        for shape in (tensor.shape[:-1], (*tensor.shape, 1), (tensor.shape[0] + 1, *tensor.shape[1:])):
            with pytest.raises(CheckpointMismatch, match=f"`{name}` in m has shape"):
                matched(config, stored | {name: replace(tensor, shape=shape)})


def test_a_transposed_matrix_of_as_many_elements_is_found():
    stored = headers_of(LLAMA)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointMismatch, match=r"has shape \[48, 32\], the config makes it \[32, 48\]"):
        matched(LLAMA, stored | {name: replace(stored[name], shape=stored[name].shape[::-1])})


def test_long_lists_are_cut():
    stored = headers_of(LLAMA)
    renamed = {f"module.{name}": tensor for name, tensor in stored.items()}
    with pytest.raises(CheckpointMismatch) as caught:
        matched(LLAMA, renamed)
    assert caught.value.message.count(f"and {len(stored) - 6} more") == 2
    assert len(caught.value.message) < 800


def test_more_experts_than_any_file_lacks_are_refused_without_naming_them():
    config = NEMOTRON | {"n_routed_experts": MOST_MISSING * 2}
    with pytest.raises(CheckpointMismatch, match="the config has 2000 experts, the file 41 tensors"):
        matched(config, headers_of(NEMOTRON))


def test_a_format_that_is_no_weight_is_refused():
    with pytest.raises(UnsupportedModel, match="is stored as F8_E4M3, no weight can be"):
        matched(LLAMA, headers_of(LLAMA, dtype="F8_E4M3"))


def test_a_head_in_an_untied_model_is_no_repeated_one():
    assert matched(LLAMA, headers_of(LLAMA)).repeated_head is None
    tied = CONFIGS["llama-tied"]
    stored = headers_of(tied)
    head = {"lm_head.weight": replace(stored["model.embed_tokens.weight"], name="lm_head.weight")}
    assert matched(tied, stored | head).repeated_head == "lm_head.weight"


NEMOTRON_SPELLINGS = {
    "published": lambda name: name,
    "of transformers": lambda name: name.replace("backbone.", "model."),
}


@pytest.mark.parametrize("spelling", NEMOTRON_SPELLINGS.values(), ids=NEMOTRON_SPELLINGS)
def test_both_prefixes_of_nemotron_match(spelling):
    stored = {spelling(name): replace(t, name=spelling(name)) for name, t in headers_of(NEMOTRON).items()}
    assert len(matched(NEMOTRON, stored).matches) == sum(1 for _ in tiny_decoder(NEMOTRON).parameters())


def test_a_mix_of_both_prefixes_does_not_match():
    stored = headers_of(NEMOTRON)
    mixed = {name.replace("backbone.layers.0", "model.layers.0"): tensor for name, tensor in stored.items()}
    with pytest.raises(CheckpointMismatch):
        matched(NEMOTRON, mixed)


# Rules and transforms on their own.


def families_with_gguf() -> list[tuple[Family, Config]]:
    by_type = {family.model_type: family for family in FAMILIES}
    configs = [CONFIGS[n] for n in ("llama", "qwen", "nemotron-dense")]
    return [(by_type[config["model_type"]], config) for config in configs]


@pytest.mark.parametrize(("family", "config"), families_with_gguf(), ids=["llama", "qwen", "nemotron"])
@pytest.mark.parametrize("side", ["tensor_names", "gguf_names"])
def test_every_transform_undoes_itself(side, family, config):
    decoder = tiny_decoder(config)
    parameters = dict(decoder.named_parameters())
    for rule in getattr(family, side)(decoder.spec, ()).rules:
        for _, stored in rule.stored_parts(parameters[rule.parameter]):
            back = rule.transform.load(stored)
            torch.testing.assert_close(back, parameters[rule.parameter], rtol=1e-6, atol=0)
            torch.testing.assert_close(rule.transform.save(back), stored, rtol=1e-6, atol=0)


def test_interleaving_puts_the_two_halves_of_each_head_in_turn():
    rows = torch.arange(8)[:, None]
    # Two heads of four rows: first half 0 1, second half 2 3.
    assert interleaved_heads(2).save(rows).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved_heads(2).load(rows).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    six = torch.arange(6)
    assert interleaved_heads(1).save(six).tolist() == [0, 3, 1, 4, 2, 5]
    assert interleaved_heads(1).load(six).tolist() == [0, 2, 4, 1, 3, 5]


def test_reshaping_keeps_the_order_of_elements():
    transform = reshaped(ours=(6,), stored=(2, 3))
    stored = torch.arange(6).view(2, 3)
    assert transform.load(stored).tolist() == list(range(6))
    assert torch.equal(transform.save(transform.load(stored)), stored)


def test_stored_tensors_are_views_where_nothing_is_computed():
    decoder = tiny_decoder(NEMOTRON)
    storages = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    names = family_of_config(NEMOTRON).tensor_names(decoder.spec, ())
    assert all(t.untyped_storage().data_ptr() in storages for _, t in stored_tensors(decoder, names))
