"""A checkpoint is written whole or not at all, always with the same bytes, and others read it."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.gguf_models import write_gguf_model
from checkpoint.test_gguf_models import GGUF_CONFIGS
from freehold.checkpoint.load import load_decoder, open_described
from freehold.checkpoint.save import save_checkpoint
from freehold.errors import BadInput
from freehold.evaluate.laws import relative_difference
from freehold.models.decoder import Decoder
from freehold.models.families import family_of_config
from models.tiny import CONFIGS, LLAMA, MTP, NEMOTRON, Config, random_tokens, tiny_decoder
from models.witness import load_ours, load_witness, our_logits, witness_logits

FLOAT32_TOLERANCE = 5e-6  # sums in another order, and log(exp(A_log))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ALL = pytest.mark.parametrize("config", [*CONFIGS.values(), MTP], ids=[*CONFIGS, "nemotron-mtp"])


def save(folder: Path, decoder: Decoder, config: Config, **more: Any) -> Path:
    save_checkpoint(folder, decoder, family=family_of_config(config), config=config, **more)
    return folder


def save_again(path: Path, folder: Path, dtype: torch.dtype, **more: Any) -> Path:
    """Load a checkpoint and save it elsewhere, as `freehold convert` does."""
    source, described = open_described(path)
    with source:
        decoder, _ = load_decoder(source, described, dtype=dtype, device=torch.device("cpu"))
    save_checkpoint(folder, decoder, family=described.family, config=described.config, **more)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Round trips.


@ALL
def test_saving_and_loading_gives_every_parameter_back(config, tmp_path):
    decoder = tiny_decoder(config)
    loaded = load_ours(save(tmp_path / "m", decoder, config), torch.float32)
    assert loaded.spec == decoder.spec
    for (name, found), expected in zip(loaded.named_parameters(), decoder.parameters(), strict=True):
        assert torch.equal(found, expected), name


@DTYPES
@pytest.mark.parametrize(
    "config", [LLAMA, CONFIGS["qwen-tied"], NEMOTRON, MTP], ids=["llama", "qwen", "nemotron", "mtp"]
)
def test_load_save_load_gives_the_same_bytes(config, dtype, tmp_path):
    first = save(tmp_path / "1", tiny_decoder(config, dtype=dtype), config)
    second = save_again(first, tmp_path / "2", dtype)
    assert content(save_again(second, tmp_path / "3", dtype)) == content(second) == content(first)


def test_shards_of_any_size_hold_the_same_tensors(tmp_path):
    decoder = tiny_decoder(NEMOTRON)
    whole = save(tmp_path / "whole", decoder, NEMOTRON)
    for size in (1, 5000, 100_000):
        shards = save(tmp_path / f"{size}", decoder, NEMOTRON, max_shard_bytes=size)
        assert content(save_again(shards, tmp_path / f"{size}-joined", torch.float32)) == content(whole)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    decoder = tiny_decoder(NEMOTRON)
    first, second = (save(tmp_path / n, decoder, NEMOTRON, max_shard_bytes=30_000) for n in "12")
    assert content(first) == content(second)


# What the files are.


def test_a_small_model_is_one_file(tmp_path):
    folder = save(tmp_path / "m", tiny_decoder(LLAMA), LLAMA)
    assert sorted(content(folder)) == ["config.json", "model.safetensors"]


def test_shards_are_numbered_and_within_their_size_and_the_index_names_them(tmp_path):
    decoder, limit = tiny_decoder(LLAMA), 20_000
    folder = save(tmp_path / "m", decoder, LLAMA, max_shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in decoder.parameters())
    header_bytes = 4096
    assert all((folder / shard).stat().st_size < limit + header_bytes for shard in shards)


@DTYPES
def test_the_config_names_the_dtype_in_both_spellings_and_no_code(dtype, tmp_path):
    config = LLAMA | {"auto_map": {"AutoConfig": "configuration_x.X"}, "torch_dtype": "float64"}
    folder = save(tmp_path / "m", tiny_decoder(LLAMA, dtype=dtype), config)
    written = json.loads((folder / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert written == LLAMA | {"dtype": name, "torch_dtype": name}


def test_a_repeated_head_is_not_saved_again(tmp_path):
    config = CONFIGS["llama-tied"]
    folder = save(tmp_path / "m", tiny_decoder(config), config)
    assert b"lm_head" not in (folder / "model.safetensors").read_bytes()


def test_progress_ends_at_the_total(tmp_path):
    decoder, seen = tiny_decoder(LLAMA), []
    save(tmp_path / "m", decoder, LLAMA, max_shard_bytes=20_000, progress=lambda *done: seen.append(done))
    total = sum(p.nbytes for p in decoder.parameters())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


# Whole or not at all.


class Failure(Exception):
    pass


@pytest.mark.parametrize("failure", [Failure, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["progress", "write_text_files"])
def test_a_save_that_fails_midway_leaves_nothing(failure, place, tmp_path):
    def fail(*arguments: object) -> None:
        raise failure

    with pytest.raises(failure):
        save(tmp_path / "m", tiny_decoder(LLAMA), LLAMA, max_shard_bytes=20_000, **{place: fail})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Make the system refuse to write larger files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_a_write_is_one_clear_line_and_leaves_nothing(tmp_path):
    with files_of_at_most(10_000), pytest.raises(BadInput, match=r"model\.safetensors cannot be written") as caught:
        save(tmp_path / "m", tiny_decoder(LLAMA), LLAMA)
    assert caught.value.message.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadInput, match=r"m needs [0-9,]+ bytes on its disk, 1,000 are free"):
        save(tmp_path / "m", tiny_decoder(LLAMA), LLAMA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_what_is_there_already_is_never_touched(kind, tmp_path):
    target = tmp_path / "m"
    match kind:
        case "folder":
            target.mkdir()
        case "file":
            target.write_text("mine")
        case _:
            target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="m exists already"):
        save(target, tiny_decoder(LLAMA), LLAMA)
    assert list(tmp_path.iterdir()) == [target]
    assert kind != "file" or target.read_text() == "mine"


def test_a_folder_in_no_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        save(tmp_path / "absent" / "m", tiny_decoder(LLAMA), LLAMA)


# transformers as reader. That it loads every tiny model saved as one file is law 1, in tests/models.


@pytest.mark.parametrize("name", ["llama", "qwen", "nemotron", "nemotron-latent"])
def test_transformers_loads_our_shards(name, tmp_path):
    config, tokens_L = CONFIGS[name], random_tokens(40)
    decoder = tiny_decoder(config)
    witness = load_witness(save(tmp_path / "m", decoder, config, max_shard_bytes=20_000))
    assert relative_difference(our_logits(decoder, tokens_L), witness_logits(witness, tokens_L)) <= FLOAT32_TOLERANCE


def test_transformers_loads_a_model_with_an_mtp_module_and_passes_it_over(tmp_path):
    decoder, tokens_L = tiny_decoder(MTP), random_tokens(40)
    witness = load_witness(save(tmp_path / "m", decoder, MTP))
    assert relative_difference(our_logits(decoder, tokens_L), witness_logits(witness, tokens_L)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", ["llama-tied", "llama-yarn", "qwen", "nemotron-dense", "nemotron-moe"])
def test_transformers_loads_what_we_make_of_a_gguf_file(name, tmp_path):
    config, tokens_L = GGUF_CONFIGS[name], random_tokens(40)
    decoder = tiny_decoder(config)
    path = write_gguf_model(tmp_path / "m.gguf", decoder, config)
    witness = load_witness(save_again(path, tmp_path / "m", torch.float32))
    assert relative_difference(our_logits(decoder, tokens_L), witness_logits(witness, tokens_L)) <= FLOAT32_TOLERANCE
