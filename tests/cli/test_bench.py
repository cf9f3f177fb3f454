"""`freehold bench`: a table, JSON and a picture of the same speeds; refusals; and Ctrl-C."""

import json
import os
import pty
import signal
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from cli.commands import START, assert_refused, call
from cli.folders import BYTES, write_folder
from evaluate.quick import measure_limits_quickly
from freehold.evaluate import speed
from freehold.ops.native import native_report
from models.tiny import LATENT

QUICK = ("--prompt", 8, "--depth", 0, "--depth", 20, "--batch", 1, "--batch", 3, "--rounds", 1)
NEVER = "\0"
SHOW_CURSOR, CLEAR_LINE = "\x1b[?25h", "\x1b[2K"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny") / "model", LATENT | BYTES)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    measure_limits_quickly(monkeypatch)
    monkeypatch.setattr(speed, "ROUND_S", 0.0)


def test_json_holds_each_case_beside_what_the_machine_can_do(folder):
    ended = call("bench", folder, *QUICK, "--threads", 1, "--json")
    assert (ended.code, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert (told["model"], told["family"], told["num_threads"]) == ("model", "nemotron", 1)
    assert (told["kernels"], told["num_rounds"]) == (native_report(), 1)
    assert set(told["held_bytes_by_format"]) == {"float32"}
    read, computed = told["limits"]["read_bytes_per_s"], told["limits"]["operations_per_s"]
    cases = told["cases"]
    assert [(case["phase"], case["depth"], case["prompt"], case["batch"]) for case in cases] == [
        ("prefill", 0, 8, 1),
        ("prefill", 20, 8, 1),
        ("decode", 0, 0, 1),
        ("decode", 0, 0, 3),
        ("decode", 20, 0, 1),
        ("decode", 20, 0, 3),
    ]
    for case in cases:
        assert case["tokens_per_s"] == pytest.approx((case["prompt"] or case["batch"]) / case["step_s"])
        assert case["bandwidth_share"] == pytest.approx(case["read_bytes"] * case["tokens_per_s"] / read)
        assert case["compute_share"] == pytest.approx(case["operations"] * case["tokens_per_s"] / computed)


def test_the_table_says_what_was_measured_and_on_what(folder):
    ended = call("bench", folder, *QUICK)
    assert (ended.code, ended.err) == (0, "")
    model, machine, _, header, *rows = ended.out.splitlines()
    assert model.startswith("model: nemotron, float32 ")
    assert "this machine reads " in machine
    assert machine.endswith("(float32)")
    assert header.split()[:4] == ["depth", "tokens/s", "ms/step", "read/token"]
    assert header.endswith("experts")
    assert [row.split("  ")[0] for row in rows] == ["prefill 8 tokens"] * 2 + ["decode, batch 1", "decode, batch 3"] * 2


def test_the_picture_is_a_new_svg_file_that_loads_nothing(folder, tmp_path):
    picture = tmp_path / "speed.svg"
    ended = call("bench", folder, *QUICK, "--picture", picture)
    assert (ended.code, ended.err) == (0, "")
    drawn = ElementTree.fromstring(picture.read_text())
    texts = "\n".join(element.text.replace("\xa0", " ") for element in drawn.iter(f"{SVG}text"))
    for row in ended.out.splitlines()[4:]:
        assert row.split("  ")[0] in texts
        assert row.split()[4] in texts  # tokens/s
    assert "█" in texts
    assert "://" not in picture.read_text().replace("http://www.w3.org/2000/svg", "")
    before = picture.read_text()
    assert_refused(call("bench", folder, *QUICK, "--picture", picture), "BadInput")
    assert picture.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["--depth", 250], "BadRequest", "a depth of 250"),
        (["--prompt", 257], "BadRequest", "a prompt of 257"),
        (["--batch", 10**15], "BadRequest", "a batch of 1,000,000,000,000,000"),
        (["--batch", 0], "BadUsage", "--batch"),
        (["--depth", -1], "BadUsage", "--depth"),
        (["--rounds", 0], "BadUsage", "--rounds"),
        (["--threads", 100_000], "BadUsage", "--threads"),
        (["--picture", "speed.png"], "BadInput", "speed.png: pictures are SVG files"),
        (["--picture", "no-such-folder/speed.svg"], "BadInput", "no-such-folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_what_cannot_be_measured_or_drawn_is_one_clear_line(folder, arguments, kind, says):
    ended = call("bench", folder, *arguments)
    assert_refused(ended, kind)
    assert says in ended.err


def test_an_unknown_model_is_refused_before_anything_is_loaded():
    assert_refused(call("bench", "no-such-model"), "NotFound")


def read_screen(screen, wanted):
    """Return what comes on a terminal until the wanted text has come, or nobody writes to it any more."""
    seen = ""
    try:
        while wanted not in seen and (char := screen.read(1)):
            seen += char
    except OSError:  # how Linux says that the other side is closed
        pass
    return seen


def test_ctrl_c_takes_the_bar_away_and_leaves_nothing(folder, tmp_path):
    picture = tmp_path / "speed.svg"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", START, "bench", folder, "--rounds", "100000", "--picture", picture]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as process,
        open(ours, encoding="utf-8") as screen,
    ):
        os.close(theirs)
        read_screen(screen, "batch 1, depth 0")
        process.send_signal(signal.SIGINT)
        rest = read_screen(screen, NEVER)
        assert process.wait(timeout=30) == 128 + signal.SIGINT, rest
        assert process.stdout.read() == ""
    assert "Traceback" not in rest
    assert SHOW_CURSOR in rest
    assert rest.endswith(CLEAR_LINE), repr(rest[-80:])
    assert list(tmp_path.iterdir()) == []
