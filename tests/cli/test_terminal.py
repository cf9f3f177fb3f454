"""What is written where, and what must not reach a terminal."""

import io
import sys

import pytest

from freehold.cli.numbers import bytes_text, count_text
from freehold.cli.progress import after_waiting, bytes_bar, steps_bar, waiting
from freehold.cli.report import exit_code_of, show_error
from freehold.cli.terminal import DIM, GREEN, PLAIN, AnswerWriter, show_marked, show_text
from freehold.errors import BadFile, CheckFailed
from freehold.text.answer import ReasoningPiece, TextPiece, ToolCallPiece

CLEAR_SCREEN = "\x1b[2J"


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_models_words_do_not_steer_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    show_text(f"a{CLEAR_SCREEN}\tb\x9b2J\r\n")
    assert screen.getvalue() == "a\ufffd[2J\tb\ufffd2J\ufffd\n"


def test_a_pipe_gets_the_answer_byte_for_byte(capsys):
    show_text(f"a{CLEAR_SCREEN}\r\n")
    assert capsys.readouterr().out == f"a{CLEAR_SCREEN}\r\n"


def test_marked_parts_are_green_on_a_terminal_and_steer_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    show_marked([("How", False), (f"So{CLEAR_SCREEN}", True)])
    assert screen.getvalue() == f"{DIM}How{PLAIN}{GREEN}So\ufffd[2J{PLAIN}"


def test_the_answer_goes_to_stdout_and_its_reasoning_to_stderr(capsys):
    writer = AnswerWriter()
    for piece in (ReasoningPiece(text="so "), ReasoningPiece(text="so"), TextPiece(text="Yes"), TextPiece(text=".")):
        writer.show(piece)
    writer.show(ToolCallPiece(id="1", name="look", arguments="{}"))
    writer.finish()
    written = capsys.readouterr()
    assert (written.out, written.err) == ("Yes.look({})\n", "so so\n\n")


def test_reasoning_that_is_cut_ends_its_line(capsys):
    writer = AnswerWriter()
    writer.show(ReasoningPiece(text="so"))
    writer.finish()
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", "so\n")


def test_an_error_is_one_line_and_a_hint(capsys):
    show_error("BadFile", f"two\nlines{CLEAR_SCREEN}", "look again")
    assert capsys.readouterr().err == "BadFile: two lines\ufffd[2J\nhint: look again\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(BadFile("x"), 2), (CheckFailed("x"), 1), (PermissionError(13, "Permission denied", "a.gguf"), 2)],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error, code, capsys):
    def command() -> None:
        raise error

    assert exit_code_of(command) == code
    assert capsys.readouterr().err.startswith(f"{type(error).__name__}: ")


def test_progress_is_drawn_for_people_only(monkeypatch):
    drawn = []
    for stream in (Screen(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with bytes_bar("Loading") as progress:
            progress(1, 2)
        with steps_bar("Checking") as step:
            step(1, 2, "twin")
        with waiting("Starting"):
            pass
        assert list(after_waiting("Reading", iter("abc"))) == ["a", "b", "c"]
        drawn.append(stream.getvalue())
    assert "Loading" in drawn[0]
    assert drawn[1] == ""


def test_numbers_have_three_digits():
    assert [bytes_text(n) for n in (0, 999, 1000, 98_362_432, 31 * 10**9)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "98.4 MB",
        "31.0 GB",
    ]
    assert [count_text(n) for n in (97, 134_515_008, 31_577_940_288)] == ["97", "135 M", "31.6 B"]
