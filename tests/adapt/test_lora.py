"""Low-rank adapters on tiny decoders: what they change, what they leave, and the way back."""

import pytest
import torch

from adapt.adapters import HERE_AND_OFF, SETTINGS, adapt
from freehold.adapt.lora import LoraSettings, adapted, merge, projections, unpack, wrap
from freehold.checkpoint.save import save_checkpoint
from freehold.errors import BadInput, BadRequest
from freehold.evaluate.laws import relative_difference
from freehold.models.decoder import Decoder
from freehold.models.families import family_of_config
from freehold.models.layout import Layout
from freehold.ops.weight import Packed, dense
from models.forms import needs_kernels, running, same_bits
from models.packing import PACKED_LLAMA, PACKED_NEMOTRON, pack_decoder
from models.tiny import CONFIGS, LATENT, LLAMA, MTP, NEMOTRON, random_tokens, tiny_decoder

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
NAMES = ["llama", "llama-tied", "qwen", "nemotron", "nemotron-latent", "nemotron-router-groups"]
# Merged and unmerged sums differ in their order: float32's rounding, over at most four blocks.
MERGED_TOLERANCE = 2e-5
# Packed weights meet rows of int8, merged ones are bfloat16 and meet float rows (6.7e-2 at most).
PACKED_TOLERANCE = 0.1


@torch.inference_mode()
def logits_of(decoder: Decoder) -> torch.Tensor:
    tokens_T = random_tokens(27)
    return decoder.logits(decoder(tokens_T, Layout.packed([20, 7])))


@pytest.mark.parametrize("form", HERE_AND_OFF)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_has_learnt_nothing_changes_no_bit(name, dtype, form):
    decoder = tiny_decoder(CONFIGS[name], dtype=dtype)
    with running(form):
        before = logits_of(decoder)
        wrap(decoder, SETTINGS, seed=0)
        assert same_bits(logits_of(decoder), before)


@pytest.mark.parametrize("form", HERE_AND_OFF)
@pytest.mark.parametrize("name", [*NAMES, "llama-narrow-heads"])
def test_merged_equals_unmerged(name, form):
    decoder = tiny_decoder(CONFIGS[name])
    with running(form):
        before = logits_of(decoder)
        unmerged = logits_of(adapt(decoder))
        merge(decoder)
        found = logits_of(decoder)
    assert not decoder.has_adapter
    assert relative_difference(unmerged, before) > 100 * MERGED_TOLERANCE
    assert relative_difference(found, unmerged) <= MERGED_TOLERANCE


def test_merging_says_what_rounding_took():
    exact, rounded = adapt(tiny_decoder(LLAMA)), adapt(tiny_decoder(LLAMA, dtype=torch.bfloat16))
    assert merge(exact) < 1e-5
    assert 1e-3 < merge(rounded) < 1


def test_every_projection_of_every_block_has_an_adapter_and_nothing_else():
    decoder = tiny_decoder(MTP)
    wrap(decoder, SETTINGS, seed=0)
    names = {name for name, _ in adapted(decoder)}
    assert names == set(projections(decoder))
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}_lora_{part}" for name in names for part in "AB"}
    assert {name.rpartition(".mixer.")[2].removesuffix(".weight") for name in names} == set(
        """q_proj k_proj v_proj o_proj in_proj out_proj up_proj down_proj experts.up_proj experts.down_proj
        shared_experts.up_proj shared_experts.down_proj fc1_latent_proj fc2_latent_proj""".split()
    )


@pytest.mark.parametrize(
    ("target", "count"), [("up_proj", 3), ("experts.up_proj", 1), ("shared_experts.up_proj", 1), ("q_proj", 1)]
)
def test_targets_are_ends_of_names(target, count):
    decoder = tiny_decoder(NEMOTRON)
    wrap(decoder, LoraSettings(rank=2, alpha=2.0, targets=(target,)), seed=0)
    assert len(list(adapted(decoder))) == count


