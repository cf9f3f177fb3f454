"""`freehold check`: every law on every kind of block, with its numbers."""

import json

import pytest

from cli.commands import call
from cli.folders import BYTES, write_folder
from models.tiny import LATENT, QWEN


@pytest.mark.parametrize("config", [QWEN | BYTES, LATENT | BYTES], ids=["qwen", "nemotron-latent"])
def test_the_laws_hold_for_sound_models(tmp_path, config):
    folder = write_folder(tmp_path / "model", config)
    ended = call("check", folder, "--json")
    assert ended.code == 0, ended
    findings = json.loads(ended.out)
    assert {"finite weights", "prefill = decode", "company", "round trip"} <= {found["law"] for found in findings}
    assert all(found["holds"] for found in findings)
    assert all(found["measured"] <= found["tolerance"] for found in findings if found["tolerance"] is not None)


def test_the_table_names_each_law_with_what_was_measured(tmp_path):
    ended = call("check", write_folder(tmp_path / "model"))
    assert ended.err == ""
    assert ended.out.splitlines()[0].split() == ["law", "holds", "measured", "tolerance", "claim"]
    assert ended.out.endswith("hold\n")
