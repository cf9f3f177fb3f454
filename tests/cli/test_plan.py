"""`freehold plan`: each line of a run's memory before the run, and a refusal of what cannot fit."""

import json

from cli.commands import assert_refused, call
from freehold.recipes.toml import write_settings
from models.tiny import LLAMA, MTP
from recipes.small import pretraining, write_data

HUGE = LLAMA | {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 126}


def write_run(folder, config):
    write_data(folder)
    file = folder / "run.toml"
    file.write_text(write_settings(pretraining(folder, config)))
    return file


def test_a_plan_says_each_line_and_begins_nothing(tmp_path):
    file = write_run(tmp_path, MTP)
    ended = call("plan", "pretrain", file)
    assert ended.code == 0, ended
    for line in ("weights", "gradients", "moments", "activations", "loss", "at its peak", "are free"):
        assert line in ended.out
    assert not (tmp_path / "run").exists()
    told = json.loads(call("plan", "pretrain", file, "--json").out)
    assert told["total_bytes"] == sum(line["bytes"] for line in told["lines"]) < told["free_bytes"]
    changed = call("plan", "pretrain", file, "--set", "dtype=bfloat16", "--json")
    assert "masters" in {line["name"] for line in json.loads(changed.out)["lines"]}


def test_a_plan_of_several_processes_says_that_it_is_of_one_of_them(tmp_path):
    file = write_run(tmp_path, MTP)
    sharded = ("plan", "pretrain", file, "--set", "parallel.weights=shard")
    ended = call(*sharded, "--processes", "4")
    assert ended.code == 0, ended
    for line in ("one of 4 processes", "all 4 on one machine take", "gathered", "save"):
        assert line in ended.out
    told = json.loads(call(*sharded, "--json").out)
    assert told["processes"] == 2
    assert json.loads(call("plan", "pretrain", file, "--json").out)["processes"] == 1
    assert_refused(call("plan", "pretrain", file, "--set", "parallel.tensor=2", "--processes", "3"), "BadInput")


def test_what_cannot_fit_is_refused_after_its_lines(tmp_path):
    ended = call("plan", "pretrain", write_run(tmp_path, HUGE), "--json")
    told = json.loads(ended.out)
    assert told["total_bytes"] > told["free_bytes"]
    assert ended.code == 2
    assert "GB of memory" in ended.err
    assert "Traceback" not in ended.err


def test_what_cannot_be_read_is_one_line(tmp_path):
    assert_refused(call("plan", "pretrain", tmp_path / "none.toml"), "NotFound")
    assert_refused(call("plan", "sft", tmp_path), "BadInput")
