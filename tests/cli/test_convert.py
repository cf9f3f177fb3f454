"""`freehold convert`: a folder that is whole, or none; and what it says it did."""

import hashlib
import json
import signal
import subprocess
import time

import pytest
import safetensors.torch
import torch

from cli.commands import assert_refused, call, spawn
from cli.folders import BYTES, TEMPLATE, TINY_LLAMA, change_config, write_folder
from freehold.engine.machine import Memory
from inputs import smollm2_gguf
from models.tiny import NEMOTRON


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model")


def tensors_of(folder):
    return safetensors.torch.load((folder / "model.safetensors").read_bytes())


def test_a_conversion_without_change_keeps_every_bit(folder, tmp_path):
    ended = call("convert", folder, tmp_path / "copy")
    assert ended.code == 0, ended
    assert "21 tensors of F32: unchanged" in ended.out
    before, after = tensors_of(folder), tensors_of(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_dtype_rounds_each_value_once(folder, tmp_path):
    ended = call("convert", folder, tmp_path / "half", "--dtype", "bf16", "--json")
    told = json.loads(ended.out)
    assert told["changes"] == ["21 tensors of F32 to bfloat16: rounded once"]
    before, after = tensors_of(folder), tensors_of(tmp_path / "half")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    for name, digest in told["sha256"].items():
        assert hashlib.sha256((tmp_path / "half" / name).read_bytes()).hexdigest() == digest
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_plain_weights_stay_in_their_dtype_where_none_is_asked_for(folder, tmp_path):
    call("convert", folder, tmp_path / "half", "--dtype", "f16")
    ended = call("convert", tmp_path / "half", tmp_path / "again")
    assert "21 tensors of F16: unchanged" in ended.out
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "again").values()} == {torch.float16}


def test_what_stays_float32_is_not_counted_as_rounded(tmp_path):
    folder = write_folder(tmp_path / "model", NEMOTRON | BYTES)
    told = json.loads(call("convert", folder, tmp_path / "half", "--dtype", "bf16", "--json").out)
    kept = {name for name, tensor in tensors_of(tmp_path / "half").items() if tensor.dtype == torch.float32}
    rounded = tensors_of(folder).keys() - kept
    assert any(name.endswith("A_log") for name in kept)
    assert told["changes"] == [
        f"{len(rounded)} tensors of F32 to bfloat16: rounded once",
        f"{len(kept)} tensors of F32: unchanged",
    ]
    told = json.loads(call("convert", tmp_path / "half", tmp_path / "again", "--dtype", "f32", "--json").out)
    assert told["changes"] == [
        f"{len(rounded)} tensors of BF16 to float32: exact",
        f"{len(kept)} tensors of F32: unchanged",
    ]


def test_a_conversion_that_memory_cannot_hold_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("freehold.engine.machine.main_memory", lambda: Memory(total_bytes=2000, available_bytes=1000))
    assert call("convert", folder, tmp_path / "copy").code == 0  # used in place, copies nothing
    ended = call("convert", folder, tmp_path / "half", "--dtype", "bf16")
    assert_refused(ended, "BadInput")
    assert "1,000 are free on cpu" in ended.err
    assert not (tmp_path / "half").exists()


def test_what_was_left_out_is_named(tmp_path):
    folder = change_config(write_folder(tmp_path / "model", TINY_LLAMA), auto_map={"AutoModel": "modeling.Model"})
    ended = call("convert", folder, tmp_path / "copy")
    assert "auto_map names code of its own" in ended.out
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path, number):
    source = smollm2_gguf()
    with spawn("convert", source, tmp_path / "dest", "--dtype", "bf16", stderr=subprocess.PIPE) as process:
        while not list(tmp_path.iterdir()) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
    assert (process.returncode, err) == (128 + number, "")
    assert list(tmp_path.iterdir()) == []
