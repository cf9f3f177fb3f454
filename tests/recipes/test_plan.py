"""What a plan says of memory, against what processes took; and runs that cannot fit."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.folders import write_folder
from freehold.errors import BadInput, UnsupportedModel
from freehold.parallel.processes import Processes
from freehold.recipes import lora, pretrain
from freehold.recipes.plan import PROGRAM_BYTES, RunPlan, check_memory, check_run
from freehold.recipes.recipe import RECIPES
from freehold.recipes.settings import ParallelSettings, TrainSettings
from freehold.train.optim import OptimizerSettings
from freehold.train.schedule import Schedule
from models.tiny import LLAMA, MTP, NEMOTRON, Config
from recipes.small import BYTES, pretraining, small_data, write_data

# A plan says no less than a process takes, for that would end the run; nor much more, for that would refuse one that
# fits. docs/training.md states it.
MOST = 1.6
# The program is planned with room to spare. Of what a run adds to it lines may say this much less, not more: what the
# allocator holds back differs from machine to machine.
LEAST_OF_LINES = 0.8

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
MID_LLAMA = LLAMA | BYTES | WIDE | {"num_hidden_layers": 8, "head_dim": 64, "max_position_embeddings": 1024}
EXPERTS = {"n_routed_experts": 16, "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 512}
MAMBA = {"mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 64}
MID_HYBRID = NEMOTRON | BYTES | WIDE | EXPERTS | MAMBA | {"hybrid_override_pattern": "MEM*EMEM-E", "head_dim": 64}
MID = {"sequence_tokens": 256, "budget_tokens": 512, "tokens_per_step": 1024}
LONG = {"sequence_tokens": 1024, "budget_tokens": 2048, "tokens_per_step": 4096}
SHARDED = ParallelSettings(weights="shard")


def new(config: Config, **more: object) -> Callable[[Path], TrainSettings]:
    """Return what makes the settings of a new model's run in a folder."""
    return lambda folder: pretraining(folder, config, total=2, data=small_data(folder, **MID), **more)


def adapting(sizes: Mapping[str, int] = MID, **more: Any) -> Callable[[Path], lora.LoraRunSettings]:
    """Return what makes the settings of a run of adapters beside a checkpoint in a folder."""
    return lambda folder: lora.LoraRunSettings(
        out=folder / "run",
        model=str(folder / "base"),
        threads=1,
        data=small_data(folder, **sizes),
        schedule=Schedule(peak=1e-3, total=2),
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is planned, and made by so many processes. base: what adapters are made beside, and its dtype."""

    recipe: str = "pretrain"
    settings_in: Callable[[Path], TrainSettings]
    count: int = 1
    base: tuple[Config, torch.dtype] = (MID_LLAMA, torch.float32)

    def plan(self, folder: Path) -> RunPlan:
        return RECIPES[self.recipe].plan(self.settings_in(folder), self.count)


RUNS: Mapping[str, Run] = {
    "tiny": Run(settings_in=lambda folder: pretraining(folder, LLAMA, total=2)),
    "dense": Run(settings_in=new(MID_LLAMA)),
    "dense-bfloat16": Run(settings_in=new(MID_LLAMA, dtype="bfloat16")),
    "hybrid": Run(settings_in=new(MID_HYBRID)),
    "hybrid-bfloat16": Run(settings_in=new(MID_HYBRID, dtype="bfloat16")),
    "hybrid-muon": Run(settings_in=new(MID_HYBRID, optimizer=OptimizerSettings(matrices="muon"))),
    "hybrid-recompute": Run(settings_in=new(MID_HYBRID, recompute=True)),
    "adapter": Run(recipe="lora", settings_in=adapting()),
    "adapter-long": Run(recipe="lora", settings_in=adapting(LONG)),
    "adapter-packed-recompute": Run(
        recipe="lora",
        settings_in=adapting(dtype="bfloat16", recompute=True),
        base=(MID_LLAMA, torch.bfloat16),
    ),
    "adapter-experts-recompute": Run(
        recipe="lora", settings_in=adapting(recompute=True), base=(MID_HYBRID, torch.float32)
    ),
    "shard-of-two": Run(settings_in=new(MID_LLAMA, parallel=SHARDED), count=2),
    "tensor-of-two": Run(settings_in=new(MID_LLAMA, parallel=ParallelSettings(tensor=2)), count=2),
}

# Prints what memory the program took before the run, and the most that it took, kB.
MEASURED = """
import sys
from pathlib import Path
from freehold.parallel.processes import joined
from freehold.recipes.loop import NOBODY
from freehold.recipes.recipe import RECIPES
from freehold.settings import Settings
from recipes.test_plan import RUNS

def kilobytes(key):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key))