@pytest.mark.parametrize("target", ["gate_proj", "proj", ""])
def test_a_target_that_the_model_lacks_is_refused(target):
    with pytest.raises(BadRequest, match=f"no projection is '{target}'"):
        wrap(tiny_decoder(NEMOTRON), LoraSettings(targets=("q_proj", target)), seed=0)


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("lm_head", "the output head"),
        ("embed_tokens", "embeddings"),
        ("mixer.gate", "routers"),
        ("mtp", "multi-token prediction"),
    ],
)
def test_a_part_that_has_no_adapter_here_is_refused_by_its_name(target, what):
    with pytest.raises(BadRequest, match=f"is of {what}, where no adapter can be"):
        wrap(tiny_decoder(MTP), LoraSettings(targets=("q_proj", target)), seed=0)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"targets": ()}])
def test_settings_that_make_no_adapter_are_refused(wrong):
    with pytest.raises(BadRequest):
        LoraSettings(**wrong)


def test_a_second_adapter_is_refused():
    decoder = adapt(tiny_decoder(LLAMA))
    with pytest.raises(BadRequest, match="already"):
        wrap(decoder, SETTINGS, seed=0)


def test_the_seed_alone_decides_how_an_adapter_begins():
    first, second, third = (tiny_decoder(LATENT) for _ in range(3))
    for decoder, seed in ((first, 3), (second, 3), (third, 4)):
        wrap(decoder, SETTINGS, seed=seed)
    pairs = [(a.a, b.a, c.a) for (_, a), (_, b), (_, c) in zip(*map(adapted, (first, second, third)), strict=True)]
    assert all(same_bits(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    widest = max(float(a.detach().abs().max()) * a.shape[-1] ** 0.5 for a, _, _ in pairs)
    assert 0.9 < widest < 1.0001


def test_a_model_with_an_adapter_is_not_saved_as_one_without(tmp_path):
    decoder = adapt(tiny_decoder(LLAMA))
    with pytest.raises(BadInput, match="adapter"):
        save_checkpoint(tmp_path / "model", decoder, family=family_of_config(LLAMA), config=LLAMA)
    assert not (tmp_path / "model").exists()


@needs_kernels
@pytest.mark.parametrize(
    ("config", "format"),
    [(PACKED_LLAMA, "Q8_0"), (PACKED_LLAMA, "BF16"), (PACKED_NEMOTRON, "Q4_0")],
    ids=["llama-Q8_0", "llama-BF16", "nemotron-Q4_0"],
)
def test_a_packed_base_stays_packed_under_its_adapter_and_is_a_tensor_when_merged(config, format):
    decoder = pack_decoder(tiny_decoder(config), format)
    before, packed = logits_of(decoder), decoder.packed_weights()
    wrap(decoder, SETTINGS, seed=0)
    assert same_bits(logits_of(decoder), before)
    merge(decoder)
    for name, weight in packed.items():
        assert torch.equal(dense(decoder.weights()[name], torch.float32), weight.dense())
    assert {name for name, weight in decoder.weights().items() if isinstance(weight, Packed)} == {
        name for name in packed if not name.startswith("blocks.")
    }


@needs_kernels
@pytest.mark.parametrize(("config", "format"), [(PACKED_LLAMA, "Q8_0"), (PACKED_NEMOTRON, "Q8_0")])
def test_an_adapter_on_a_packed_base_is_merged_within_what_rows_of_eight_bits_are_off(config, format):
    decoder = adapt(pack_decoder(tiny_decoder(config), format))
    unmerged = logits_of(decoder)
    merge(decoder)
    unpack(decoder, torch.bfloat16)
    assert decoder.packed_weights() == {}
    assert decoder.dtype is torch.bfloat16
    unpacked = {p.dtype for name, p in decoder.named_parameters() if name.endswith(("A_log", "gate.weight"))}
    assert unpacked <= {torch.float32}
    assert relative_difference(logits_of(decoder), unmerged) <= PACKED_TOLERANCE
