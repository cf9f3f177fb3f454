"""`freehold train`: from a file to a model that is served; stopped, killed, and taken up again."""

import json
import signal
import subprocess

import httpx
import pytest

from cli.commands import TIMEOUT_S, assert_refused, call, read_until, spawn
from freehold.recipes.toml import write_settings
from models.tiny import MTP, NEMOTRON
from recipes.small import BYTES, pretraining, write_data

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("train")
    write_data(made)
    return made


def write_run(folder, name, config=MTP, **more):
    """Write the file of a run on one thread, which saves every second step."""
    file = folder / f"{name}.toml"
    settings = pretraining(folder, config, total=STEPS, save_every=2, out=folder / name, **more)
    file.write_text(write_settings(settings))
    return file


@pytest.fixture(scope="module")
def straight(folder):
    """Make a run that never stops, and return its folder."""
    ended = call("train", "pretrain", write_run(folder, "straight"))
    assert ended.code == 0, ended
    assert "step 1/6  loss 5." in ended.out
    assert "% of peak" in ended.out
    assert "done: " in ended.out
    return folder / "straight"


def training(file):
    return spawn("train", "pretrain", file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def unhurried(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": None} for line in lines]


def assert_same(folder, straight):
    """Assert that a run left every bit that the run that never stopped did."""
    assert unhurried(folder) == unhurried(straight)
    last = f"step-{STEPS:08d}"
    for name in (f"{last}/weights.safetensors", f"{last}/state.safetensors", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name


def test_a_run_that_is_killed_goes_on_as_the_run_that_never_stopped(folder, straight):
    file = write_run(folder, "killed")
    for seen in ("step 3/6", "step 4/6"):
        with training(file) as process:
            read_until(process.stdout, seen)
            process.kill()
    ended = call("train", "pretrain", file)
    assert ended.code == 0, ended
    assert "goes on after step" in ended.err
    assert_same(folder / "killed", straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_a_run_that_is_stopped_saves_and_says_how_to_go_on(number, code, folder, straight):
    file = write_run(folder, f"stopped-{code}")
    with training(file) as process:
        read_until(process.stdout, "step 1/6")
        process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert "stopping after this step" in errors
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert call("train", "pretrain", file).code == 0
    assert_same(folder / f"stopped-{code}", straight)


def test_a_run_that_is_done_does_nothing_more(folder, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    ended = call("train", "pretrain", folder / "straight.toml")
    assert ended.code == 0, ended
    assert "step 1/" not in ended.out
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_losses_are_a_picture(straight):
    picture = (straight / "loss.svg").read_text()
    assert picture.startswith("<svg")
    assert f"{unhurried(straight)[-1]['loss']:.4f}" in picture


def test_what_was_trained_is_served(folder):
    file = write_run(folder, "served", NEMOTRON | BYTES)
    assert call("train", "pretrain", file).code == 0
    model = folder / "served" / "model"
    with spawn("serve", model, "--port", 0, "--memory", 2, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        url = process.stdout.readline().strip()
        body = {"model": "model", "prompt": "1 green", "max_tokens": 4, "temperature": 0.0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0


def test_a_change_on_the_command_line_wins(folder):
    file = write_run(folder, "changed")
    ended = call("train", "pretrain", file, "--set", "schedule.total=2", "--set", f"out={folder / 'other'}")
    assert ended.code == 0, ended
    assert len(unhurried(folder / "other")) == 2
    assert not (folder / "changed").exists()


COMMANDS = [("sft", "--example"), ("lora", "--example"), ("pretrain", "--preset", "nemotron-3-super")]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_file_to_begin_with_is_printed(command):
    ended = call("train", *command)
    assert ended.code == 0, ended
    assert "[schedule]" in ended.out
    assert "[data]" in ended.out


def test_what_cannot_be_used_is_one_line(folder, tmp_path):
    file = write_run(folder, "wrong")
    assert_refused(call("train", "pretrain"), "BadInput")
    assert_refused(call("train", "distil"), "BadUsage")
    assert_refused(call("train", "lora", "--preset", "nemotron-3-nano"), "BadInput")
    assert_refused(call("train", "pretrain", tmp_path / "none.toml"), "NotFound")
    assert_refused(call("train", "pretrain", tmp_path), "BadInput")
    ended = call("train", "pretrain", file, "--set", "schedule.peek=1")
    assert_refused(ended, "BadInput")
    assert "`schedule.peek` is no key" in ended.err
    assert "`schedule.peak`" in ended.err
    assert_refused(call("train", "pretrain", file, "--set", f"data.train=['{tmp_path}']"), "NotFound")
