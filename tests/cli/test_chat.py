"""`freehold chat`: a conversation through pipes and through a terminal, stopped answers, and its commands."""

import io
import json
import os
import pty
import signal
import subprocess
import time

import pytest

from cli.commands import START_IN_TERMINAL, assert_refused, call, read_until, spawn
from cli.folders import TINY_LLAMA, write_folder
from freehold.cli.chat import _piped_lines
from freehold.cli.run import _read_stdin
from freehold.errors import BadRequest
from inputs import smollm2_gguf

# Between drawing its prompt and waiting for keys, readline keeps a Ctrl-C until the next key.
SETTLE_S = 0.5
STORY = "Write a very long story about a dragon.\n"
QUESTION = "What is the capital of France? Answer briefly.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny") / "model")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    saved = tmp_path / "talk.json"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with spawn("chat", smollm2_gguf(), "--max-tokens", 500, **pipes) as process:
        process.stdin.write(STORY)
        begun = read_until(process.stdout, " ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(f"{QUESTION}/save {saved}\n/exit\nnever read\n")
    assert process.returncode == 0, err
    assert "tokens/s, first after" in err
    assert "stopped]" in err
    assert "Paris" in out
    story, told, question, answer = json.loads(saved.read_text())["messages"]
    assert (story["content"], question["content"]) == (STORY.strip(), QUESTION.strip())
    assert told["role"] == "assistant"
    shown = begun + out.partition("\n")[0]
    # Ctrl-C may come between showing a piece and remembering it.
    assert shown.startswith(told["content"]) or told["content"].startswith(shown)
    assert out.endswith(f"\n{answer['content']}\n")


def test_a_terminal_gets_a_prompt_and_its_keys_work():
    ours, theirs = pty.openpty()
    model = smollm2_gguf()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with spawn("chat", model, "--max-tokens", 500, start=START_IN_TERMINAL, **terminal) as process:
        os.close(theirs)
        with open(ours, "r+b", buffering=0) as keys, open(os.dup(ours), encoding="utf-8", errors="replace") as screen:
            read_until(screen, "> ")
            time.sleep(SETTLE_S)
            keys.write(b"\x03")  # Ctrl-C at the prompt
            read_until(screen, "Ctrl-D or /exit leaves")
            keys.write(STORY.encode())
            read_until(screen, "Once")
            keys.write(b"\x03")
            assert "stopped]" in read_until(screen, "stopped]")
            keys.write(QUESTION.encode())
            assert "Paris" in read_until(screen, "tokens/s")
            read_until(screen, "> ")
            keys.write(b"\x04")  # Ctrl-D
            assert process.wait() == 0


def test_the_model_sees_the_conversation_and_its_commands_change_it(folder, tmp_path):
    saved = tmp_path / "talk.json"
    lines = f"one\n\n two \n/save {saved}\n/reset\n/system Be brief.\nthree\n/save {saved}\n/save {saved}2\n/wave\n"
    ended = call("chat", folder, "--max-tokens", 2, stdin=lines)
    assert ended.code == 0
    assert "BadInput: talk.json exists already" in ended.err
    assert "BadRequest: '/wave' is no command" in ended.err
    before, after = (json.loads(path.read_text())["messages"] for path in (saved, tmp_path / "talk.json2"))
    assert [m["role"] for m in before] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in before][::2] == ["one", "two"]
    assert [m["role"] for m in after] == ["system", "user", "assistant"]
    assert after[0]["content"] == "Be brief."


def test_a_message_that_does_not_fit_is_withdrawn_and_the_next_is_answered(folder, tmp_path):
    saved = tmp_path / "talk.json"
    ended = call("chat", folder, "--max-tokens", 2, stdin=f"{'word ' * 100}\nhi\n/save {saved}\n")
    assert "TooLong: the prompt has" in ended.err
    assert "cut after 0" not in ended.err
    assert "[2 tokens, " in ended.err
    assert [m["content"] for m in json.loads(saved.read_text())["messages"]][:1] == ["hi"]


def test_a_space_after_exit_still_leaves_and_save_wants_a_name(folder):
    ended = call("chat", folder, "--max-tokens", 2, stdin="/save\n/save \n/exit \nnever read\n")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err.count("BadRequest: /save wants the name of a file") == 2


@pytest.mark.parametrize("read", [_piped_lines, _read_stdin], ids=["chat", "run"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_utf_8_is_one_clear_line(read, errors, monkeypatch):
    """With surrogateescape, as Python reads stdin in the C locale."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    with pytest.raises(BadRequest, match="standard input is not UTF-8 text"):
        list(read())


def test_a_model_without_template_cannot_chat(tmp_path):
    folder = write_folder(tmp_path / "model", TINY_LLAMA, template=None)
    ended = call("chat", folder, stdin="hi\n")
    assert_refused(ended, "BadRequest")
    assert "freehold run" in ended.err
