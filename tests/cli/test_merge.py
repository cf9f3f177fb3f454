"""Adapters on the command line: `freehold merge`, and `--adapter` of run, chat, check and serve."""

import json
import re

import pytest
import torch
from safetensors.torch import load, save

import freehold
from adapt.adapters import SETTINGS, adapt, fill
from cli.commands import assert_refused, call
from cli.folders import write_folder
from freehold.adapt.lora import wrap
from freehold.engine.adapter import save_adapter
from freehold.errors import NotFound
from freehold.evaluate.laws import relative_difference
from freehold.models.families import family_of_config
from freehold.trust.identity import digest_files
from inputs import smollm2_gguf
from models.tiny import LLAMA, random_tokens

ASKED = ("--raw", "--max-tokens", "12", "--json")
QUOTED = "The quick brown fox jumps over the lazy dog by the river. "
MERGED_TOLERANCE = 2e-5  # sums in another order


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model")


@pytest.fixture
def adapter(folder, tmp_path):
    decoder = adapt(freehold.load(folder).decoder)
    digest = digest_files([folder / "model.safetensors"])
    save_adapter(tmp_path / "adapter", decoder, family=family_of_config(LLAMA), base_sha256=digest)
    return tmp_path / "adapter"


def told(*arguments: object) -> dict:
    ended = call(*arguments)
    assert ended.code == 0, ended
    return json.loads(ended.out)


def test_an_answer_is_the_adapted_models_and_names_the_adapter(folder, adapter):
    plain = told("run", folder, "Hello", *ASKED)
    adapted = told("run", folder, "Hello", "--adapter", adapter, *ASKED)
    assert adapted["text"] != plain["text"]
    assert plain["identity"]["adapter"] is None
    digest = digest_files([adapter / "adapter_config.json", adapter / "adapter_model.safetensors"])
    assert adapted["identity"] == plain["identity"] | {"adapter": digest}


def test_a_conversation_is_held_with_the_adapted_model(folder, adapter):
    answers = [
        call("chat", folder, "--max-tokens", "12", *more, stdin="Hello\n").out for more in ((), ("--adapter", adapter))
    ]
    assert answers[0] != answers[1]


def test_the_laws_are_checked_with_the_adapter(folder, adapter):
    findings = told("check", folder, "--adapter", adapter, "--json")
    assert all(finding["holds"] for finding in findings)


def test_a_merged_model_answers_as_the_adapted_one_and_needs_no_adapter(folder, adapter, tmp_path):
    ended = call("merge", folder, adapter, "--out", tmp_path / "merged")
    assert ended.code == 0, ended
    assert "float32" in ended.out
    assert "rounding took 0.0%" in ended.out
    tokens = random_tokens(40).tolist()
    expected = freehold.load(folder, adapter=adapter).logits(tokens)
    found = freehold.load(tmp_path / "merged").logits(tokens)
    assert relative_difference(found, expected) <= MERGED_TOLERANCE
    told("run", tmp_path / "merged", "Hello", *ASKED)  # its text side is there


def test_a_dtype_and_a_text_are_heeded_and_told(folder, adapter, tmp_path):
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    report = told(
        "merge", folder, adapter, "--out", tmp_path / "merged", "--dtype", "bf16", "--text", tmp_path / "text", "--json"
    )
    assert report["dtype"] == "bfloat16"
    assert 1e-3 < report["rounding"] < 1
    losses = report["nats_per_token"]
    assert losses["merged"] == pytest.approx(losses["unmerged"], rel=0.01)
    assert freehold.load(tmp_path / "merged").decoder.dtype is torch.bfloat16


def test_merging_is_refused_before_anything_is_loaded(folder, adapter, tmp_path):
    assert_refused(call("merge", folder, adapter, "--out", folder), "BadInput")
    assert_refused(call("merge", folder, tmp_path / "nothing", "--out", tmp_path / "merged"), "NotFound")
    assert_refused(call("merge", folder, adapter, "--out", tmp_path / "m", "--text", tmp_path / "none"), "BadInput")
    (tmp_path / "short").write_text("Too short.")
    assert_refused(call("merge", folder, adapter, "--out", tmp_path / "m", "--text", tmp_path / "short"), "BadInput")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("command", ["run", "merge"])
def test_an_adapter_of_another_base_is_refused(command, folder, adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(save(load(weights.read_bytes()), {"freehold_base_sha256": "0" * 64}))
    arguments = {"run": (folder, "Hello", "--adapter", adapter), "merge": (folder, adapter, "--out", tmp_path / "m")}
    ended = call(command, *arguments[command])
    assert_refused(ended, "CheckpointMismatch")
    assert "hint: load it with the model that it was made for" in ended.err


def test_a_folder_without_an_adapter_is_refused_at_once(folder, tmp_path):
    assert_refused(call("run", folder, "Hello", "--adapter", tmp_path), "NotFound")
    with pytest.raises(NotFound):
        freehold.load(folder, adapter=tmp_path)


def test_a_merge_with_four_bits_says_that_its_weights_are_plain_and_the_loss_before_and_after(tmp_path):
    path = smollm2_gguf()
    model = freehold.load(path)
    wrap(model.decoder, SETTINGS, seed=0)
    decoder = fill(model.decoder, size=0.005)
    save_adapter(tmp_path / "adapter", decoder, family=model.described.family, base_sha256=model.identity.weights)
    tokens = random_tokens(24).tolist()
    unmerged = model.logits(tokens)
    (tmp_path / "text").write_text(QUOTED * 60)
    ended = call("merge", path, tmp_path / "adapter", "--out", tmp_path / "merged", "--text", tmp_path / "text")
    assert ended.code == 0, ended
    assert "is quantized: the merged weights are bfloat16" in ended.err
    before, after = map(float, re.findall(r"([\d.]+) nats per token unmerged, ([\d.]+) merged", ended.out)[0])
    assert after == pytest.approx(before, abs=0.1)
    merged = freehold.load(tmp_path / "merged")
    assert merged.decoder.dtype is torch.bfloat16
    assert relative_difference(merged.logits(tokens), unmerged) < 0.1  # bfloat16 and rows of eight bits, in 60 blocks
