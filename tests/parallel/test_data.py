"""Many processes make the step that one makes: gradients, loads, weights; and what one saved others take up."""

import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from parallel.fleet import Fleet
from parallel.steps import FORMS, MODELS, Taken, go_on, save_twice, save_where_one_disk_is_full, take_steps
from torch import Tensor

from freehold.evaluate.laws import relative_difference
from freehold.parallel.processes import ALONE, Sizes
from freehold.train.state import DIGESTS
from models.forms import on_threads
from train.test_state import flip_a_bit, names_in

DATA = Sizes()
EPS = 2.0**-23
# A micro-batch's gradient has the same bits whoever computes it. What differs is in which order four of them are added:
# three roundings of half an ulp each, of terms that cancel in part.
GRADIENT_BOUND = 8 * EPS
# AdamW divides a gradient by its size: what is wrong with one value is as wrong in the weight's move, also where the
# value is small beside the others, and steps that follow see it. The gradient of a key's bias is nothing but what is
# left of large terms that cancel (all scores of a query move alike), so its first moves are of no certain sign.
WEIGHT_BOUND, KEY_BIAS_BOUND = 64 * EPS, 2e-3
# In parts, the sum of a bfloat16 gradient over processes is rounded to bfloat16 once more.
BFLOAT16_BOUND, BFLOAT16_WEIGHT_BOUND = 2.0**-8, 2.0**-6


@pytest.fixture(autouse=True)
def _one_thread():
    with on_threads(1):  # as each of the fleet
        yield


@cache
def taken_alone(name: str) -> Taken:
    with on_threads(1):
        taken = take_steps(ALONE, name, "replicated")
    assert taken is not None
    return taken


def weight_bound(name: str) -> float:
    return KEY_BIAS_BOUND if name.endswith("k_proj.bias") else WEIGHT_BOUND


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound) -> None:
    assert found.keys() == expected.keys()
    wrong = {name: relative_difference(found[name], expected[name]) for name in expected}
    assert {name: value for name, value in wrong.items() if value > bound(name)} == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_four_processes_take_the_steps_of_one(name, form, fleet: Fleet):
    expected, (found, *others) = taken_alone(name), fleet.run(take_steps, DATA, name, form)
    assert others == [None] * 3
    rounds = "bfloat16" in name and form != "replicated"
    assert_close(found.gradient, expected.gradient, lambda n: BFLOAT16_BOUND if rounds else GRADIENT_BOUND)
    assert_close(found.weights, expected.weights, lambda n: BFLOAT16_WEIGHT_BOUND if rounds else weight_bound(n))
    first, wanted = found.reports[0], expected.reports[0]
    assert (first.num_tokens, first.num_supervised) == (wanted.num_tokens, wanted.num_supervised)
    assert first.worst_violation == wanted.worst_violation  # counts of experts are whole numbers
    for name, correction_E in expected.weights.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(found.weights[name], correction_E)
    close = 1e-3 if rounds else 4 * EPS
    for report, wanted in zip(found.reports, expected.reports, strict=True):
        assert report.loss == pytest.approx(wanted.loss, rel=close)
        assert report.mtp_losses == pytest.approx(wanted.mtp_losses, rel=close)
        assert report.balance == pytest.approx(wanted.balance, rel=close)
        assert report.gradient_norm == pytest.approx(wanted.gradient_norm, rel=close)


@pytest.fixture(scope="module")
def saved(fleet: Fleet, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A folder where four processes saved two steps in parts, and the weights after a third."""
    folder = tmp_path_factory.mktemp("saved")
    weights, *_ = fleet.run(save_twice, DATA, folder, "sharded")
    assert names_in(folder) == ["step-00000001", "step-00000002"]
    return folder, weights


@pytest.fixture
def run_folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_as_many_processes_go_on_bit_for_bit(saved, run_folder, fleet: Fleet):
    (notes, first, weights), *_ = fleet.run(go_on, DATA, run_folder, "sharded", 3)
    assert (notes, first) == ((), 2)
    for name, expected in saved[1].items():
        assert torch.equal(weights[name], expected), name


def test_what_four_saved_one_takes_up_and_four_again(run_folder, fleet: Fleet):
    notes, first, _ = go_on(ALONE, run_folder, "replicated", 3)
    assert first == 2
    assert "step-00000002 was made by 4 sharded; 1 replicated go on within rounding" in notes[0]
    (_, first, weights), *_ = fleet.run(go_on, DATA, run_folder, "mixed", 4)
    assert first == 3
    _, _, expected = go_on(ALONE, run_folder.parent / "straight", "replicated", 4)
    assert_close(weights, expected, lambda name: 2 * weight_bound(name))


DAMAGES = {
    "a part flipped": lambda step: flip_a_bit(step / "shard-00003-model-00001-of-00001.safetensors"),
    "a part missing": lambda step: (step / "shard-00003-model-00001-of-00001.safetensors").unlink(),
    "no digests": lambda step: (step / DIGESTS).unlink(),
    "another file": lambda step: (step / "shard-00005-model-00001-of-00001.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_parts_that_are_not_whole_are_never_taken_but_those_before(damage, run_folder, fleet: Fleet):
    damage(run_folder / "step-00000002")
    (run_folder / ".step-00000003").mkdir()  # what a killed save leaves
    (notes, first, _), *others = fleet.run(go_on, DATA, run_folder, "sharded", 2)
    assert [first, *(step for _, step, _ in others)] == [1] * 4
    assert notes[0].startswith("step-00000002 is not whole: ")
    assert names_in(run_folder) == ["step-00000001", "step-00000002"]  # once more, and whole
    assert fleet.run(go_on, DATA, run_folder, "sharded", 2)[0][:2] == ((), 2)


def test_where_one_process_cannot_write_all_say_so_and_nothing_is_left_under_the_name(fleet: Fleet, tmp_path):
    said = fleet.run(save_where_one_disk_is_full, DATA, tmp_path)
    assert all("cannot be saved" in each and "large" in each for each in said), said
    assert not (tmp_path / "step-00000001").exists()


def test_the_norm_is_that_of_one_vector(fleet: Fleet):
    (found, *_) = fleet.run(take_steps, DATA, "llama", "sharded")
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.gradient.values()))
    assert norm == pytest.approx(0.5, rel=1e-5)  # to which it was clipped
