"""Any bytes give tensors that lie within the file, or an error of ours in one line; nothing else, and no large memory.

tests/corpus holds small inputs that each reach one check; they are replayed as they are, and a find of the fuzzer joins
them.
"""

import json
import struct
import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.builders import key, raw_gguf, raw_safetensors, safetensors_bytes, tensor, text, write_gguf
from freehold.checkpoint import gguf, safetensors
from freehold.checkpoint.source import open_source
from freehold.errors import FreeholdError

CORPUS = sorted((Path(__file__).parents[1] / "corpus").iterdir())
MOST_MEMORY = 2 << 20  # the corpus is of files of a few hundred bytes

# Time-boxed: each test takes about a second; the same examples in every run.
fuzzed = settings(max_examples=300, deadline=2000, derandomize=True)

lengths = st.sampled_from([0, 1, 7, 8, 31, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "delete", "u32", "u64"]),
        st.floats(0, 1),
        lengths,
        st.binary(max_size=9),
    ),
    min_size=1,
    max_size=4,
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | lengths
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
sizes = lengths | st.integers(0, 12)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F64", "F4"]) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)


def edited(data: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, where, number, inserted in changes:
        at = int(where * len(data))
        match kind:
            case "flip":
                data = data[:at] + bytes(byte ^ (1 << number % 8) for byte in data[at : at + 1]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + inserted + data[at:]
            case "delete":
                data = data[:at] + data[at + len(inserted) :]
            case "u32":
                data = data[:at] + struct.pack("<I", number % 2**32) + data[at + 4 :]
            case "u64":
                data = data[:at] + struct.pack("<Q", number) + data[at + 8 :]
    return data


def check_within(tensors: dict[str, Any], file_size: int) -> None:
    """Check what every reader promises of the tensors that it returns."""
    for one in tensors.values():
        assert 0 <= one.offset <= one.offset + one.num_bytes <= file_size
    ordered = sorted(tensors.values(), key=lambda one: (one.offset, one.num_bytes))
    for one, after in pairwise(ordered):
        assert one.offset + one.num_bytes <= after.offset


def check_safetensors(data: bytes) -> None:
    try:
        check_within(safetensors.read_header(memoryview(data), file="m"), len(data))
    except FreeholdError as error:
        check_message(error)


def check_gguf(data: bytes) -> None:
    try:
        check_within(gguf.read_header(memoryview(data), file="m")[1], len(data))
    except FreeholdError as error:
        check_message(error)


def check_message(error: FreeholdError) -> None:
    assert error.message.isprintable()
    assert len(error.message) < 500


@pytest.fixture(scope="module")
def gguf_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "m.gguf").read_bytes()


@fuzzed
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data):
    check_safetensors(data)
    check_safetensors(raw_safetensors(data))
    check_gguf(data)
    check_gguf(raw_gguf([data], num_tensors=1))
    check_gguf(raw_gguf([key("a", data[0] % 14 if data else 9, data[1:])]))
    check_gguf(raw_gguf([], [text("a") + data]))


@fuzzed
@given(edits)
def test_edited_safetensors_are_read_or_refused(changes):
    check_safetensors(edited(safetensors_bytes(), changes))


@fuzzed
@given(changes=edits)
def test_edited_gguf_is_read_or_refused(gguf_bytes, changes):
    check_gguf(edited(gguf_bytes, changes))


@fuzzed
@given(st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4) | json_values, st.integers(0, 64))
def test_any_json_header_is_read_or_refused(header, num_bytes):
    check_safetensors(raw_safetensors(header, bytes(num_bytes)))


@fuzzed
@given(st.dictionaries(st.sampled_from(["weight_map", "metadata", "x"]), json_values) | json_values)
def test_any_index_is_read_or_refused(index):
    try:
        shard_of = safetensors.read_index(json.dumps(index).encode(), file="m")
    except FreeholdError as error:
        check_message(error)
    else:
        assert all("/" not in shard for shard in shard_of.values())


@fuzzed
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(sizes, max_size=5), st.integers(0, 45), lengths), max_size=3),
    st.integers(0, 200),
)
def test_any_tensor_table_is_read_or_refused(table, num_bytes):
    check_gguf(raw_gguf([], [tensor(*row) for row in table], bytes(num_bytes)))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_is_read_or_refused_in_little_memory(path):
    tracemalloc.start()
    try:
        with open_source(path) as source:
            check_within(dict(source.tensors), path.stat().st_size)
            for name, one in source.tensors.items():
                assert len(source.bytes_of(name)) == one.num_bytes
    except FreeholdError as error:
        check_message(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_MEMORY
