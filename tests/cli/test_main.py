"""What holds for every command: quick help, exit codes, quiet ends, and documentation that cannot rot."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import freehold
from cli.commands import START, call, spawn
from freehold.cli import main as main_module
from freehold.cli.main import app
from freehold.cli.reference import render
from freehold.cli.report import exit_code_of

ROOT = Path(__file__).parent.parent.parent


def test_help_does_not_load_torch():
    code = "import sys; from freehold.cli.main import app; app(['--help'], standalone_mode=False)"
    code += "; sys.exit(any(name in sys.modules for name in ('torch', 'tokenizers', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "freehold fetch smollm2-135m-instruct" in done.stdout


def test_no_command_shows_the_help():
    assert call() == call("--help")


def test_version():
    assert call("--version").out == f"freehold {freehold.__version__}\n"


def test_a_reader_that_leaves_is_no_error_worth_words():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with spawn("fetch", stdout=write_end, stderr=subprocess.PIPE) as process:
        os.close(write_end)
        assert process.communicate()[1] == ""


def test_a_terminal_without_unicode_gets_question_marks(tmp_path):
    folder = tmp_path / "Modelle für alle"
    environment = {**os.environ, "FREEHOLD_MODELS": str(folder), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", START, "fetch"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Modelle f?r alle" in done.stdout


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch):
    def broken(text: str) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(main_module, "show_line", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main_module.main(["--version"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_a_memory_that_is_too_small_is_one_line(error, capsys):
    def fail() -> None:
        raise error

    assert exit_code_of(fail) == 2
    line, hint = capsys.readouterr().err.splitlines()
    assert line.startswith("OutOfMemory: ")
    assert "smaller dtype" in hint


def test_the_reference_is_the_same_in_every_terminal(monkeypatch):
    expected = render()
    for name, value in {"COLUMNS": "40", "TERM": "xterm-256color", "FORCE_COLOR": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert render() == expected
    assert "\x1b" not in expected


def test_every_option_has_a_sentence_in_the_design_opinions():
    opinions = (ROOT / "docs" / "design-opinions.md").read_text()
    options = {
        option
        for command in [typer.main.get_group(app), *typer.main.get_group(app).commands.values()]
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    assert {option for option in options if not re.search(rf"`{option}\b", opinions)} == set()


def test_every_command_teaches_by_example():
    for name, command in typer.main.get_group(app).commands.items():
        assert f"freehold {name} " in (command.help or "").partition("Examples:")[2], name
