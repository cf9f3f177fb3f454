"""Data sets on disk: what was written is what is read, torn and foreign shards are refused, stopped builds go on."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import BadFile, BadInput, FreeholdError, NotFound
from freehold.ops.loss import IGNORED
from freehold.train import build as build_module
from freehold.train.build import read_all
from freehold.train.chat_examples import Supervision
from freehold.train.dataset import MANIFEST, Dataset, Sequences
from freehold.train.tokenized import DocumentTokenizer
from train.data import build, chats, texts, write_rows
from train.tokenizers import template_of, tokenizer_of


@pytest.fixture
def rows(tmp_path):
    """Write a file of texts and one of conversations."""
    return [write_rows(tmp_path / "a.jsonl", texts(40)), write_rows(tmp_path / "b.jsonl", chats(30))]


def read_back(dataset: Dataset) -> list[tuple[list[int], list[bool]]]:
    """Return all documents as the shards have them."""
    documents = []
    for shard in dataset.shards:
        start = 0
        for end, first in zip(shard.ends.tolist(), shard.firsts.tolist(), strict=True):
            mask = shard.trained(start, end).tolist() if first else [False, *[True] * (end - start - 1)]
            documents.append((shard.ids(start, end).tolist(), mask))
            start = end
    return documents


def test_what_was_written_is_what_is_read(rows, tmp_path):
    dataset = build(rows, tmp_path / "out")
    converter = DocumentTokenizer(tokenizer_of("nemotron", tmp_path), template_of("nemotron"), Supervision())
    wanted = [document for row in read_all(rows) for document in converter.documents(row)[0]]
    assert len(dataset.shards) > 3
    assert read_back(dataset) == [(list(d.ids), list(d.trained)) for d in wanted]
    assert dataset.counts.documents == len(wanted)
    assert dataset.counts.tokens == sum(len(d.ids) for d in wanted)
    assert dataset.counts.trained_tokens == sum(sum(d.trained) for d in wanted)


def test_a_large_vocabulary_has_ids_of_four_bytes(tmp_path):
    from freehold.train.counts import Counts
    from freehold.train.shards import Shard, ShardWriter
    from freehold.train.tokenized import Document

    for vocab_size, id_bytes in ((1 << 16, 2), ((1 << 16) + 1, 4)):
        writer = ShardWriter(vocab_size)
        writer.add([Document(ids=(0, vocab_size - 1), trained=(False, True))], Counts(rows=1))
        assert writer.write(tmp_path / "shard.bin", plan="").id_bytes == id_bytes
        assert Shard(tmp_path / "shard.bin").ids(0, 2).tolist() == [0, vocab_size - 1]


def test_each_token_but_the_first_of_a_text_is_a_label_once(rows, tmp_path):
    dataset = build(rows[:1], tmp_path / "out")
    sequences = Sequences(dataset, max_tokens=7)
    labels = torch.cat([sequences.example(number).labels_L for number in range(len(sequences))]).tolist()
    assert labels == [token for ids, _ in read_back(dataset) for token in ids[1:]]
    assert max(map(sequences.length, range(len(sequences)))) == sequences.longest == 7
    assert sequences.num_tokens == sum(map(sequences.length, range(len(sequences))))


def test_labels_of_a_conversation_are_those_of_its_mask(rows, tmp_path):
    dataset = build(rows[1:], tmp_path / "out")
    sequences = Sequences(dataset, max_tokens=1000)
    assert sequences.longest == max(len(ids) - 1 for ids, _ in read_back(dataset)) < 1000
    for number, (ids, trained) in enumerate(read_back(dataset)):
        example = sequences.example(number)
        assert example.tokens_L.tolist() == ids[:-1]
        wanted = [token if mask else IGNORED for token, mask in zip(ids, trained, strict=True)]
        assert example.labels_L.tolist() == wanted[1:]


def test_conversations_that_are_cut_or_lose_their_answers_are_counted(rows, tmp_path):
    dataset = build(rows[1:], tmp_path / "out")
    documents, limit = read_back(dataset), 60
    sequences = Sequences(dataset, max_tokens=limit)
    left_out = sum(not any(trained[: limit + 1]) for _, trained in documents)
    cut = sum(len(ids) - 1 > limit and any(trained[: limit + 1]) for ids, trained in documents)
    assert (sequences.num_left_out, sequences.num_cut) == (left_out, cut)
    assert min(left_out, cut) > 0
    assert len(sequences) == len(documents) - left_out
    assert sequences.longest == max(map(sequences.length, range(len(sequences)))) == limit
    for number in range(len(sequences)):
        assert (sequences.example(number).labels_L != IGNORED).any()


def test_sequences_too_short_for_any_answer_are_refused(rows, tmp_path):
    dataset = build(rows[1:], tmp_path / "out")
    with pytest.raises(BadInput, match="nothing is trained on in sequences of 3 tokens"):
        Sequences(dataset, max_tokens=3)


def test_rows_without_anything_to_train_on_are_counted(tmp_path):
    rows = [{"text": ""}, {"text": "a"}, {"messages": [{"role": "user", "content": "?"}]}, {"text": ""}]
    dataset = build([write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "out")
    assert (dataset.counts.rows, dataset.counts.untrained_rows, dataset.counts.documents) == (4, 3, 1)


def test_rows_of_which_none_is_trained_on_are_an_error(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "?"}]}] * 3)
    with pytest.raises(BadInput, match="nothing is trained on"):
        build([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_build_gives_the_same_bytes_each_time(rows, tmp_path):
    first, second = (build(rows, tmp_path / name) for name in ("first", "second"))
    contents = [{file.name: file.read_bytes() for file in (tmp_path / d.name).iterdir()} for d in (first, second)]
    assert contents[0] == contents[1]
    assert first.digest == second.digest


@pytest.mark.parametrize("num_left", [0, 1, 3])
def test_a_stopped_build_goes_on_after_its_last_whole_shard(rows, tmp_path, num_left, monkeypatch):
    whole = build(rows, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop_later(files, **options):
        for number, row in enumerate(read_all(files, **options)):
            if number == sum(shard.header.counts.rows for shard in whole.shards[:num_left]) + 3:
                raise Stopped
            yield row

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "read_all", stop_later)
        with pytest.raises(Stopped):
            build(rows, tmp_path / "out")
    left = sorted((tmp_path / "out").iterdir()) if num_left else []
    assert len(left) == num_left
    kept = [file.stat().st_ino for file in left]
    with pytest.raises(NotFound, match="not built to its end" if num_left else "no folder out"):
        Dataset(tmp_path / "out")
    assert build(rows, tmp_path / "out").digest == whole.digest
    assert [file.stat().st_ino for file in left] == kept


def test_a_killed_build_leaves_whole_shards_only(rows, tmp_path):
    code = (
        "import sys; from pathlib import Path; from train.data import build\n"
        "def progress(done, total):\n"
        "    if len(list(Path(sys.argv[3]).glob('shard*'))) == 2: print('now', flush=True); sys.stdin.read()\n"
        "build([Path(sys.argv[1]), Path(sys.argv[2])], Path(sys.argv[3]), progress=progress)"
    )
    command = [sys.executable, "-c", code, *map(str, rows), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": "tests"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert build(rows, tmp_path / "out").digest == build(rows, tmp_path / "whole").digest


def test_shards_of_another_build_are_refused(rows, tmp_path):
    build(rows, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(BadInput, match="shards of another build"):
        build(rows[:1], tmp_path / "out")


def test_a_folder_with_other_files_is_refused(rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"other files than shards, first thesis.txt"):
        build(rows, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_data_set_is_not_overwritten(rows, tmp_path):
    build(rows, tmp_path / "out")
    with pytest.raises(BadInput, match="holds a data set already"):
        build(rows, tmp_path / "out")


@pytest.mark.parametrize("num_bytes", [0, 4, 30, 200, -1])
def test_a_torn_shard_is_refused(rows, tmp_path, num_bytes):
    build(rows, tmp_path / "out")
    file = tmp_path / "out" / "shard-00001.bin"
    os.truncate(file, num_bytes if num_bytes >= 0 else file.stat().st_size - 1)
    with pytest.raises(BadFile, match=r"shard-00001.bin.*(torn|empty)"):
        Dataset(tmp_path / "out")


def test_a_changed_byte_is_found_by_its_digest(rows, tmp_path):
    build(rows, tmp_path / "out")
    file = tmp_path / "out" / "shard-00002.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    shards = Dataset(tmp_path / "out").shards
    shards[1].verify()
    with pytest.raises(BadFile, match=r"shard-00002.bin: its digest"):
        shards[2].verify()


@given(place=st.integers(0, 2000), value=st.integers(0, 255))
def test_any_other_byte_in_a_shard_is_refused_or_changes_no_token(small, place, value):
    dataset, folder = small
    file = folder / "shard-00000.bin"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        with suppress(BadFile):
            changed = Dataset(folder)
            changed.shards[0].verify()
            assert read_back(changed) == read_back(dataset)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("count", ["many", None, 1.5, True])
def test_counts_that_are_no_numbers_are_refused(count, tmp_path):
    build([write_rows(tmp_path / "a.jsonl", texts(3))], tmp_path / "out")
    file = tmp_path / "out" / "shard-00000.bin"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header | {"counts": header["counts"] | {"rows": count}}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(BadFile, match="its header is damaged"):
        Dataset(tmp_path / "out")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Build a data set of one shard."""
    folder = tmp_path_factory.mktemp("small")
    dataset = build([write_rows(folder / "a.jsonl", [*chats(3), *texts(3)])], folder / "out", tokens_per_shard=10_000)
    return dataset, folder / "out"


