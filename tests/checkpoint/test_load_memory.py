"""How much memory loading takes, measured in a process of its own.

Files of zeros that take no place on the disk stand for large models.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.builders import entry, raw_safetensors
from freehold.checkpoint.rules import stored_tensors
from freehold.models.decoder import build_decoder
from freehold.models.families import family_of_config
from inputs import smollm2_gguf
from models.tiny import LLAMA, NEMOTRON, Config

MEASURE = """
import sys, torch
from pathlib import Path
from freehold.checkpoint.load import load_decoder, open_described
def status(field):
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
def load(path, dtype):
    source, described = open_described(Path(path))
    with source:
        return load_decoder(source, described, dtype=getattr(torch, dtype), device=torch.device("cpu"))
load(sys.argv[1], "float32")  # what is loaded once per process is no part of a model
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
decoder, report = load(sys.argv[2], sys.argv[3])
print(status("VmHWM") - before, report.copied_bytes, report.mapped_bytes)
"""


def measured(tmp_path: Path, model: Path, dtype: str) -> tuple[int, int, int]:
    """Return how much the memory of a process grew at most while it loaded, bytes copied, and bytes mapped."""
    warm = write_zeros(tmp_path / "warm", LLAMA)
    command = [sys.executable, "-c", MEASURE, str(warm), str(model), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, copied, mapped = map(int, done.stdout.split())
    return grown, copied, mapped


def write_zeros(folder: Path, config: Config) -> Path:
    """Write a checkpoint of zeros in bfloat16, as a sparse file."""
    family = family_of_config(config)
    decoder = build_decoder(family.read_config(config), dtype=torch.bfloat16)
    header, end = {}, 0
    for name, tensor in stored_tensors(decoder, family.tensor_names(decoder.spec, ())):
        begin, end = end, end + 2 * tensor.numel()
        header[name] = entry("BF16", tensor.shape, begin, end)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(raw_safetensors(text))
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return folder


WIDE = LLAMA | {"vocab_size": 60000, "hidden_size": 1024, "intermediate_size": 8192}
EXPERTS = NEMOTRON | {"hybrid_override_pattern": "E", "hidden_size": 512, "n_routed_experts": 128}
EXPERTS |= {"moe_intermediate_size": 1024, "vocab_size": 20000}


def test_a_quantized_model_takes_its_own_size_plus_a_tenth(tmp_path):
    grown, copied, mapped = measured(tmp_path, smollm2_gguf(), "float32")
    assert copied + mapped == 538_060_032  # 134,515,008 values
    assert grown <= 1.1 * copied


@pytest.mark.parametrize(("config", "dtype"), [(WIDE, "float32"), (EXPERTS, "bfloat16")], ids=["dtype", "experts"])
def test_a_model_that_is_converted_takes_its_own_size_plus_a_tenth(config, dtype, tmp_path):
    grown, copied, mapped = measured(tmp_path, write_zeros(tmp_path / "m", config), dtype)
    assert copied > 200e6
    assert copied > 5 * mapped
    assert grown <= 1.1 * copied


def test_a_mapped_model_takes_no_memory_before_it_is_used(tmp_path):
    grown, copied, mapped = measured(tmp_path, write_zeros(tmp_path / "m", WIDE), "bfloat16")
    assert copied == 0
    assert mapped > 300e6
    assert grown <= 0.1 * mapped
