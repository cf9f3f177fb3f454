"""`freehold train`: from a file to a model that is served; stopped, killed, and taken up again."""

import json
import signal
import subprocess
from xml.etree import ElementTree

import httpx
import pytest

from cli.commands import TIMEOUT_S, assert_refused, call, read_until, spawn
from freehold.cli.curve import trained_on
from freehold.recipes.toml import write_settings
from models.tiny import LLAMA, MTP, NEMOTRON
from recipes.small import BYTES, TEXTS, pretraining, small_data, write_data

STEPS = 6
SVG = "{http://www.w3.org/2000/svg}"


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


def test_losses_are_curves_in_a_picture(folder, straight):
    (curve,) = curves(straight)
    assert len(curve) == STEPS
    heights = [y for _, y in curve]
    assert heights[-1] > heights[0]  # y goes down the page, and so does the loss
    write_data(folder, TEXTS[:2], name="other")
    data = small_data(folder, held_out=(folder / "other",))
    file = write_run(folder, "measured", LLAMA | BYTES, data=data, evaluate_every=2)
    assert call("train", "pretrain", file).code == 0
    assert sorted(map(len, curves(folder / "measured"))) == [STEPS // 2, STEPS]


def curves(folder):
    """Return the curves of a run's picture, each as its points."""
    drawn = ElementTree.fromstring((folder / "loss.svg").read_text())
    paths = [path.attrib["d"].replace("M", "").replace("L", "") for path in drawn.iter(f"{SVG}path")]
    return [[tuple(map(float, pair)) for pair in batched(path.split(), 2)] for path in paths]


def batched(values, size):
    return [values[start : start + size] for start in range(0, len(values), size)]


def test_a_long_run_is_a_curve_of_means():
    lines = [{"step": step, "loss": step % 2, "held_out_loss": None} for step in range(1, 2001)]
    assert trained_on(lines) == [(4 * number, 0.5) for number in range(1, 501)]


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
    ended = call("train", "pretrain", file, "--set", "schedule.total=2", "--set", f"out={folder / 'elsewhere'}")
    assert ended.code == 0, ended
    assert len(unhurried(folder / "elsewhere")) == 2
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
