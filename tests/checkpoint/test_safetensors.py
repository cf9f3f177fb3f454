import json
import re

import pytest
import safetensors.torch
import torch

from checkpoint.builders import entry, raw_safetensors, safetensors_bytes
from freehold.checkpoint.safetensors import DTYPES, merge_shards, parse_json_object, read_header, read_index
from freehold.checkpoint.stored import MAX_HEADER_BYTES
from freehold.errors import BadFile, UnsupportedModel


def header_of(data: bytes):
    return read_header(memoryview(data), file="m.safetensors")


def test_a_file_of_the_library_is_read_as_the_library_reads_it():
    data = safetensors_bytes()
    tensors = header_of(data)
    want = safetensors.torch.load(data)
    assert tensors.keys() == want.keys()
    for name, tensor in tensors.items():
        stored = bytearray(data[tensor.offset : tensor.offset + tensor.num_bytes])
        values = torch.frombuffer(stored, dtype=DTYPES[tensor.format]).view(tensor.shape)
        assert torch.equal(values, want[name])


def test_dtypes_are_those_that_the_library_has_for_torch():
    library = dict(safetensors.torch._TYPES)
    assert {name: dtype for name, dtype in DTYPES.items() if name in library} == library
    assert DTYPES.keys() - library.keys() <= {"F8_E8M0"}


def test_empty_files_and_empty_tensors_are_valid():
    assert header_of(raw_safetensors({})) == {}
    assert header_of(raw_safetensors({"a": entry("F32", [0, 3], 0, 0)}))["a"].num_bytes == 0


def test_tensors_come_in_the_order_of_their_bytes():
    header = {"b": entry("U8", [2], 1, 3), "a": entry("U8", [1], 0, 1), "scalar": entry("U8", [], 3, 4)}
    assert list(header_of(raw_safetensors(header, bytes(4)))) == ["a", "b", "scalar"]


