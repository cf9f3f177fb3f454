"""`python -O` drops every `assert`, so none stands between what comes from outside and what it must not do.

Guards against CVE-2026-41523 (vLLM: whether a model's code may run was asked by `assert`).

Checks of what a user gives raise the project's own errors; an `assert` states what only we can have got wrong. Those in
the rooms where data from outside arrives are listed here, so that a new one is looked at by somebody who asks: can a
file, a request or a command line make this false? The museum's server (witness.py) runs under -O.
"""

import ast
import json
import subprocess
import sys

from cli.folders import write_folder
from sources import folder_of, nodes

OUTSIDE = {"serve", "text", "checkpoint", "quantize", "cli"}
# What each says, by file. They are true of all that passed the checks before them, whatever was given.
OURS = {
    "checkpoint/fetch.py": {"source.pop('kind') == 'wheel'", "pip.stdout is not None", "len(wheels) == 1"},
    "checkpoint/load.py": {"not match.rule.is_stack"},
    "checkpoint/rules.py": {"{rule.parameter for rule in names.rules} == set(parameters)"},
    "quantize/gguf_blocks.py": {
        "shape[-1] % self.num_values == 0",
        "data.numel() == block.bytes_of_shape(shape)",
        "(out.is_contiguous(), tuple(out.shape)) == (True, tuple(shape))",
    },
    "serve/anthropic.py": {"delta.usage is not None"},
    "serve/openai_chat.py": {"score.logprob is not None"},
    "serve/responses.py": {"delta.usage is not None"},
    "text/dialect.py": {"family in DIALECTS"},
    "text/grammar.py": {"origin", "asking", "replies"},
    "text/sandbox.py": {"origin", "child.stdin", "child.stdout"},
}

# Loads what it is told to, and says what came of it.
PROGRAM = """
import json, sys
from pathlib import Path
from freehold.checkpoint.load import load_decoder, open_described
from freehold.engine.request import SamplingParams
from freehold.errors import FreeholdError
from freehold.text.chat import ChatTemplate

def outcome(act):
    try:
        act()
    except FreeholdError as error:
        return str(error)
    return "nothing was wrong"

def opened(path):
    source, described = open_described(Path(path))
    source.close()

acts = [lambda path=path: opened(path) for path in sys.argv[1:]]
acts += [lambda: SamplingParams(temperature=-1.0), lambda: SamplingParams(stop=("",))]
acts += [lambda: ChatTemplate("{{ 1 }}").render([{"role": "root", "content": "x"}])]
acts += [lambda: ChatTemplate("{{ x.y.z }}").render([{"role": "user", "content": "x"}])]
print(json.dumps([__debug__, *map(outcome, acts)]))
"""


def test_every_assert_where_data_comes_in_has_been_looked_at():
    found: dict[str, set[str]] = {}
    for file, node in nodes(ast.Assert):
        if folder_of(file) in OUTSIDE:
            found.setdefault(file, set()).add(ast.unparse(node.test))
    new = {file: tests - OURS.get(file, set()) for file, tests in found.items()}
    assert {file: tests for file, tests in new.items() if tests} == {}


def test_files_and_values_are_refused_in_the_same_words_without_asserts(tmp_path):
    whole = write_folder(tmp_path / "whole")
    damaged = []
    for name, change in {
        "short": lambda data: data[:-5],
        "long": lambda data: data + b"xxxxx",
        "header": lambda data: b"\xff" * 8 + data[8:],
        "no-json": lambda data: data[:9] + b"x" + data[10:],
        "empty": lambda data: b"",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in whole.iterdir():
            data = file.read_bytes()
            (folder / file.name).write_bytes(change(data) if file.suffix == ".safetensors" else data)
        damaged.append(folder)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    given = [str(path) for path in (whole, *damaged, tmp_path / "x.gguf", tmp_path / "none")]
    plain, bare = (
        json.loads(
            subprocess.run([sys.executable, *flags, "-c", PROGRAM, *given], stdout=subprocess.PIPE, check=True).stdout
        )
        for flags in ([], ["-O"])
    )
    assert (plain[0], bare[0]) == (True, False)
    assert plain[1:] == bare[1:]
    assert plain[1] == "nothing was wrong"
    assert "nothing was wrong" not in plain[2:]
