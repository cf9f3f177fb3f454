"""Law 7: a run that is killed at any step, and goes on, is the run that never stopped; and what a disk can do to it."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from freehold.errors import BadFile, BadInput, CheckpointMismatch
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.state import DIGESTS, RECORD, STATE, WEIGHTS, Run, resume_run, save_run
from models.forms import on_threads, same_bits
from models.tiny import LLAMA
from train.steps import training
from train.whole_run import KINDS, new_run, take_step

STEPS = 8
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
FILES = (WEIGHTS, STATE, RECORD, DIGESTS)


@pytest.fixture(autouse=True)
def _one_thread():
    with on_threads(1):  # as the program that is killed
        yield


@contextmanager
def running_in(folder: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Run the whole run as a program, and kill it as the system would, if it is not done."""
    command = [sys.executable, "-m", "train.whole_run", str(folder), str(STEPS), kind]
    program = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    try:
        yield program
    finally:
        program.send_signal(signal.SIGKILL)
        program.wait()
        assert program.stdout is not None
        program.stdout.close()


def told(program: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield what each step was decided by, as it is told."""
    assert program.stdout is not None
    for line in program.stdout:
        yield json.loads(line)


@ALL_KINDS
def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_stopped(kind, tmp_path):
    with running_in(tmp_path / "straight", kind) as program:
        straight = {step["step"]: step for step in told(program)}
    assert list(straight) == list(range(1, STEPS + 1))
    draws = random.Random(kind)
    ends = iter([*sorted(draws.sample(range(1, STEPS), 2)), STEPS])
    for end in ends:
        with running_in(tmp_path / "killed", kind) as program:
            for step in told(program):
                assert step == straight[step["step"]]
                if step["step"] == end < STEPS:
                    time.sleep(draws.uniform(0.0, 0.03))  # often in the middle of saving
                    break
            else:
                assert program.wait() == 0
    last = f"step-{STEPS:08d}"
    for name in FILES:  # every bit of all that a run is
        assert (tmp_path / "killed" / last / name).read_bytes() == (tmp_path / "straight" / last / name).read_bytes()


def saved_twice(folder: Path, kind: str = "float32-adamw") -> dict[str, object]:
    """Save after each of two steps, and return what decides the third."""
    run = new_run(kind)
    for _ in range(2):
        take_step(run)
        save_run(folder, run)
    return take_step(run)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@ALL_KINDS
def test_a_saved_run_goes_on_with_the_same_step(kind, tmp_path):
    expected = saved_twice(tmp_path, kind)
    run = new_run(kind)
    with torch.no_grad():
        for parameter in run.decoder.parameters():
            parameter.zero_()
    torch.manual_seed(99)
    assert resume_run(tmp_path, run) == ()
    assert (run.step, run.cursor) == (2, {"next": 4, "of": "a"})
    assert take_step(run) == expected


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped": flip_a_bit,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    """A folder with the states before and after a first step."""
    folder, run = tmp_path_factory.mktemp("two"), new_run("float32-adamw")
    save_run(folder, run)
    with on_threads(1):
        take_step(run)
    save_run(folder, run)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_state_that_is_not_whole_is_never_taken_but_the_one_before(damage, name, two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    damage(tmp_path / "run" / "step-00000001" / name)
    run = new_run("float32-adamw")
    (why,) = resume_run(tmp_path / "run", run)
    assert run.step == 0
    assert why.startswith("step-00000001 is not whole: ")
    assert name in why or name == DIGESTS  # a damaged digest speaks of its file


def test_a_state_that_is_not_whole_gives_way_to_one_that_is(two_saved, tmp_path):
    folder, run = tmp_path / "run", new_run("float32-adamw")
    shutil.copytree(two_saved, folder)
    flip_a_bit(folder / "step-00000001" / STATE)
    resume_run(folder, run)
    take_step(run)
    save_run(folder, run)
    assert resume_run(folder, again := new_run("float32-adamw")) == ()
    assert again.step == 1
    for name in FILES:
        assert (folder / "step-00000001" / name).read_bytes() == (two_saved / "step-00000001" / name).read_bytes()


def test_where_nothing_is_whole_a_run_does_not_begin_again_by_itself(tmp_path):
    flip_a_bit(save_run(tmp_path, new_run("float32-adamw")) / WEIGHTS)
    with pytest.raises(
        BadFile, match=r"nothing in .* is whole, first step-00000000 .*weights\.safetensors has another"
    ):
        resume_run(tmp_path, new_run("float32-adamw"))


def test_a_run_that_was_never_saved_begins_at_its_beginning(tmp_path):
    run = new_run("float32-adamw")
    assert resume_run(tmp_path / "new", run) == ()
    assert run.step == 0


def test_the_newest_are_kept_and_the_oldest_go(tmp_path):
    run = new_run("float32-adamw")
    for _ in range(4):
        take_step(run)
        save_run(tmp_path, run, num_kept=2)
    assert names_in(tmp_path) == ["step-00000003", "step-00000004"]


def test_what_a_killed_process_left_of_a_save_goes_with_the_next(tmp_path):
    (tmp_path / ".step-00000007.x").mkdir(parents=True)
    (tmp_path / ".step-00000007.x" / WEIGHTS).write_bytes(b"half")
    run = new_run("float32-adamw")
    assert resume_run(tmp_path, run) == ()
    save_run(tmp_path, run)
    assert names_in(tmp_path) == ["step-00000000"]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Make the system refuse to write larger files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [100, 10_000, 300_000])
def test_a_disk_that_is_full_is_one_line_and_leaves_what_was_saved_before(num_bytes, tmp_path):
    run = new_run("float32-adamw")
    take_step(run)
    path = save_run(tmp_path, run)
    assert (path / STATE).stat().st_size > 300_000
    take_step(run)
    with files_of_at_most(num_bytes), pytest.raises(BadInput, match="step 2 cannot be saved in ") as caught:
        save_run(tmp_path, run, num_kept=1)
    assert caught.value.message.isprintable()
    assert names_in(tmp_path) == ["step-00000001"]
    assert resume_run(tmp_path, again := new_run("float32-adamw")) == ()
    assert again.step == 1


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadInput, match=r"needs [0-9,]+ bytes on its disk, 1,000 are free"):
        save_run(tmp_path, new_run("float32-adamw"))
    assert names_in(tmp_path) == []


def test_a_run_goes_on_only_with_the_config_that_it_began_with(tmp_path):
    save_run(tmp_path, new_run("float32-adamw"))
    run = new_run("float32-adamw")
    run.config = {"kind": "float32-adamw", "peak": 0.5}
    with pytest.raises(BadInput, match=r"began with peak None, and is to go on with 0\.5"):
        resume_run(tmp_path, run)


def test_a_run_of_another_model_is_refused_by_name(tmp_path):
    save_run(tmp_path, new_run("float32-adamw"))
    decoder = training(LLAMA)
    run = Run(decoder=decoder, optimizer=Optimizer(decoder, OptimizerSettings()), config={"kind": "float32-adamw"})
    with pytest.raises(CheckpointMismatch, match=r"`blocks.* was saved as .*, the model has "):
        resume_run(tmp_path, run)


def test_saving_changes_nothing_of_a_run(tmp_path):
    run, other = new_run("bfloat16-muon"), new_run("bfloat16-muon")
    torch.manual_seed(5)
    steps = [take_step(run) for _ in range(3)]
    torch.manual_seed(5)
    for expected in steps:
        save_run(tmp_path, other)
        assert take_step(other) == expected
    assert all(same_bits(a, b) for a, b in zip(run.decoder.parameters(), other.decoder.parameters(), strict=True))


def test_the_digests_are_as_sha256sum_reads_them(tmp_path):
    path = save_run(tmp_path, new_run("float32-adamw"))
    checked = subprocess.run(["sha256sum", "--check", "--strict", DIGESTS], cwd=path, capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in (WEIGHTS, STATE, RECORD)]
