"""Adapters as folders in PEFT's format, with PEFT itself as witness."""

import json

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapt.adapters import SETTINGS, adapt
from freehold.adapt.lora import LoraSettings, adapted, projections
from freehold.adapt.peft import BASE_KEY
from freehold.engine.adapter import adapter_bytes, load_adapter, save_adapter
from freehold.errors import BadFile, CheckpointMismatch, NotFound, UnsupportedModel
from freehold.models.decoder import Decoder
from freehold.models.families import family_of_config
from inputs import smollm2_gguf
from models.forms import same_bits
from models.tiny import LATENT, LLAMA, NEMOTRON, QWEN, random_tokens, tiny_decoder
from models.witness import load_ours, our_logits, save_witness, witness_logits, witness_model

# PEFT's own: what it calls in transformers. Of our files it warns of nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

BASE = "b" * 64
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Largest difference of any logit: sums in another order, over two layers, and over the thirty of SmolLM2.
TOLERANCE = 1e-4
REAL_TOLERANCE = 2e-3


def save(folder, decoder: Decoder, config):
    save_adapter(folder, decoder, family=family_of_config(config), base_sha256=BASE)
    return folder


def load(folder, config, *, base: str = BASE) -> Decoder:
    decoder = tiny_decoder(config)
    load_adapter(folder, decoder, family=family_of_config(config), base_sha256=lambda: base)
    return decoder


def change(folder, **changes: object):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))
    return folder


def change_tensors(folder, **changes: Tensor | None):
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes()) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(kept, {"freehold_base_sha256": BASE}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "adapter", adapt(tiny_decoder(LLAMA)), LLAMA)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LLAMA, SETTINGS),
        (QWEN, LoraSettings(rank=3, alpha=7.5, targets=("q_proj", "down_proj"))),
        (NEMOTRON, SETTINGS),
        (LATENT, LoraSettings(rank=2, dtype="bfloat16")),
    ],
    ids=["llama", "qwen-some", "nemotron", "nemotron-latent-bfloat16"],
)
def test_an_adapter_that_was_saved_and_loaded_is_saved_with_the_same_bytes(config, settings, tmp_path):
    decoder = adapt(tiny_decoder(config), settings)
    first = save(tmp_path / "first", decoder, config)
    loaded = load(first, config)
    second = save(tmp_path / "second", loaded, config)
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    tokens_T = random_tokens(30)
    assert same_bits(our_logits(loaded, tokens_T), our_logits(decoder, tokens_T))
    assert adapter_bytes(first) == sum(w.a.nbytes + w.b.nbytes for _, w in adapted(loaded))


def test_each_expert_of_a_stack_is_a_module_by_its_published_name(tmp_path):
    saved = save(tmp_path / "adapter", adapt(tiny_decoder(NEMOTRON)), NEMOTRON)
    names = set(safetensors.torch.load((saved / WEIGHTS).read_bytes()))
    experts = {f"base_model.model.model.layers.3.mixer.experts.{e}.up_proj.lora_A.weight" for e in range(8)}
    assert experts <= names
    # Files made from the published spelling of the same model say `backbone.`.
    tensors = safetensors.torch.load((saved / WEIGHTS).read_bytes())
    published = {name.replace("model.model.model.", "model.model.backbone."): t for name, t in tensors.items()}
    (saved / WEIGHTS).write_bytes(safetensors.torch.save(published))
    loaded = load(saved, NEMOTRON)
    assert {name for name, _ in adapted(loaded)} == set(projections(loaded))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"extra.lora_A.weight": torch.zeros(4, 32)}, CheckpointMismatch, "no use"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, UnsupportedModel, "the output head"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 97)},
            UnsupportedModel,
            "changes embeddings",
        ),
        ({"base_model.model.lm_head.weight": torch.zeros(97, 32)}, UnsupportedModel, "changes the output head"),
        (
            {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)},
            CheckpointMismatch,
            "use",
        ),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": None}, CheckpointMismatch, "lacks"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 31)},
            CheckpointMismatch,
            "A and B",
        ),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(5, 32)},
            CheckpointMismatch,
            "A and B",
        ),
    ],
    ids=[
        "another-name",
        "output-head",
        "embeddings",
        "whole-output-head",
        "layer-too-many",
        "a-without-b",
        "wrong-width",
        "wrong-rank",
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(folder, changes, error, says):
    change_tensors(folder, **changes)
    with pytest.raises(error, match=says):
        load(folder, LLAMA)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    saved = save(tmp_path / "adapter", adapt(tiny_decoder(NEMOTRON)), NEMOTRON)
    with pytest.raises(CheckpointMismatch):
        load(saved, LLAMA)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"peft_type": "LOHA"}, UnsupportedModel, "peft_type"),
        ({"use_dora": True}, UnsupportedModel, "use_dora"),
        ({"bias": "all"}, UnsupportedModel, "bias"),
        ({"init_lora_weights": "pissa"}, UnsupportedModel, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 2}}, UnsupportedModel, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, "modules_to_save"),
        ({"something_new": 1}, UnsupportedModel, "something_new"),
        ({"r": 0}, BadFile, "`r`"),
        ({"r": ...}, BadFile, "`r`"),
        ({"lora_alpha": "much"}, BadFile, "lora_alpha"),
        ({"target_modules": ["q_proj", "in_proj"]}, CheckpointMismatch, "in_proj"),
        ({"target_modules": 3}, BadFile, "target_modules"),
    ],
)
def test_what_an_adapter_says_and_is_not_done_is_refused(folder, changes, error, says):
    change(folder, **changes)
    with pytest.raises(error, match=says):
        load(folder, LLAMA)


