"""Adapters as a recipe: only they learn, quantized bases stay as they are, and a stopped run goes on bit for bit."""

import pytest

from cli.folders import write_folder
from freehold.adapt.lora import MAX_RANK, LoraSettings
from freehold.checkpoint.source import open_adapter, open_source
from freehold.errors import BadInput, BadRequest
from freehold.recipes import lora
from freehold.recipes.loop import Watch
from freehold.recipes.metrics import read_metrics
from freehold.recipes.settings import ParallelSettings
from freehold.recipes.toml import read_settings, write_example, write_settings
from freehold.train.optim import OptimizerSettings
from freehold.train.schedule import Schedule
from freehold.train.step import Objective
from freehold.trust.identity import digest_files
from inputs import smollm2_gguf
from models.forms import on_threads
from models.tiny import LLAMA, NEMOTRON
from recipes.small import BYTES, small_data, write_data


@pytest.fixture(autouse=True)
def _threads():
    with on_threads(1):
        yield


def adapting(folder, base, *, total=6, **more):
    given = {
        "out": folder / "run",
        "threads": 1,
        "data": small_data(folder),
        "schedule": Schedule(peak=2e-2, total=total),
    }
    return lora.LoraRunSettings(model=str(base), **(given | more))


@pytest.mark.parametrize("config", [LLAMA, NEMOTRON], ids=["llama", "nemotron"])
def test_an_adapter_learns_beside_a_base_that_stays(config, tmp_path):
    base = write_folder(tmp_path / "base", config | BYTES)
    before = digest_files([base / "model.safetensors"])
    write_data(tmp_path)
    lora.run(adapting(tmp_path, base))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert digest_files([base / "model.safetensors"]) == before
    with open_adapter(tmp_path / "run" / "adapter") as saved:
        assert saved.header["freehold_base_sha256"] == before
        assert saved.metadata["peft_type"] == "LORA"


def test_a_save_holds_the_adapter_and_not_its_base_and_goes_on_with_the_same_bits(tmp_path):
    base = write_folder(tmp_path / "base", LLAMA | BYTES)
    write_data(tmp_path)
    lora.run(adapting(tmp_path, base, out=tmp_path / "straight", total=3))
    stopped = adapting(tmp_path, base, out=tmp_path / "stopped", total=3)
    lora.run(stopped, Watch(should_stop=lambda: True))
    lora.run(stopped)
    last = "step-00000003"
    for name in (
        f"{last}/weights.safetensors",
        f"{last}/state.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    with open_source(tmp_path / "stopped" / last / "weights.safetensors") as source:
        assert all("lora" in name for name in source.tensors)


def test_routers_and_mtp_are_not_trained_by_an_adapter(tmp_path):
    with pytest.raises(BadInput, match="are 0 for adapters"):
        adapting(tmp_path, tmp_path, objective=Objective())


def test_what_moves_no_adapter_is_refused(tmp_path):
    with pytest.raises(BadInput, match="adapters leave these as they are"):
        adapting(tmp_path, tmp_path, optimizer=OptimizerSettings(matrices="muon"))
    with pytest.raises(BadInput, match="adapters are not sharded"):
        adapting(tmp_path, tmp_path, parallel=ParallelSettings(weights="shard"))


def test_an_adapter_larger_than_any_memory_is_planned_without_being_made(tmp_path):
    write_folder(tmp_path / "base", LLAMA | BYTES)
    planned = lora.plan(adapting(tmp_path, tmp_path / "base", lora=LoraSettings(rank=MAX_RANK)))
    assert planned.total_bytes > 10**9
    with pytest.raises(BadRequest, match="more than any matrix has"):
        LoraSettings(rank=10**17)


def test_an_example_is_a_file_that_works():
    text = write_example(lora.LoraRunSettings)
    assert write_settings(read_settings(text, lora.LoraRunSettings)) == text


def test_the_plan_of_an_adapter_is_that_of_its_base_as_it_is_stored():
    text = write_example(lora.LoraRunSettings)
    plan = lora.plan(read_settings(text, lora.LoraRunSettings, changes=[f"model={smollm2_gguf()}"]))
    lines = {line.name: line.num_bytes for line in plan.lines}
    assert lines["base"] == pytest.approx(smollm2_gguf().stat().st_size, rel=0.15)
    assert lines["moments"] == 2 * lines["gradients"] < lines["base"]