run = RUNS[sys.argv[1]]
settings, before = run.settings_in(Path(sys.argv[2])), kilobytes("VmRSS")
with joined(Settings().launch, settings.parallel.sizes) as processes:
    RECIPES[run.recipe].run(settings, NOBODY, processes)
print(before, kilobytes("VmHWM"))
"""


def measure(name: str, folder: Path) -> list[tuple[int, int]]:
    """Return the bytes that each process of a run took before it and at most."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = str(RUNS[name].count)
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURED, name, str(folder)],
            cwd=Path(__file__).parents[1],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RUNS[name].count)
    ]
    said = [child.communicate()[0].split() for child in children]
    assert [child.returncode for child in children] == [0] * len(children)
    return [(int(before) * 1024, int(most) * 1024) for before, most in said]


@pytest.mark.parametrize("name", RUNS)
def test_a_process_takes_what_its_plan_says(name, tmp_path):
    write_data(tmp_path, [{"text": "word " * 800}] * 8)
    config, dtype = RUNS[name].base
    if RUNS[name].recipe == "lora":
        write_folder(tmp_path / "base", config, dtype=dtype)
    planned = RUNS[name].plan(tmp_path).total_bytes
    for before, taken in measure(name, tmp_path):
        assert taken <= planned <= MOST * taken, f"planned {planned:,}, taken {taken:,}"
        added = f"planned {planned - PROGRAM_BYTES:,} beside the program, taken {taken - before:,}"
        assert planned - PROGRAM_BYTES >= LEAST_OF_LINES * (taken - before) or name == "tiny", added


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
    assert plain["backward"] < larger["backward"] < 2 * plain["backward"]  # a gradient is as large for any tokens


def test_one_of_several_processes_has_a_part_of_what_they_divide(tmp_path):
    write_data(tmp_path)

    def lines(num_processes: int | None = None, **parallel: object) -> dict[str, int]:
        plan = pretrain.plan(pretraining(tmp_path, MTP, parallel=ParallelSettings(**parallel)), num_processes)
        return {"processes": plan.num_processes} | {line.name: line.num_bytes for line in plan.lines}

    plain, two = lines(), lines(2)
    assert (plain["processes"], two["processes"]) == (1, 2)
    assert two.items() - {"processes": 2, "sums": two["sums"]}.items() <= plain.items()
    sharded, quarters = lines(weights="shard"), lines(8, weights="shard", copies=2)
    assert (sharded["processes"], quarters["processes"]) == (2, 8)
    for name in ("weights", "gradients", "moments"):
        assert 0.5 * plain[name] <= sharded[name] < 0.6 * plain[name]
        assert 0.25 * plain[name] <= quarters[name] < 0.35 * plain[name]
        assert lines(tensor=2)[name] < 0.6 * plain[name]
        assert lines(expert=2)[name] < plain[name]
    assert lines(tensor=2)["activations"] < plain["activations"]
    assert lines(context=2)["weights"] == plain["weights"]
    assert lines(tensor=2, expert=2, context=2)["processes"] == 8


def test_what_processes_cannot_share_is_refused_in_a_plan(tmp_path):
    write_data(tmp_path)
    write_folder(tmp_path / "base", LLAMA | BYTES)

    def plan(num_processes: int, **parallel: object) -> RunPlan:
        return pretrain.plan(pretraining(tmp_path, MTP, parallel=ParallelSettings(**parallel)), num_processes)

    with pytest.raises(BadInput, match="3 processes cannot be divided"):
        plan(3, tensor=2)
    with pytest.raises(BadInput, match="cannot be divided over 3 processes"):
        plan(3, tensor=3)
    with pytest.raises(BadInput, match="3 processes cannot hold 2 copies"):
        plan(3, weights="shard", copies=2)
    with pytest.raises(UnsupportedModel, match="have adapters"):
        lora.plan(replace(adapting()(tmp_path), parallel=ParallelSettings(tensor=2)))


def test_all_processes_of_a_machine_have_to_fit(tmp_path):
    write_data(tmp_path)
    plan = pretrain.plan(pretraining(tmp_path), 2)
    check_run(plan, torch.device("cpu"), Processes(num_here=2))
    with pytest.raises(BadInput, match=r"each of 2 processes takes .* GB of memory, 0\.0 are free"):
        check_run(plan, torch.device("cpu"), Processes(num_here=10**9))


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
