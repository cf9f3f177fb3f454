"""`freehold fetch`: the catalogue as a list, and models brought by name or path."""

import hashlib
import json

import pytest

from checkpoint.builders import write_gguf
from cli.commands import assert_refused, call
from cli.folders import write_folder
from freehold.checkpoint.fetch import catalogue


@pytest.fixture(autouse=True)
def models_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEHOLD_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_the_catalogue_is_listed_with_licence_size_and_presence(models_dir):
    listed = json.loads(call("fetch", "--json").out)
    assert {model["name"]: model["is_present"] for model in listed} == dict.fromkeys(catalogue(), False)
    text = call("fetch").out
    for entry in catalogue().values():
        assert entry.name in text
        assert entry.licence in text
    assert "98.4 MB" in text
    assert str(models_dir) in text


def test_a_fetched_model_is_run_by_its_name(tmp_path, models_dir):
    write_folder(tmp_path / "tiny")
    ended = call("fetch", tmp_path / "tiny")
    assert ended.code == 0, ended
    assert "tiny is fetched" in ended.out
    digest = hashlib.sha256((models_dir / "tiny" / "model.safetensors").read_bytes()).hexdigest()
    assert f"SHA-256 {digest}  model.safetensors" in ended.out
    assert call("run", "tiny", "hi", "--max-tokens", 1).code == 0


def test_a_second_fetch_says_that_it_verified(tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf")
    first, second = (json.loads(call("fetch", source, "--json").out) for _ in range(2))
    assert (first["was_present"], second["was_present"]) == (False, True)
    assert first["sha256"] == second["sha256"]
    assert "verified" in call("fetch", source).out


def test_a_changed_copy_is_refused(tmp_path, models_dir):
    source = write_gguf(tmp_path / "tiny.gguf")
    call("fetch", source)
    copy = models_dir / "tiny" / "tiny.gguf"
    copy.write_bytes(copy.read_bytes()[:-1] + b"!")
    assert_refused(call("fetch", source), "BadFile")
