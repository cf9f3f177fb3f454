"""`freehold run`: the answer on stdout, everything else on stderr, and the same ids as the witness."""

import json

import pytest
import torch

from cli.commands import call
from cli.folders import TINY_LLAMA, write_folder, write_nemotron
from freehold.text.tokenizer import Tokenizer
from inputs import qwen_coder_gguf, smollm2_gguf

QUESTION = "What is the capital of France? Answer briefly."
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("model", [smollm2_gguf, qwen_coder_gguf], ids=["smollm2", "qwen2.5-coder"])
def test_real_models_know_the_capital_of_france(model):
    ended = call("run", model(), QUESTION, "--dtype", "f32")
    assert (ended.code, ended.out, ended.err) == (0, f"{ANSWER}\n", "")


def test_json_holds_answer_cost_and_identity():
    ended = call("run", smollm2_gguf(), "-", "--json", stdin=QUESTION)
    answer = json.loads(ended.out)
    assert (answer["text"], answer["reasoning"], answer["tool_calls"]) == (ANSWER, "", [])
    assert answer["usage"]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["identity"]["weights"].startswith("b179c9523d0e6a0f")
    assert ended.err == ""


def test_a_tiny_hybrid_makes_the_same_noise_as_the_witness(tmp_path):
    witness = write_nemotron(tmp_path)
    tokenizer = Tokenizer.from_files(tmp_path)
    prompt = "Every kind of block, in a row."
    ids = tokenizer.encode(prompt)
    with torch.inference_mode():
        for _ in range(24):
            ids.append(int(witness(torch.tensor([ids])).logits[0, -1].argmax()))
    ended = call("run", tmp_path, prompt, "--raw", "--max-tokens", 24, "--json")
    assert ended.code == 0, ended
    assert json.loads(ended.out)["text"] == tokenizer.decode(ids[-24:])


def test_a_cut_answer_says_so_on_stderr(folder):
    ended = call("run", folder, "hi", "--max-tokens", 3)
    assert ended.code == 0
    assert ended.err == "[cut after 3 tokens: --max-tokens]\n"
    assert ended.out.endswith("\n")


def test_the_seed_alone_decides_the_draw(folder):
    def answer(*options):
        return call("run", folder, "hi", "--max-tokens", 12, "--temperature", 1, *options).out

    assert answer("--seed", 1) == answer("--seed", 1, "--threads", 2) != answer("--seed", 2)
    assert answer("--top-k", 1) == call("run", folder, "hi", "--max-tokens", 12).out


def test_the_template_makes_the_prompt_unless_it_is_raw(folder):
    def prompt_tokens(*options):
        return json.loads(call("run", folder, *options, "--max-tokens", 1, "--json").out)["usage"]["prompt_tokens"]

    assert prompt_tokens("hi", "--raw") == len("hi")
    assert prompt_tokens("hi") == len("user: hi\nassistant:")
    assert prompt_tokens("hi", "--system", "Be brief.") == len("system: Be brief.\nuser: hi\nassistant:")


def test_a_model_without_template_continues_the_prompt(tmp_path):
    folder = write_folder(tmp_path / "model", TINY_LLAMA, template=None)
    assert call("run", folder, "hi", "--max-tokens", 5).out == call("run", folder, "hi", "--raw", "--max-tokens", 5).out
