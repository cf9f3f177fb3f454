import json
import os
import struct
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from checkpoint.builders import (
    UINT32,
    entry,
    key,
    raw_gguf,
    raw_safetensors,
    safetensors_bytes,
    write_gguf,
    write_shards,
)
from freehold.checkpoint.source import open_source
from freehold.errors import BadFile, BadInput, NotFound, UnsupportedModel
from inputs import qwen_coder_gguf, smollm2_gguf

A, B = torch.arange(3, dtype=torch.float32), torch.arange(4, dtype=torch.float32)


def resident_file_bytes() -> int:
    """Return how much memory of this process is pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssFile:")[1].split()[0])


def test_bytes_are_those_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes())
    with open_source(path) as source:
        assert (source.kind, source.files, source.folder, source.metadata) == ("safetensors", (path,), tmp_path, {})
        for name, want in safetensors.torch.load_file(path).items():
            assert torch.equal(source.bytes_of(name).view(want.dtype).view(want.shape), want)


def test_views_outlive_the_source_and_never_write_to_the_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    before = path.read_bytes()
    source = open_source(path)
    view = source.bytes_of("output_norm.weight")
    source.close()
    del source
    assert view.view(torch.float32).tolist() == [0.0, 1.0, 2.0]
    view.zero_()
    assert path.read_bytes() == before


def test_bytes_at_odd_offsets_can_be_viewed_as_wider_types(tmp_path):
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors(header, b"\0" + struct.pack("<2f", 1.5, -2.0)))
    with open_source(path) as source:
        assert source.bytes_of("b").view(torch.float32).tolist() == [1.5, -2.0]


def test_an_empty_tensor_has_no_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors({"a": entry("F32", [0, 3], 0, 0)}))
    with open_source(path) as source:
        assert source.bytes_of("a").shape == (0,)
        source.release("a")


def test_released_pages_leave_memory_and_come_back(tmp_path):
    num_bytes = 8 << 20
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.full((num_bytes,), 7, dtype=torch.uint8)}, path)
    with open_source(path) as source:
        start = resident_file_bytes()
        assert int(source.bytes_of("a").sum()) == 7 * num_bytes
        assert resident_file_bytes() - start > num_bytes // 2
        source.release("a")
        assert resident_file_bytes() - start < num_bytes // 2  # code is mapped too, as it is first used
        assert int(source.bytes_of("a")[-1]) == 7


def test_shards_are_one_source(tmp_path):
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    write_shards(tmp_path, {names["a"]: {"a": A}, names["b"]: {"b": B}}, names)
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h", "time_step_limit": [0.0, Infinity]}')
    with open_source(tmp_path) as source:
        assert [file.name for file in source.files] == ["model-1.safetensors", "model-2.safetensors"]
        assert source.metadata["time_step_limit"] == [0.0, float("inf")]
        assert source.tensors["b"].file == "model-2.safetensors"
        assert torch.equal(source.bytes_of("b").view(torch.float32), B)


def test_a_missing_shard_is_named(tmp_path):
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    write_shards(tmp_path, {"model-1.safetensors": {"a": A}}, weight_map)
    with pytest.raises(NotFound, match=r"names 2 shards, 1 of them missing, first model-2\.safetensors"):
        open_source(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards = {"model-1.safetensors": {"a": A}, "model-2.safetensors": {"a": A, "b": B}}
    write_shards(tmp_path, shards, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(BadFile, match=r"'a', but .* puts it in model-1"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "model.pkl", "model.ckpt"])
def test_pickle_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UnsupportedModel, match=f"{name} is a pickle file") as caught:
            open_source(path)
        assert "safetensors" in str(caught.value.hint)


def test_pickle_files_beside_safetensors_do_not_matter(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes())
    with open_source(tmp_path) as source:
        assert len(source.tensors) == 3


def test_a_folder_with_two_models_wants_a_choice(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(BadInput, match=r"holds 2 models: a\.gguf, b\.gguf"):
        open_source(tmp_path)
    with open_source(tmp_path / "b.gguf") as source:
        assert source.kind == "gguf"


def test_what_is_not_there_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")  # opening it would wait for a writer for ever
    (tmp_path / "model.safetensors").mkdir()
    for path in ("absent.gguf", "absent", "m.gguf"):
        with pytest.raises(NotFound):
            open_source(tmp_path / path)
    with pytest.raises(NotFound, match="holds none of"):
        open_source(tmp_path / "model.safetensors")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"model\.onnx is neither"):
        open_source(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadFile, match=f"{name}: the file is empty"):
        open_source(tmp_path)


def test_a_bad_config_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes())
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(BadFile, match=r"config\.json: .* 'a' occurs twice"):
        open_source(tmp_path)


def test_an_index_that_leaves_the_folder_is_refused(tmp_path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFile, match=r"wanted is a \.safetensors file beside it"):
        open_source(tmp_path)


def test_one_part_of_a_split_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(raw_gguf([key("split.count", UINT32, struct.pack("<I", 3))]))
    with pytest.raises(UnsupportedModel, match="one part of a GGUF model in several files"):
        open_source(tmp_path)


def test_smollm2_has_the_tensors_that_it_should():
    with open_source(smollm2_gguf()) as source:
        formats = Counter(tensor.format for tensor in source.tensors.values())
        assert formats == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
        assert source.tensors["token_embd.weight"].shape == (49152, 576)
        assert len(source.metadata["tokenizer.ggml.merges"]) == 48900


def test_qwen_coder_has_the_tensors_that_it_should():
    with open_source(qwen_coder_gguf()) as source:
        formats = Counter(tensor.format for tensor in source.tensors.values())
        assert formats == {"Q5_0": 133, "Q8_0": 13, "Q6_K": 12, "Q4_K": 12, "F32": 121}
        assert len(source.metadata["tokenizer.ggml.tokens"]) == 151936
