"""freehold-pico, the model that comes with Freehold: small enough, whole, and it speaks in its own small way."""

import re
import signal
import subprocess

import httpx
import pytest

import freehold
from cli.commands import TIMEOUT_S, call, spawn
from freehold.checkpoint.fetch import shipped
from freehold.engine.model import Model
from freehold.evaluate.laws import check_laws
from freehold.models.spec import AttentionSpec, Mamba2Spec, MoeSpec

FOLDER = shipped()["freehold-pico"]
WHEEL_BYTES = 25_000_000


@pytest.fixture(scope="module")
def pico() -> Model:
    return freehold.load("freehold-pico")


def asked(pico: Model, question: str, *, temperature: float = 0.0, seed: int = 0):
    return pico.chat([{"role": "user", "content": question}], max_tokens=300, temperature=temperature, seed=seed)


def test_it_is_small_enough_for_a_wheel():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= WHEEL_BYTES


def test_it_is_a_nemotron_with_every_kind_of_its_blocks(pico):
    spec = pico.decoder.spec
    assert {type(block) for block in spec.blocks} == {Mamba2Spec, AttentionSpec, MoeSpec}
    assert spec.mtp is not None
    assert (pico.described.family.name, pico.text.dialect.name) == ("nemotron", "nemotron")


def test_every_law_holds_on_it(pico):
    names = pico.described.family.tensor_names(pico.decoder.spec, ())
    assert [f"{f.law}: {f.detail}" for f in check_laws(pico.decoder, names, seed=0) if not f.holds] == []


def test_it_says_who_it_is_and_greets(pico):
    assert "freehold-pico" in asked(pico, "Who are you?").text
    assert asked(pico, "Hello!").text.startswith(("Hello", "Hi"))


def test_it_says_what_common_things_are_and_what_it_does_not_know(pico):
    assert "grass" in asked(pico, "What does a cow eat?").text
    assert "do not know" in asked(pico, "What is the capital of France?").text


@pytest.mark.parametrize("seed", range(4))
def test_it_tells_stories_of_whole_sentences_that_come_to_an_end(pico, seed):
    told = asked(pico, "Tell me a story about a fox.", temperature=0.7, seed=seed)
    assert told.usage.finish_reason == "stop"
    assert "fox" in told.text
    sentences = re.findall(r"[A-Z\"][^.!?]*[.!?]+\"?", told.text)
    assert len(sentences) >= 5
    assert len(set(sentences)) == len(sentences)  # it does not go round in circles
    assert told.text[-1] in '.!?"'
    assert told.text.isascii()


def test_a_server_without_a_model_serves_it():
    with spawn("serve", "--port", 0, "--memory", 1.5, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"model": "freehold-pico", "messages": [{"role": "user", "content": "Who are you?"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S).json()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert "freehold-pico" in answer["choices"][0]["message"]["content"]


def test_a_command_runs_it_by_its_name_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEHOLD_MODELS", str(tmp_path / "models"))
    ended = call("run", "freehold-pico", "Who are you?")
    assert (ended.code, "freehold-pico" in ended.out) == (0, True)
    assert not (tmp_path / "models").exists()
