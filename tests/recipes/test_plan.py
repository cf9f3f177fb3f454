"""What a plan says of memory, against what processes took; and runs that cannot fit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from freehold.errors import BadInput
from freehold.recipes import pretrain
from freehold.recipes.plan import check_memory
from freehold.train.optim import OptimizerSettings
from models.tiny import LLAMA, MTP
from recipes.small import pretraining, small_data, write_data

# A plan may say more than a run takes, for not all of it is there at one time; it must not say much less.
LEAST, MOST = 0.95, 1.6

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
MID_LLAMA = LLAMA | WIDE | {"num_hidden_layers": 8, "head_dim": 64, "max_position_embeddings": 1024}
MID = {"sequence_tokens": 512, "budget_tokens": 1024, "tokens_per_step": 2048}
RUNS = {
    "tiny": (LLAMA, {}),
    "mid": (MID_LLAMA, MID),
}

MEASURED = """
import sys
from pathlib import Path
from recipes.test_plan import RUNS, settings_of
from freehold.recipes import pretrain
pretrain.run(settings_of(sys.argv[1], Path(sys.argv[2])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def settings_of(name: str, folder: Path) -> pretrain.PretrainSettings:
    config, sizes = RUNS[name]
    return pretraining(folder, config, total=2, data=small_data(folder, **sizes))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_about_what_its_plan_says(name, tmp_path):
    write_data(tmp_path, [{"text": "word " * 800}] * 8)
    planned = pretrain.plan(settings_of(name, tmp_path)).total_bytes
    program = [sys.executable, "-c", MEASURED, name, str(tmp_path)]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    taken = int(done.stdout.split()[-1]) * 1024
    assert LEAST * taken <= planned <= MOST * taken, f"planned {planned:,}, taken {taken:,}"


def test_each_line_grows_with_what_it_is_of(tmp_path):
    write_data(tmp_path)
    settings = pretraining(tmp_path, MTP)

    def lines(**changes: object) -> dict[str, int]:
        return {line.name: line.num_bytes for line in pretrain.plan(replace(settings, **changes)).lines}

    plain = lines()
    assert plain["moments"] == 2 * plain["gradients"] == 2 * plain["weights"]
    assert "masters" not in plain
    halved = lines(dtype="bfloat16")
    assert halved["weights"] < 0.6 * plain["weights"]
    assert halved["masters"] < plain["weights"]
    assert halved["gradients"] == plain["gradients"]
    assert lines(optimizer=OptimizerSettings(matrices="muon"))["moments"] < 0.7 * plain["moments"]
    larger = lines(data=small_data(tmp_path, budget_tokens=256))
    assert larger["activations"] == 2 * plain["activations"]
    assert larger["backward"] == 2 * plain["backward"]


def test_a_run_that_cannot_fit_is_refused_with_its_largest_lines(tmp_path):
    write_data(tmp_path)
    plan = pretrain.plan(pretraining(tmp_path))
    check_memory(plan, plan.total_bytes)
    with pytest.raises(BadInput, match=r"the run takes .* GB of memory, 0\.0 are free \(\w+ 0\.0, "):
        check_memory(plan, 1000)


def test_a_model_for_another_machine_is_refused_before_the_first_step(tmp_path):
    write_data(tmp_path)
    huge = LLAMA | {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 126}
    with pytest.raises(BadInput, match=r"the run takes [\d,.]+ GB of memory"):
        pretrain.run(pretraining(tmp_path, huge))
    assert list((tmp_path / "run").iterdir()) == []