def test_another_base_is_refused(folder):
    with pytest.raises(CheckpointMismatch, match="made for weights") as refused:
        load(folder, LLAMA, base="c" * 64)
    assert refused.value.hint == "load it with the model that it was made for"


def test_a_base_that_is_named_in_the_config_as_in_our_first_adapters_is_held_to_too(folder):
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))  # without a header
    change(folder, freehold_base_sha256=BASE)
    load(folder, LLAMA)
    with pytest.raises(CheckpointMismatch, match="made for weights"):
        load(folder, LLAMA, base="c" * 64)


def test_a_base_that_is_not_named_is_taken_with_a_note(tmp_path):
    decoder, family = adapt(tiny_decoder(LLAMA)), family_of_config(LLAMA)
    save_adapter(tmp_path / "adapter", decoder, family=family, base_sha256=None)
    asked = []
    report = load_adapter(
        tmp_path / "adapter", tiny_decoder(LLAMA), family=family, base_sha256=lambda: asked.append(1) or BASE
    )
    assert len(report.notes) == 1
    assert asked == []


def test_the_digest_of_an_adapter_changes_with_either_file(folder):
    def digest() -> str:
        return load_adapter(
            folder, tiny_decoder(LLAMA), family=family_of_config(LLAMA), base_sha256=lambda: BASE
        ).sha256

    first = digest()
    assert digest() == first
    second = digest() if change(folder, lora_alpha=9) else ""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    third = digest() if change_tensors(folder, **{name: torch.ones(4, 32)}) else ""
    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, 32, dtype=torch.int64),
        torch.ones(4, 32, dtype=torch.bool),
        torch.ones(4, 32, dtype=torch.float64),
        torch.tensor(1.0),
        torch.ones(4, 32, 1),
        torch.ones(0, 32),
    ],
    ids=["integers", "booleans", "float64", "scalar", "cube", "empty"],
)
def test_what_is_no_matrix_of_floats_is_refused(tensor, folder):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(folder, **{name: tensor})
    with pytest.raises(CheckpointMismatch, match=rf"`{name}` is .* wanted is a matrix of F32, F16, BF16"):
        load(folder, LLAMA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_value_that_is_no_finite_number_is_refused_by_its_tensor_and_file(part, wrong, dtype, folder):
    name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
    matrix = torch.ones({"A": (4, 32), "B": (64, 4)}[part], dtype=dtype)
    change_tensors(folder, **{name: matrix})
    load(folder, LLAMA)  # the ones are taken
    matrix[-1, -1] = wrong
    change_tensors(folder, **{name: matrix})
    says = rf"^BadFile: \S*/adapter/{WEIGHTS}: `{name}` has 1 of (128|256) values that are NaN or infinite\nhint: "
    with pytest.raises(BadFile, match=says):
        load(folder, LLAMA)


def test_a_base_that_is_named_by_something_else_is_another_one(tmp_path):
    save_adapter(tmp_path / "adapter", adapt(tiny_decoder(LLAMA)), family=family_of_config(LLAMA), base_sha256=None)
    change(tmp_path / "adapter", **{BASE_KEY: [1]})
    with pytest.raises(CheckpointMismatch, match="was made for weights of SHA-256"):
        load(tmp_path / "adapter", LLAMA)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_folder_without_either_file_is_no_adapter(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(NotFound, match=missing):
        load(folder, LLAMA)


def test_a_file_that_is_cut_short_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(BadFile):
        load(folder, LLAMA)


# The witness: PEFT on transformers.


def peft_adapter(model, folder, *, size: float = 0.05, **changes: object):
    """Return the model with a random adapter of PEFT's, which is also saved."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    adapted_model = get_peft_model(model, LoraConfig(**settings)).eval()
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * size)
    adapted_model.save_pretrained(folder)
    return adapted_model


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 16, "r": 2}]
)
@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_logits_with_an_adapter_of_peft_are_pefts(config, changes, tmp_path):
    witness = witness_model(config)
    save_witness(witness, tmp_path / "base")
    tokens_T = random_tokens(40)
    plain = witness_logits(witness, tokens_T)
    expected = witness_logits(peft_adapter(witness, tmp_path / "adapter", **changes), tokens_T)
    decoder = load_ours(tmp_path / "base", torch.float32)
    report = load_adapter(tmp_path / "adapter", decoder, family=family_of_config(config), base_sha256=lambda: BASE)
    assert "does not say" in report.notes[0]
    assert (expected - plain).abs().max() > 100 * TOLERANCE
    assert (our_logits(decoder, tokens_T) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_peft_loads_what_we_saved_and_gives_our_logits(config, tmp_path):
    witness = witness_model(config)
    save_witness(witness, tmp_path / "base")
    decoder = adapt(load_ours(tmp_path / "base", torch.float32))
    saved = save(tmp_path / "adapter", decoder, config)
    tokens_T = random_tokens(40)
    found = witness_logits(PeftModel.from_pretrained(witness, saved).eval(), tokens_T)
    assert (found - our_logits(decoder, tokens_T)).abs().max() <= TOLERANCE


def test_an_adapter_on_real_weights_gives_the_logits_of_peft(tmp_path):
    path = smollm2_gguf()
    witness = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens_T = torch.tensor([504, 3575, 282, 4649, 314])
    expected = witness_logits(peft_adapter(witness, tmp_path / "adapter", size=0.01), tokens_T)
    decoder = load_ours(path, torch.float32)
    load_adapter(tmp_path / "adapter", decoder, family=family_of_config(LLAMA), base_sha256=lambda: BASE)
    assert (our_logits(decoder, tokens_T) - expected).abs().max() <= REAL_TOLERANCE
