"""`freehold inspect`: from headers alone, and what it says adds up."""

import json

import pytest
import torch

from checkpoint.builders import entry, raw_safetensors
from cli.commands import call
from cli.folders import change_config, write_folder
from freehold.checkpoint.rules import stored_tensors
from freehold.checkpoint.source import Source
from freehold.models.decoder import build_decoder
from freehold.models.families import family_of_config
from inputs import smollm2_gguf
from models.published import LLAMAS, NANO
from models.tiny import LATENT


def look(*arguments):
    ended = call("inspect", *arguments, "--json")
    assert ended.code == 0, ended
    return json.loads(ended.out)


def test_parts_add_up_to_what_a_real_file_stores():
    seen = look(smollm2_gguf())
    assert seen["family"] == "llama"
    assert seen["pattern"] == "*-" * 30
    assert seen["num_parameters"] == seen["num_active"] == 134_515_008
    assert sum(part["num_parameters"] for part in seen["parts"]) == seen["num_parameters"]
    stored = seen["stored_bytes_by_format"]
    assert set(stored) == {"Q4_1", "Q8_0", "F32"}
    assert sum(part["stored_bytes"] for part in seen["parts"]) == sum(stored.values()) < 98_362_432
    _, bf16, f32 = seen["plan"]
    assert (bf16["dtype"], f32["dtype"]) == ("bfloat16", "float32")
    assert bf16["kv_bytes_per_token"] * 2 == f32["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 4


def test_text_shows_every_part(tmp_path):
    folder = write_folder(tmp_path / "model", LATENT)
    change_config(folder, auto_map={"AutoModel": "modeling.Model"})
    ended = call("inspect", folder)
    assert ended.code == 0, ended
    for wanted in ("nemotron", "  M*-E\n", "routed experts", "mamba", "note: auto_map", "this machine's cpu has"):
        assert wanted in ended.out


def test_a_config_alone_is_enough_to_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NANO))
    seen = look(tmp_path / "config.json")
    assert seen["num_parameters"] == 31_577_940_288
    assert {part["stored_bytes"] for part in seen["parts"]} == {None}
    assert seen["notes"] == ["a config without weights: nothing was matched"]


def test_a_file_larger_than_any_memory_is_described_without_a_byte_of_its_tensors(tmp_path, monkeypatch):
    """Llama 3 70B in bfloat16: headers, and 141 GB that were never written."""
    config = LLAMAS["llama-3-70b"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = family_of_config(config)
    decoder = build_decoder(family.read_config(config), dtype=torch.bfloat16)
    offset, header = 0, {}
    for name, value in stored_tensors(decoder, family.tensor_names(decoder.spec, ())):
        header[name] = entry("BF16", value.shape, offset, offset + value.nbytes)
        offset += value.nbytes
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(raw_safetensors(header))
    with weights.open("r+b") as file:
        try:
            file.truncate(weights.stat().st_size + offset)
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
    monkeypatch.delattr(Source, "bytes_of")
    seen = look(tmp_path)
    assert seen["stored_bytes_by_format"] == {"BF16": 2 * 70_553_706_496}