def test_a_missing_shard_is_named(rows, tmp_path):
    build(rows, tmp_path / "out")
    (tmp_path / "out" / "shard-00001.bin").unlink()
    with pytest.raises(NotFound, match=r"out lacks its shard shard-00001.bin"):
        Dataset(tmp_path / "out")


def test_a_shard_of_another_data_set_is_refused(rows, tmp_path):
    build(rows, tmp_path / "out")
    build(rows[:1], tmp_path / "other")
    os.replace(tmp_path / "other" / "shard-00000.bin", tmp_path / "out" / "shard-00000.bin")
    with pytest.raises(BadFile, match=r"shard-00000.bin belongs to another data set"):
        Dataset(tmp_path / "out")


DAMAGES = {
    "empty": lambda text: "",
    "cut short": lambda text: text[:-20],
    "no object": lambda text: "[]",
    "no plan": lambda text: '{"plan": {}, "shards": {}}',
    "a later version": lambda text: text.replace("freehold data 1", "freehold data 2"),
    "an unknown key": lambda text: text.replace('"reasoning"', '"mood"'),
    "no shards": lambda text: json.dumps(json.loads(text) | {"shards": {}}),
    "shards as a list": lambda text: json.dumps(json.loads(text) | {"shards": ["shard-00000.bin"]}),
    "a shard elsewhere": lambda text: text.replace("shard-00001", "../shard-00001"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_is_refused(rows, tmp_path, damage):
    build(rows, tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_text(damage(manifest.read_text()))
    with pytest.raises(BadFile, match="damaged, or another version"):
        Dataset(tmp_path / "out")


def test_a_full_disk_ends_in_an_error_that_names_the_shard(rows, tmp_path):
    whole = build(rows, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(OSError, match=r"shard-00000.bin"):
            build(rows, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert build(rows, tmp_path / "out").digest == whole.digest


def test_another_tokenizer_or_template_is_refused(rows, tmp_path):
    tokenizer, template = tokenizer_of("nemotron", tmp_path), template_of("nemotron")
    chat, text = build(rows, tmp_path / "chat"), build(rows[:1], tmp_path / "text")
    chat.check_model(tokenizer, template)
    with pytest.raises(BadInput, match="another chat template"):
        chat.check_model(tokenizer, None)
    text.check_model(tokenizer, None)
    with pytest.raises(BadInput, match="another model's tokenizer"):
        text.check_model(tokenizer_of("qwen", tmp_path), template)


def test_parquet_gives_what_jsonl_gives(tmp_path):
    call = {"function": {"name": "clock", "arguments": json.dumps({"zone": "UTC"})}}
    tools = json.dumps([{"type": "function", "function": {"name": "clock", "parameters": {}}}])
    called = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [{"messages": called, "tools": tools}, *chats(300)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    first, second = build([write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "1"), build([file], tmp_path / "2")
    assert read_back(first) == read_back(second)
    assert len(read_back(first)) == 301


def test_arguments_as_a_struct_are_refused_in_parquet(tmp_path):
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(BadFile, match=r"a.parquet, row 1: function.arguments is a dict"):
        build([tmp_path / "a.parquet"], tmp_path / "out")


@pytest.mark.parametrize(
    "messages", [5, "text", [1], [{"role": "assistant", "tool_calls": 5}], [{"tool_calls": [{"function": "clock"}]}]]
)
def test_columns_that_are_no_conversation_are_refused_in_parquet(messages, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    with pytest.raises(FreeholdError, match=r"a\.parquet, row 1: "):
        build([tmp_path / "a.parquet"], tmp_path / "out")
