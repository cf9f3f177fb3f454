"""`freehold train` in several processes: one speaks, all end together, and a run moves between numbers of them."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

import freehold
from cli.commands import ENVIRONMENT, START, TIMEOUT_S, call, read_until
from freehold.evaluate.laws import relative_difference
from freehold.recipes import pretrain
from freehold.recipes.loop import Watch
from freehold.recipes.metrics import read_metrics
from freehold.recipes.toml import write_settings
from models.forms import on_threads
from models.tiny import MTP
from recipes.small import pretraining, write_data

STEPS = 6
# Six steps of AdamW, which makes an ulp of a small gradient an ulp of a whole move (test_data.py); measured 3e-7.
BOUND = 64 * 2.0**-23
LONG_S = 3 * TIMEOUT_S  # two processes that start on cores which others use


@pytest.fixture
def settings(tmp_path):
    write_data(tmp_path)
    return pretraining(tmp_path, MTP, total=STEPS, save_every=2, out=tmp_path / "run")


def write_run(settings) -> Path:
    file = settings.out.with_suffix(".toml")
    file.write_text(write_settings(settings))
    return file


def launch(file: Path, *changes: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """Start a run in several processes, with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | ENVIRONMENT | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", START, "train", "pretrain", str(file)]
    return [
        subprocess.Popen(
            [*command, *(word for change in changes for word in ("--set", change))],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for rank in range(count)
    ]


def ends_of(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Return the exit codes of processes that end by themselves, and what they wrote to stderr."""
    try:
        errors = [process.communicate(timeout=LONG_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(errors)


def said(errors: str, kind: str) -> int:
    """Return how many lines say an error, of which there is no traceback."""
    assert "Traceback" not in errors, errors
    return sum(line.startswith(f"{kind}: ") for line in errors.splitlines())


def test_a_run_moves_from_one_process_to_two_of_which_one_is_killed_and_back(settings, tmp_path):
    with on_threads(1):
        pretrain.run(settings)
        straight = settings.out.rename(tmp_path / "straight")
        pretrain.run(settings, Watch(should_stop=lambda: True))
    first, second = launch(write_run(settings), "parallel.weights=shard")
    read_until(first.stdout, f"step 4/{STEPS}")
    second.kill()
    codes, errors = ends_of((first, second))
    assert codes == [2, -signal.SIGKILL]
    assert said(errors, "PeerLost") == 1
    notes = []
    with on_threads(1):
        pretrain.run(settings, Watch(note=notes.append))
    assert any("made by 2 processes with 1 x weights in parts; 1 process go on within rounding" in n for n in notes)
    for found, expected in zip(read_metrics(settings.out), read_metrics(straight), strict=True):
        for exact in ("step", "tokens", "step_tokens", "supervised_tokens", "learning_rate"):
            assert found[exact] == expected[exact]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    models = [load_file(folder / "model" / "model.safetensors") for folder in (settings.out, straight)]
    wrong = {name: relative_difference(models[0][name], expected) for name, expected in models[1].items()}
    assert {name: value for name, value in wrong.items() if value > BOUND} == {}


def test_torchrun_stops_a_run_that_goes_on_to_a_model(settings):
    file = write_run(settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "freehold"]
    command += ["train", "pretrain", str(file), "--set", "parallel.weights=shard"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | ENVIRONMENT}
    with subprocess.Popen(command, **pipes) as program:
        read_until(program.stdout, f"step 1/{STEPS}")
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=LONG_S)
    assert program.returncode != 0
    assert errors.count("the same command goes on from there") == 1
    ended = subprocess.run(command, **pipes, timeout=LONG_S)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("done: ") == 1
    lines = (settings.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    list(freehold.load(settings.out / "model", dtype="float32").stream("1 green", max_tokens=2))


def test_a_run_that_diverges_ends_in_all_processes_with_one_line(settings):
    codes, errors = ends_of(launch(write_run(settings), "schedule.peak=1e30"))
    assert codes == [2, 2]
    assert said(errors, "Diverged") == 1


def test_portions_that_cannot_be_shared_evenly_are_refused_with_one_line(settings):
    codes, errors = ends_of(launch(write_run(settings), "data.tokens_per_step=384"))
    assert codes == [2, 2]
    assert said(errors, "BadInput") == 1
    assert "3 portions of `data.budget_tokens`, which 2 processes cannot share evenly" in errors


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_what_is_wrong_with_a_file_is_said_by_the_first_process_alone(rank, lines, settings, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    ended = call("train", "pretrain", write_run(settings), "--set", "parallel.weight=shard")
    assert ended.code == 2
    assert ended.err.count("`parallel.weight` is no key") == lines


def test_a_launch_that_is_no_number_is_refused(settings, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = call("train", "pretrain", write_run(settings))
    assert ended.code == 2
    assert "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE are 'first', '2', None, None, wanted numbers" in ended.err
