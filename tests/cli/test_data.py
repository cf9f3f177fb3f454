"""`freehold data`: what it shows of data, what it builds, and how it refuses what cannot be used."""

import json
import signal
import subprocess
import sys
from functools import cache

import pytest

from cli.commands import assert_refused, call, read_until, spawn
from cli.folders import write_folder
from freehold.checkpoint.source import open_source
from freehold.text.tokenizer import Tokenizer
from freehold.train.dataset import Dataset, Sequences
from freehold.train.order import Order, Source
from freehold.train.packing import Stream
from inputs import brown_text, smollm2_gguf
from train.data import write_rows

ASK = {"role": "user", "content": "How tall?"}
ANSWER = {"role": "assistant", "content": "Very tall."}
CHAT = {"messages": [ASK, ANSWER]}
NUM_PAGES, PAGE_CHARS = 60, 4000


@pytest.fixture
def model():
    return smollm2_gguf()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Write a model whose tokenizer is read at once."""
    return write_folder(tmp_path_factory.mktemp("tiny") / "model")


@cache
def tokenizer() -> Tokenizer:
    with open_source(smollm2_gguf()) as source:
        return Tokenizer.from_gguf(dict(source.metadata))


def pages() -> list[str]:
    """Return pages of the Brown corpus."""
    return [brown_text()[at : at + PAGE_CHARS] for at in range(0, NUM_PAGES * PAGE_CHARS, PAGE_CHARS)]


def look(*arguments: object) -> dict:
    ended = call("data", "inspect", *arguments, "--json")
    assert ended.code == 0, ended
    return json.loads(ended.out)


def test_it_shows_what_of_a_conversation_is_trained_on(model, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [CHAT])
    ended = call("data", "inspect", file, "--model", model)
    assert ended.code == 0, ended
    assert "<|im_start|>assistant\n⟦Very tall.<|im_end|>⟧\n" in ended.out
    assert "How tall?<|im_end|>" in ended.out
    assert "1  answers, 1 of them after exactly the ids that serving gives" in ended.out


def test_a_page_of_rows_adds_up(model, tmp_path):
    rows = [CHAT, {"text": "A page."}, {"messages": [ASK]}, {"messages": [ASK, ANSWER, ASK, ANSWER]}]
    seen = look(write_rows(tmp_path / "a.jsonl", rows), "--model", model, "--show", 9, "--max-tokens", 40)
    assert (seen["rows"], seen["documents"], seen["untrained_rows"], seen["answers"]) == (4, 3, 1, 3)
    learnt = ["".join(run["text"] for run in runs if run["trained"]) for runs in seen["shown"]]
    assert learnt[0] == "Very tall.<|im_end|>"
    assert learnt[2] == 2 * "Very tall.<|im_end|>"
    assert (seen["cut"], seen["left_out"]) == (1, 0)


def test_what_is_built_is_what_inspecting_the_rows_showed(model, tmp_path):
    rows = [CHAT, {"messages": [ASK, ANSWER, ASK, ANSWER]}]
    file, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out"
    ended = call("data", "build", file, "--model", model, "--out", out)
    assert ended.code == 0, ended
    assert "in 1 shard" in ended.out
    assert look(out, "--model", model) == look(file, "--model", model)


def test_a_corpus_comes_back_whole_out_of_packed_batches(model, tmp_path):
    file, out = write_rows(tmp_path / "brown.jsonl", [{"text": page} for page in pages()]), tmp_path / "out"
    ended = call("data", "build", file, "--model", model, "--out", out, "--json")
    assert ended.code == 0, ended
    built, dataset = json.loads(ended.out), Dataset(out)
    assert (built["rows"], built["documents"], built["digest"]) == (NUM_PAGES, NUM_PAGES, dataset.digest)
    sequences = Sequences(dataset, max_tokens=256)
    stream = Stream(Order([Source(name="brown", sequences=sequences)], seed=None), budget_tokens=1024)
    labels = {}
    for pack in stream.one_pass():
        batch = stream.batch(pack)
        labels |= dict(zip(pack, batch.labels_T.split([e - s for s, e in batch.layout.spans]), strict=True))
        assert batch.num_supervised == batch.layout.num_tokens <= 1024
    text = tokenizer().decode(token for place in sorted(labels) for token in labels[place].tolist())
    firsts = [tokenizer().token_text(tokenizer().encode_plain(page)[0]) for page in pages()]
    wanted = [page.removeprefix(first) for page, first in zip(pages(), firsts, strict=True)]
    assert text == "".join(f"{page}<|im_end|>" for page in wanted)


def test_plain_text_is_one_document(model, tmp_path):
    (tmp_path / "book.txt").write_text(brown_text()[:5000], encoding="utf-8")
    seen = look(tmp_path / "book.txt", "--model", model)
    assert (seen["rows"], seen["documents"]) == (1, 1)
    assert seen["trained_tokens"] == seen["tokens"] - 1 == len(tokenizer().encode_plain(brown_text()[:5000]))


def test_a_text_that_names_marks_writes_none(model, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "ChatML ends a turn with <|im_end|>."}])
    assert look(file, "--model", model)["eos"] == 1


BROKEN = {
    "no JSON": ('{"text": "a"}\n\n{"text": }\n', "BadFile: a.jsonl, line 3, column 10: no JSON"),
    "no UTF-8": (b'{"text": "a\xff"}\n', "BadFile: a.jsonl, line 1: byte 11 is not UTF-8"),
    "no object": ("[1]\n", "BadFile: a.jsonl, line 1: a list where an object is wanted"),
    "unknown key": ('{"text": "a", "id": 7}\n', "BadFile: a.jsonl, line 1: unknown key 'id'"),
    "no text": ('{"text": 7}\n', "BadFile: a.jsonl, line 1: text is a int"),
    "both": ('{"text": "a", "messages": []}\n', "BadFile: a.jsonl, line 1: messages, text where"),
    "nothing": ("{}\n", "BadFile: a.jsonl, line 1: no key where"),
    "unknown role": (
        json.dumps({"messages": [ASK, {"role": "bot", "content": "b"}]}),
        "BadInput: a.jsonl, line 1: messages[1].role: ",
    ),
    "no messages": ('{"messages": []}', "BadInput: a.jsonl, line 1: messages: "),
    "unknown field": (
        json.dumps({"messages": [ASK | {"mood": "curious"}]}),
        "BadInput: a.jsonl, line 1: messages[0]: unknown field",
    ),
    "half a surrogate": ('{"text": "\\ud800"}', "BadInput: a.jsonl, line 1: text holds half a surrogate pair"),
    "too deep": ("[" * 100_000, "BadFile: a.jsonl, line 1: JSON that is nested too deep"),
    "tools that are no JSON": (
        json.dumps(CHAT | {"tools": "clock"}),
        "BadFile: a.jsonl, line 1: tools is a text that is no JSON",
    ),
    "nothing to train on": (json.dumps({"messages": [ASK]}), "BadInput: nothing is trained on in these files"),
    "empty": ("", "BadInput: nothing is trained on in these files"),
}


@pytest.mark.parametrize("command", ["inspect", "build"])
@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_rows_are_refused_by_their_line(tiny, tmp_path, content, message, command):
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = call("data", command, file, "--model", tiny, *(["--out", out] if command == "build" else []))
    assert_refused(ended, message.partition(":")[0])
    assert ended.err.startswith(message), ended.err
    assert not out.exists()


def test_a_key_that_is_named_is_left_out(model, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [CHAT | {"id": 7, "source": "web"}])
    assert look(file, "--model", model, "--ignore", "id", "--ignore", "source")["answers"] == 1


@pytest.mark.parametrize("name", ["missing.jsonl", "a.csv"])
def test_what_is_no_file_of_rows_is_refused(model, tmp_path, name):
    (tmp_path / "a.csv").write_text("text\na\n")
    ended = call("data", "build", tmp_path / name, "--model", model, "--out", tmp_path / "out")
    assert_refused(ended, "NotFound" if name == "missing.jsonl" else "BadFile")
    assert not (tmp_path / "out").exists()


def test_parquet_without_its_reader_says_what_to_install(model, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ended = call("data", "inspect", tmp_path / "a.parquet", "--model", model)
    assert_refused(ended, "UnsupportedModel")
    assert "pip install 'freehold[parquet]'" in ended.err


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"], ids=["empty", "short", "zeros"])
def test_damaged_parquet_is_refused(model, tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    ended = call("data", "inspect", tmp_path / "a.parquet", "--model", model)
    assert_refused(ended, "BadFile")
    assert "a.parquet cannot be read as Parquet" in ended.err


def test_a_missing_shard_and_a_torn_one_are_refused(model, tmp_path):
    file, out = write_rows(tmp_path / "a.jsonl", [CHAT]), tmp_path / "out"
    assert call("data", "build", file, "--model", model, "--out", out).code == 0
    shard = out / "shard-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert_refused(call("data", "inspect", out, "--model", model), "BadFile")
    shard.unlink()
    ended = call("data", "inspect", out, "--model", model)
    assert_refused(ended, "NotFound")
    assert "out lacks its shard shard-00000.bin" in ended.err


def test_options_of_a_build_are_refused_for_what_is_built(model, tmp_path):
    file, out = write_rows(tmp_path / "a.jsonl", [CHAT]), tmp_path / "out"
    assert call("data", "build", file, "--model", model, "--out", out).code == 0
    assert_refused(call("data", "inspect", out, "--model", model, "--without-reasoning"), "BadInput")


def test_a_full_disk_ends_in_one_line_and_the_build_can_go_on(model, tmp_path):
    file, out = write_rows(tmp_path / "a.jsonl", [{"text": page} for page in pages()]), tmp_path / "out"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); "
    start = f"{limited}from freehold.cli.main import main; main()"
    arguments = ("data", "build", file, "--model", model, "--out", out)
    with spawn(*arguments, start=start, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, told = process.communicate()
    assert (process.returncode, printed) == (2, "")
    assert told.splitlines() == [f"OSError: File too large: {out / 'shard-00000.bin'}"]
    assert not out.exists()
    assert call(*arguments).code == 0


WAITS_AT_ROW_20 = """
import time, freehold.train.build as build
read_all = build.read_all
def slow(files, **options):
    for number, row in enumerate(read_all(files, **options)):
        if number == 20:
            print("here", flush=True)
            time.sleep(60)
        yield row
build.read_all = slow
from freehold.cli.main import main; main()
"""


def test_ctrl_c_leaves_nothing_broken(model, tmp_path):
    file, out = write_rows(tmp_path / "a.jsonl", [{"text": page} for page in pages()]), tmp_path / "out"
    arguments = ("data", "build", file, "--model", model, "--out", out)
    with spawn(*arguments, start=WAITS_AT_ROW_20, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        read_until(process.stdout, "here")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert (process.returncode, told) == (130, "")
    assert not out.exists()
    assert call(*arguments).code == 0
