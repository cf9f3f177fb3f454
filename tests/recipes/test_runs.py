"""Whole runs: every family learns, the result is a checkpoint, and what decides a run cannot change in its middle."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest

import freehold
from cli.folders import write_folder
from freehold.checkpoint.load import open_described
from freehold.checkpoint.text_side import load_text_side
from freehold.errors import BadFile, BadInput, UnsupportedModel
from freehold.recipes import lora, pretrain, sft
from freehold.recipes.loop import Watch
from freehold.recipes.metrics import read_metrics
from freehold.recipes.settings import DataSettings
from freehold.train.build import build_dataset
from freehold.train.chat_examples import Supervision
from freehold.train.schedule import Schedule
from freehold.train.step import Objective
from inputs import smollm2_gguf
from models.forms import on_threads
from models.tiny import LATENT, LLAMA, MTP, NEMOTRON, QWEN
from recipes.small import BYTES, TEXTS, pretraining, small_data, write_data
from train.data import write_rows

FAMILIES = {"llama": LLAMA, "qwen": QWEN, "nemotron": NEMOTRON, "latent": LATENT, "mtp": MTP}


@pytest.fixture(autouse=True)
def _threads():
    with on_threads(1):
        yield


def losses(folder):
    return [line["loss"] for line in read_metrics(folder)]


def unhurried(folder):
    """Return the lines of a run without what the clock says."""
    return [line | {"seconds": None} for line in read_metrics(folder)]


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_new_model_of_every_family_learns_and_is_a_checkpoint_at_the_end(config, tmp_path):
    write_data(tmp_path)
    outcome = pretrain.run(pretraining(tmp_path, config, total=8))
    assert (outcome.step, outcome.num_taken, outcome.is_done) == (8, 8, True)
    seen = losses(tmp_path / "run")
    assert seen[0] == pytest.approx(math.log(256), rel=0.05)  # knows nothing of 256 bytes
    assert seen[-1] < seen[0] - 1.0
    model = freehold.load(tmp_path / "run" / "model", dtype="float32")
    assert model.tokenizer.vocab_size == 256
    list(model.stream("1 green", max_tokens=4))


@pytest.mark.parametrize("options", [{"recompute": True}, {"dtype": "bfloat16"}], ids=str)
def test_a_run_learns_with(options, tmp_path):
    write_data(tmp_path)
    pretrain.run(pretraining(tmp_path, NEMOTRON, total=6, **options))
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0] - 0.5


def test_a_checkpoint_goes_on_learning_and_stays_what_it_was(tmp_path):
    base = write_folder(tmp_path / "base", LLAMA | BYTES)
    write_data(tmp_path)
    settings = sft.SftSettings(
        out=tmp_path / "run",
        model=str(base),
        threads=1,
        data=small_data(tmp_path),
        schedule=Schedule(peak=1e-2, total=6),
    )
    before = (base / "model.safetensors").read_bytes()
    # texts alone: the tokenizer is the same, and no template is asked for
    sft.run(settings)
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]
    assert (base / "model.safetensors").read_bytes() == before
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == (
        base / "chat_template.jinja"
    ).read_text()


def test_held_out_data_is_measured_and_changes_nothing(tmp_path):
    write_data(tmp_path)
    write_data(tmp_path, TEXTS[:2], name="other")
    plain = pretraining(tmp_path, out=tmp_path / "plain")
    pretrain.run(plain)
    data = small_data(tmp_path, held_out=(tmp_path / "other",))
    pretrain.run(replace(plain, data=data, out=tmp_path / "run", evaluate_every=2))
    measured = [line.pop("held_out_loss") for line in unhurried(tmp_path / "run")]
    assert [loss is not None for loss in measured] == [False, True, False, True]
    assert measured[3] < measured[1]
    state = "step-00000004/weights.safetensors"
    assert (tmp_path / "run" / state).read_bytes() == (tmp_path / "plain" / state).read_bytes()


def test_what_is_trained_on_cannot_be_held_out(tmp_path):
    write_data(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "data")
    for same in (tmp_path / "data", tmp_path / "data" / ".." / "data", tmp_path / "other"):
        data = small_data(tmp_path, held_out=(same,))
        with pytest.raises(BadInput, match="trained on and held out"):
            pretrain.run(pretraining(tmp_path, data=data))


def test_a_run_that_is_stopped_goes_on_as_the_run_that_never_was(tmp_path):
    write_data(tmp_path)
    straight = pretraining(tmp_path, MTP, out=tmp_path / "straight")
    pretrain.run(straight)
    stopped = replace(straight, out=tmp_path / "stopped")
    first = pretrain.run(stopped, Watch(should_stop=lambda: True))
    assert (first.step, first.is_done) == (1, False)
    assert not (tmp_path / "stopped" / "model").exists()
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:  # of a step that was not saved, and half a line
        file.write(json.dumps({"step": 2}) + '\n{"step": 3, "lo')
    notes = []
    second = pretrain.run(stopped, Watch(note=notes.append))
    assert (second.step, second.num_taken) == (4, 3)
    assert notes == ["goes on after step 1"]
    assert unhurried(tmp_path / "stopped") == unhurried(tmp_path / "straight")
    for name in ("step-00000004/weights.safetensors", "step-00000004/state.safetensors", "model/model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


CHANGES = {
    "seed": {"seed": 1},
    "objective": {"objective": Objective(mtp_depths=1)},
    "schedule": {"schedule": Schedule(peak=1e-2, total=5)},
    "config": {"model": LLAMA | BYTES | {"rope_theta": 5e3}},
}


@pytest.mark.parametrize(("key", "change"), CHANGES.items(), ids=CHANGES)
def test_a_run_does_not_go_on_with_something_else(key, change, tmp_path):
    write_data(tmp_path)
    settings = pretraining(tmp_path)
    pretrain.run(settings, Watch(should_stop=lambda: True))
    with pytest.raises(BadInput, match=rf"the run began with {key} |the data is not what the run began with"):
        pretrain.run(replace(settings, **change))


def test_a_run_does_not_go_on_with_other_data_but_data_may_move(tmp_path):
    write_data(tmp_path)
    write_data(tmp_path, TEXTS[:5], name="other")
    settings = pretraining(tmp_path)
    pretrain.run(settings, Watch(should_stop=lambda: True))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match="the data is not what the run began with"):
        pretrain.run(replace(settings, data=small_data(tmp_path, train=(tmp_path / "other",))))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = replace(settings, data=small_data(tmp_path, train=(tmp_path / "moved",)), save_every=1)
    assert pretrain.run(moved).is_done


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    write_data(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="run holds something else than a run"):
        pretrain.run(pretraining(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_damaged_metrics_are_told_and_not_repaired(tmp_path):
    write_data(tmp_path)
    settings = pretraining(tmp_path)
    pretrain.run(settings, Watch(should_stop=lambda: True))
    for damaged in (b"nonsense\n", b"[1]\n", b'{"step": "one"}\n', b'{"step": null}\n', b"\xff\xfe\n"):
        (tmp_path / "run" / "metrics.jsonl").write_bytes(damaged)
        with pytest.raises(BadFile, match=r"metrics\.jsonl, line 1 is damaged"):
            pretrain.run(settings)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    write_data(tmp_path)
    with pytest.raises(BadInput, match=r"`model\.vocab_size` is 97, the tokenizer has 256 ids"):
        pretrain.run(pretraining(tmp_path, model=LLAMA))


def test_tensorboard_is_written_where_it_is_wanted_and_refused_where_it_cannot(tmp_path, monkeypatch):
    write_data(tmp_path)
    pretrain.run(pretraining(tmp_path, tensorboard=True, out=tmp_path / "watched"))
    (events,) = (tmp_path / "watched" / "tensorboard").iterdir()
    assert b"gradient_norm" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UnsupportedModel, match="tensorboardX is not installed"):
        pretrain.run(pretraining(tmp_path, tensorboard=True))


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "lora"])
def test_a_sequence_that_is_longer_than_the_models_context_is_refused_before_the_first_step(recipe, tmp_path):
    write_data(tmp_path)  # texts of 85 tokens and less, in sequences of 64
    write_data(tmp_path, [{"text": "Short."}], name="short")

    def run(context: int, **more) -> int:
        config, name = LLAMA | BYTES | {"max_position_embeddings": context}, f"{context}{len(more)}"
        given = pretraining(tmp_path, config, out=tmp_path / name, total=1, data=small_data(tmp_path, **more))
        if recipe == "pretrain":
            return pretrain.run(given).step
        settings = {"sft": sft.SftSettings, "lora": lora.LoraRunSettings}[recipe]
        base = write_folder(tmp_path / f"base-{name}", config)
        same = {key: getattr(given, key) for key in ("out", "threads", "data", "schedule")}
        return {"sft": sft.run, "lora": lora.run}[recipe](settings(model=str(base), **same)).step

    with pytest.raises(BadInput, match="data has sequences of 64 tokens, the model's context is 63"):
        run(63)
    assert run(64) == 1
    short = {"train": (tmp_path / "short",)}
    assert run(32, **short) == 1  # what counts is how long sequences are, not how long they may be
    with pytest.raises(BadInput, match="data has sequences of 64 tokens, the model's context is 32"):
        run(32, **short, held_out=(tmp_path / "data",))


QUESTION = "What is the capital of the Moon?"
SAYING = "The Moon has no capital, but its mayor is called Selene Quartz."


def build_chat(folder, question, answer):
    """Build a data set of one conversation for SmolLM2."""
    source, described = open_described(smollm2_gguf())
    with source:
        text = load_text_side(source, described)
    assert text.tokenizer is not None
    chat = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    file = write_rows(folder / "chats.jsonl", [chat])
    build_dataset([file], folder / "chats", tokenizer=text.tokenizer, template=text.template, supervision=Supervision())


def test_a_real_model_learns_a_conversation(tmp_path):
    build_chat(tmp_path, QUESTION, SAYING)
    settings = sft.SftSettings(
        out=tmp_path / "run",
        model=str(smollm2_gguf()),
        data=DataSettings(train=(tmp_path / "chats",), sequence_tokens=128, budget_tokens=128, tokens_per_step=128),
        schedule=Schedule(peak=1e-4, total=3),
    )
    sft.run(settings)
    first, _, last = losses(tmp_path / "run")
    assert last < first - 0.5


def test_conversations_without_an_answer_in_reach_are_refused_before_the_first_step(tmp_path):
    build_chat(tmp_path, "why " * 100, "So.")
    data = DataSettings(train=(tmp_path / "chats",), sequence_tokens=64, budget_tokens=64, tokens_per_step=64)
    with pytest.raises(BadInput, match="nothing is trained on in sequences of 64 tokens"):
        sft.run(sft.SftSettings(out=tmp_path / "run", model=str(smollm2_gguf()), data=data))