A = entry("U8", [4], 0, 4)
REFUSED = {
    "seven-bytes": (b"1234567", "fewer than the 8"),
    "header-past-end": (raw_safetensors({"a": A}, bytes(4), length=200), "announces a header of 200 bytes, but only"),
    "header-of-100-MB": (raw_safetensors({"a": A}, bytes(4), length=100_000_000), "header of 100000000 bytes"),
    "header-of-2^64": (raw_safetensors({"a": A}, bytes(4), length=2**64 - 1), "header of 18446744073709551615 bytes"),
    "data-cut-short": (raw_safetensors({"a": A}, bytes(3)), "need .* bytes, the file has"),
    "data-goes-on": (raw_safetensors({"a": A}, bytes(5)), "1 bytes after the last tensor"),
    "gap-first": (raw_safetensors({"a": entry("U8", [3], 1, 4)}, bytes(4)), "1 bytes before tensor 'a'"),
    "gap-between": (raw_safetensors({"a": A, "b": entry("U8", [1], 5, 6)}, bytes(6)), "'a' and 'b' leave a gap"),
    "overlap": (raw_safetensors({"a": A, "b": entry("U8", [4], 2, 6)}, bytes(6)), "'a' and 'b' overlap"),
    "same-bytes": (raw_safetensors({"a": A, "b": A}, bytes(4)), "'a' and 'b' overlap"),
    "duplicate-name": (raw_safetensors(b'{"a":1,"a":2}'), "'a' occurs twice"),
    "not-json": (raw_safetensors(b"{"), "JSON cannot be read"),
    "not-utf8": (raw_safetensors(b'{"\xff":1}'), "JSON cannot be read"),
    "utf-16": (raw_safetensors("{}".encode("utf-16")), "JSON cannot be read"),
    "nested": (raw_safetensors(b"[" * 100_000), "nested too deeply"),
    "number-of-5000-digits": (raw_safetensors(b'{"a":' + b"9" * 5000 + b"}"), "JSON cannot be read"),
    "list": (raw_safetensors([]), "type list, wanted is an object"),
    "entry-no-map": (raw_safetensors({"a": 1}), "wants exactly the fields"),
    "field-missing": (raw_safetensors({"a": {"dtype": "U8", "shape": [4]}}), "wants exactly the fields"),
    "field-unknown": (raw_safetensors({"a": {**A, "x": 1}}, bytes(4)), "wants exactly the fields"),
    "size-negative": (raw_safetensors({"a": entry("U8", [-4], 0, 4)}, bytes(4)), "shape of 'a'"),
    "size-bool": (raw_safetensors({"a": entry("U8", [4, True], 0, 4)}, bytes(4)), "shape of 'a'"),
    "size-float": (raw_safetensors({"a": entry("U8", [4.0], 0, 4)}, bytes(4)), "shape of 'a'"),
    "shape-no-list": (raw_safetensors({"a": {**A, "shape": {"0": 4}}}, bytes(4)), "shape of 'a'"),
    "nine-dimensions": (raw_safetensors({"a": entry("U8", [4] + [1] * 8, 0, 4)}, bytes(4)), "9 dimensions"),
    "overflow": (raw_safetensors({"a": entry("F32", [2**62, 4], 0, 0)}), "more elements than 64 bits"),
    "overflow-behind-zero": (raw_safetensors({"a": entry("F32", [0, 2**62, 4], 0, 0)}), "more elements than 64 bits"),
    "offsets-backwards": (raw_safetensors({"a": entry("U8", [4], 4, 0)}, bytes(4)), "not a begin and an end"),
    "offsets-three": (raw_safetensors({"a": {**A, "data_offsets": [0, 4, 8]}}, bytes(4)), "not a begin and an end"),
    "bytes-disagree": (raw_safetensors({"a": entry("F32", [4], 0, 4)}, bytes(4)), "has 4 bytes, .* want 16"),
    "dtype-no-string": (raw_safetensors({"a": entry(None, [4], 0, 4)}, bytes(4)), "dtype of 'a'"),
    "name-empty": (raw_safetensors({"": A}, bytes(4)), "'' is no name"),
    "name-long": (raw_safetensors({"x" * 10_000: A}, bytes(4)), r"\(10000 characters\) is no name"),
    "name-with-newline": (raw_safetensors({"a\nb": A}, bytes(4)), r"'a\\nb' is no name"),
    "name-surrogate": (raw_safetensors({"\ud800": A}, bytes(4)), "is no name"),
    "metadata-number": (raw_safetensors({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata-list": (raw_safetensors({"__metadata__": []}), "strings to strings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_in_one_line(case):
    data, pattern = REFUSED[case]
    with pytest.raises(BadFile, match=pattern) as caught:
        header_of(data)
    assert caught.value.message.startswith("m.safetensors: ")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_a_dtype_that_torch_lacks_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="tensor 'a' has dtype F4"):
        header_of(raw_safetensors({"a": entry("F4", [8], 0, 4)}, bytes(4)))


def test_the_largest_header_is_accepted_and_one_byte_more_is_not():
    text = b"{}".ljust(MAX_HEADER_BYTES)
    assert header_of(raw_safetensors(text)) == {}
    with pytest.raises(BadFile, match=f"at most {MAX_HEADER_BYTES}"):
        header_of(raw_safetensors(text + b" "))


def test_config_values_may_be_infinite():
    assert parse_json_object(b'{"time_step_limit": [0.0, Infinity]}', file="config.json") == {
        "time_step_limit": [0.0, float("inf")]
    }


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/b.safetensors",
        "..",
        "a\\b.safetensors",
        "c:x.safetensors",
        "x.bin",
        "",
        3,
    ],
)
def test_an_index_cannot_name_files_elsewhere(shard):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    with pytest.raises(BadFile, match=re.escape("wanted is a .safetensors file beside it")):
        read_index(index, file="index.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": "b"}, "x": 1}])
def test_an_index_has_a_weight_map_and_nothing_unknown(index):
    with pytest.raises(BadFile, match="wanted are metadata and weight_map"):
        read_index(json.dumps(index).encode(), file="index.json")


def shards_of(**names: list[str]):
    header = {shard: {name: entry("U8", [0], 0, 0) for name in tensors} for shard, tensors in names.items()}
    return {shard: header_of(raw_safetensors(tensors)) for shard, tensors in header.items()}


def test_shards_merge_where_index_and_files_agree():
    assert merge_shards(shards_of(p=["a"], q=["b"]), {"a": "p", "b": "q"}, file="index.json").keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("held", "shard_of", "pattern"),
    [
        ({"p": ["a"], "q": []}, {"a": "p", "b": "q"}, "q: tensor 'b' is not in it"),
        ({"p": ["a"], "q": ["a"]}, {"a": "p"}, "q: it holds tensor 'a', but index.json puts it in p"),
        ({"p": ["a", "b"]}, {"a": "p"}, "p: it holds tensor 'b', but index.json does not name it"),
        ({"p": ["b"], "q": ["a"]}, {"a": "p", "b": "q"}, "p: it holds tensor 'b', but index.json puts it in q"),
    ],
    ids=["absent", "twice", "unnamed", "swapped"],
)
def test_shards_that_disagree_with_the_index_are_refused(held, shard_of, pattern):
    with pytest.raises(BadFile, match=pattern):
        merge_shards(shards_of(**held), shard_of, file="index.json")
