"""Runs of recipes in divided models: saved whole, they go on in any division, and end in the same checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel.fleet import Fleet
from parallel.recipe_runs import take_up
from safetensors.torch import load_file

from cli.commands import ENVIRONMENT, TIMEOUT_S
from freehold.errors import BadInput
from freehold.evaluate.laws import relative_difference
from freehold.parallel.processes import Sizes
from freehold.recipes import pretrain
from freehold.recipes.metrics import read_metrics
from freehold.recipes.settings import ParallelSettings
from freehold.recipes.toml import write_settings
from freehold.train.optim import OptimizerSettings
from models.forms import on_threads
from models.tiny import LLAMA, MTP
from recipes.small import pretraining, small_data, write_data

STEPS = 6
BOUND = 64 * 2.0**-23
# Of Adam's usual eps a gradient that is nothing but rounding is a step of full length.
OPTIMIZER = OptimizerSettings(eps=1e-3)


def assert_alike(run: Path, straight: Path) -> None:
    """Check that runs saw the same tokens, and lost and learnt the same within rounding."""
    for found, expected in zip(read_metrics(run), read_metrics(straight), strict=True):
        for exact in ("step", "tokens", "step_tokens", "supervised_tokens", "learning_rate"):
            assert found[exact] == expected[exact]
        measured = {key: value for key, value in expected.items() if key in ("loss", "held_out_loss") and value}
        assert {key: found[key] for key in measured} == pytest.approx(measured, rel=1e-6)
    models = [load_file(folder / "model" / "model.safetensors") for folder in (run, straight)]
    wrong = {name: relative_difference(models[0][name], expected) for name, expected in models[1].items()}
    assert {name: value for name, value in wrong.items() if value > BOUND} == {}


def test_a_run_goes_on_in_other_divisions_and_ends_in_the_same_model(fleet: Fleet, tmp_path: Path):
    write_data(tmp_path)
    data = small_data(tmp_path, held_out=(tmp_path / "more",))
    write_data(tmp_path, name="more")
    settings = pretraining(tmp_path, MTP, total=STEPS, save_every=2, evaluate_every=2, data=data, optimizer=OPTIMIZER)
    with on_threads(1):
        pretrain.run(settings)
    straight = settings.out.rename(tmp_path / "straight")
    fleet.run(take_up, Sizes(tensor=2, context=2), settings, 2)
    notes = fleet.run(take_up, Sizes(expert=2, context=2), settings, 4)[0]
    assert any("made by 4 processes with whole weights and context 2, tensor 2; 4 processes" in note for note in notes)
    fleet.run(take_up, Sizes(tensor=2), settings, STEPS)
    assert_alike(settings.out, straight)


def test_torchrun_trains_a_divided_model(tmp_path: Path):
    write_data(tmp_path)
    settings = pretraining(tmp_path, LLAMA, total=2, optimizer=OPTIMIZER)
    with on_threads(1):
        pretrain.run(settings)
    straight = settings.out.rename(tmp_path / "straight")
    file = tmp_path / "run.toml"
    file.write_text(write_settings(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "freehold"]
    command += ["train", "pretrain", str(file), "--set", "parallel.tensor=2"]
    ended = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=3 * TIMEOUT_S)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("done: ") == 1
    assert_alike(settings.out, straight)


def test_divided_weights_are_not_sharded_too():
    with pytest.raises(BadInput, match=r"`parallel\.tensor` and `parallel\.expert` divide weights"):
        ParallelSettings(weights="shard", tensor=2)
