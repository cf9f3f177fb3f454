"""What a user can get wrong, through the real command line: one clear line, exit code 2, and nothing half-written."""

import json
from pathlib import Path

import pytest
import safetensors.torch

from checkpoint.builders import STRING, entry, key, raw_gguf, raw_safetensors, text
from cli.commands import assert_refused, call
from cli.folders import TINY_LLAMA, change_config, write_folder

CORPUS = Path(__file__).parent.parent / "corpus"
FOUR = entry("F32", [1], 0, 4)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model")


def assert_every_command_refuses(path: Path, kind: str, *, says: str) -> None:
    """Assert that each command that reads a checkpoint refuses it with the same words, and leaves no output."""
    dest = path.parent / "converted"
    before = sorted(path.parent.iterdir())
    for arguments in (["run", path, "hi"], ["inspect", path], ["check", path], ["convert", path, dest]):
        ended = call(*arguments)
        assert_refused(ended, kind)
        assert says in ended.err, ended
    assert sorted(path.parent.iterdir()) == before


def test_truncated_safetensors(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert_every_command_refuses(folder, "BadFile", says="model.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": FOUR, "b": entry("F32", [1], 2, 6)}, bytes(6), "overlap"),
        (f'{{"a": {json.dumps(FOUR)}, "a": {json.dumps(FOUR)}}}'.encode(), bytes(4), "'a' occurs twice"),
    ],
    ids=["overlapping", "duplicate"],
)
def test_overlapping_and_duplicate_tensors(folder, header, data, says):
    (folder / "model.safetensors").write_bytes(raw_safetensors(header, data))
    assert_every_command_refuses(folder, "BadFile", says=says)


def test_a_header_of_100_mb(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(raw_safetensors(b"{}", length=100_000_000))
    with weights.open("r+b") as file:
        file.truncate(100_000_008)  # it is all there, and still not read
    assert_every_command_refuses(folder, "BadFile", says="100000000")


@pytest.mark.parametrize("name", ["name-past-end", "array-of-strings-past-end", "array-2-to-the-60"])
def test_gguf_lengths_past_the_end(tmp_path, name):
    path = tmp_path / "model.gguf"
    path.write_bytes((CORPUS / f"{name}.gguf").read_bytes())
    assert_every_command_refuses(path, "BadFile", says="model.gguf")


def test_unknown_architecture(folder):
    change_config(folder, model_type="mpt")
    assert_every_command_refuses(folder, "UnsupportedModel", says="'mpt'")


def test_unknown_gguf_architecture(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_gguf([key("general.architecture", STRING, text("mpt"))]))
    assert_every_command_refuses(path, "UnsupportedModel", says="'mpt'")


def test_unknown_rope_type(folder):
    change_config(folder, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0})
    assert_every_command_refuses(folder, "UnsupportedModel", says="longrope")


def test_a_missing_shard(folder):
    weights = folder / "model.safetensors"
    names = safetensors.torch.load(weights.read_bytes())
    weights.rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {
        "lm_head.weight": "model-00002-of-00002.safetensors"
    }
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_every_command_refuses(folder, "NotFound", says="model-00002-of-00002.safetensors")


def test_a_shape_that_disagrees_with_the_config(folder):
    change_config(folder, intermediate_size=64)
    assert_every_command_refuses(folder, "CheckpointMismatch", says="mlp.")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% set x = namespace(s='abcdefgh') %}{% for a in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
    ],
    ids=["loops-forever", "builds-a-huge-string"],
)
def test_a_template_that_leaves_its_budget(tmp_path, template):
    folder = write_folder(tmp_path / "model", template=template)
    assert_refused(call("run", folder, "hi"), "BadTemplate")


def test_a_prompt_longer_than_the_context(folder):
    ended = call("run", folder, "word " * 100)
    assert_refused(ended, "TooLong")
    assert "context is 256" in ended.err


def test_nan_in_weights_is_named_by_check(folder):
    weights = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for options in ([], ["--json"]):
        ended = call("check", folder, *options)
        assert ended.code == 2
        assert ended.err.startswith("BadFile: the weights are damaged")
        assert "blocks.3.mixer.up_proj.weight (1)" in ended.err
        assert "Traceback" not in ended.err
    findings = json.loads(ended.out)
    assert {finding["law"] for finding in findings if not finding["holds"]} >= {"finite weights", "prefill = decode"}


def test_a_pickle_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    assert_every_command_refuses(folder, "UnsupportedModel", says="pickle")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["run", "no-such-model", "hi"], "NotFound"),
        (["fetch", "no-such-model"], "NotFound"),
        (["run", "x", "hi", "--temperature", "-1"], "BadRequest"),
        (["run", "x", "hi", "--stop", ""], "BadRequest"),
        (["run", "x", "hi", "--max-tokens", "0"], "BadUsage"),
        (["run", "x", "hi", "--dtype", "int3"], "BadUsage"),
        (["run", "x"], "BadUsage"),
        (["walk"], "BadUsage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_arguments_that_cannot_be_used(arguments, kind):
    assert_refused(call(*arguments), kind)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "toaster"], "toaster"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--raw", "--system", "Be brief."], "--raw"),
    ],
    ids=["device", "absent device", "system without template"],
)
def test_options_that_this_model_or_machine_cannot_follow(folder, options, says):
    ended = call("run", folder, "hi", *options)
    assert_refused(ended, "BadRequest")
    assert says in ended.err


def test_a_conversion_to_what_is_there_already_is_refused(folder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    assert_refused(call("convert", folder, taken), "BadInput")
    assert_refused(call("convert", folder, tmp_path / "no" / "such" / "place"), "BadInput")
    assert list(taken.iterdir()) == []


def test_values_beyond_float16_are_not_made_infinite(tmp_path):
    folder = write_folder(tmp_path / "model", TINY_LLAMA)
    weights = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    weights["model.norm.weight"][0] = 1e6
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ended = call("convert", folder, tmp_path / "half", "--dtype", "f16")
    assert_refused(ended, "BadRequest")
    assert "norm.weight" in ended.err
    assert not (tmp_path / "half").exists()
