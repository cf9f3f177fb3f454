import struct

import gguf
import pytest

from checkpoint.builders import (
    ARRAY,
    BOOL,
    Q8_0,
    STRING,
    UINT32,
    UINT64,
    array,
    key,
    raw_gguf,
    tensor,
    text,
    write_gguf,
)
from freehold.checkpoint.gguf import MAX_ARRAY_ELEMENTS, read_header
from freehold.errors import BadFile, FreeholdError, UnsupportedModel


def header_of(data: bytes):
    return read_header(memoryview(data), file="m.gguf")


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    metadata, tensors = header_of(path.read_bytes())
    reader = gguf.GGUFReader(path)
    want = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == want
    assert {name: (type(value)) for name, value in metadata.items()} == {name: type(v) for name, v in want.items()}
    assert [(t.name, t.format, t.offset, t.num_bytes, t.shape) for t in tensors.values()] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes, tuple(reversed(t.shape.tolist())))
        for t in reader.tensors
    ]


def test_every_scalar_type_is_read(tmp_path):
    values = {"u1": 255, "i1": -1, "u2": 65535, "i2": -2, "u4": 2**32 - 1, "i4": -3, "u8": 2**64 - 1, "i8": -4}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind, value in values.items():
        name = {"u": "uint", "i": "int"}[kind[0]] + str(8 * int(kind[1]))
        getattr(writer, f"add_{name}")(kind, value)
    writer.add_float64("f8", 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata, tensors = header_of((tmp_path / "m.gguf").read_bytes())
    assert metadata == {"general.architecture": "llama", **values, "f8": 0.1}
    assert tensors == {}


def test_alignment_moves_the_data():
    data = raw_gguf([key("general.alignment", UINT32, struct.pack("<I", 64))], [tensor("a", [4])])
    data = data.ljust(-(-len(data) // 64) * 64, b"\0")
    assert header_of(data + bytes(16))[1]["a"].offset == len(data)


ONE = bytes(16)  # the data of tensor("a", [4])
U32_ONE = struct.pack("<I", 1)
REFUSED = {
    "empty": (b"", "does not start as a GGUF file"),
    "cut-in-the-head": (raw_gguf()[:23], "does not start as a GGUF file"),
    "magic": (raw_gguf(magic=b"GGML"), "does not start as a GGUF file"),
    "tensors-2^64": (raw_gguf(num_tensors=2**64 - 1), "announces 18446744073709551615 tensors"),
    "keys-2^64": (raw_gguf(num_keys=2**64 - 1), "18446744073709551615 keys"),
    "keys-more-than-there-are": (raw_gguf([key("a", UINT32, U32_ONE)] * 1, num_keys=2), "announces|is no name"),
    "string-past-end": (raw_gguf([text("a") + struct.pack("<IQ", STRING, 2**40)]), "wants 1099511627776 bytes"),
    "name-past-end": (raw_gguf([struct.pack("<Q", 2**63) + bytes(20)]), "wants 9223372036854775808 bytes"),
    "array-past-end": (raw_gguf([key("a", ARRAY, array(UINT64, 1000))]), "wants 8000 bytes"),
    "array-of-strings-past-end": (raw_gguf([key("a", ARRAY, array(STRING, 1000))]), "the header wants"),
    "array-2^60": (raw_gguf([key("a", ARRAY, array(UINT32, 2**60))]), f"more than {MAX_ARRAY_ELEMENTS} elements"),
    "key-twice": (raw_gguf([key("a", UINT32, U32_ONE)] * 2), "key 'a' occurs twice"),
    "key-with-escape": (raw_gguf([key("a\x1b[2J", UINT32, U32_ONE)]), r"'a\\x1b\[2J' is no name"),
    "value-type": (raw_gguf([key("a", 13, bytes(8))]), "'a' has a value of unknown type 13"),
    "element-type": (raw_gguf([key("a", ARRAY, array(99, 0))]), "'a' has a value of unknown type 99"),
    "boolean-2": (raw_gguf([key("a", BOOL, b"\2")]), "neither 0 nor 1"),
    "string-not-utf8": (raw_gguf([key("a", STRING, text(b"\xff"))]), "is not UTF-8"),
    "alignment-0": (raw_gguf([key("general.alignment", UINT32, bytes(4))]), "alignment is 0"),
    "alignment-48": (raw_gguf([key("general.alignment", UINT32, struct.pack("<I", 48))]), "alignment is 48"),
    "alignment-2^31": (raw_gguf([key("general.alignment", UINT32, struct.pack("<I", 2**31))]), "is 2147483648"),
    "alignment-text": (raw_gguf([key("general.alignment", STRING, text("x"))]), "alignment is str"),
    "dimensions-0": (raw_gguf([], [tensor("a", [])]), "announces 1 tensors|0 dimensions"),
    "dimensions-5": (raw_gguf([], [tensor("a", [1] * 5)], ONE), "5 dimensions"),
    "dimensions-2^32": (
        raw_gguf([], [text("a") + struct.pack("<IQQQ", 2**32 - 1, 1, 0, 0)], ONE),
        "4294967295 dimensions",
    ),
    "overflow": (raw_gguf([], [tensor("a", [2**62, 2**62])]), "more elements than 64 bits"),
    "zero-size": (raw_gguf([], [tensor("a", [0, 4])]), "has no rows"),
    "tensor-type": (raw_gguf([], [tensor("a", [4], 4)], ONE), "unknown type 4"),
    "row-not-whole-blocks": (raw_gguf([], [tensor("a", [33, 32], Q8_0)], bytes(2000)), "no rows of whole Q8_0 blocks"),
    "name-twice": (raw_gguf([], [tensor("a", [4])] * 2, bytes(64)), "'a' occurs twice"),
    "overlap": (raw_gguf([], [tensor("a", [4]), tensor("b", [4])], bytes(64)), "'b' has offset 0, wanted is 32"),
    "offset-unaligned": (raw_gguf([], [tensor("a", [4], offset=4)], bytes(20)), "'a' has offset 4, wanted is 0"),
    "gap": (raw_gguf([], [tensor("a", [4], offset=32)], bytes(48)), "'a' has offset 32, wanted is 0"),
    "offset-2^64": (raw_gguf([], [tensor("a", [4], offset=2**64 - 32)], ONE), "wanted is 0"),
    "data-cut-short": (raw_gguf([], [tensor("a", [4])], bytes(15)), "need .* bytes, the file has"),
    "data-goes-on": (raw_gguf([], [tensor("a", [4])], bytes(64)), "48 bytes after the last tensor"),
}
UNSUPPORTED = {
    "version-1": (raw_gguf(version=1), "version 1, read are 2 and 3"),
    "big-endian": (raw_gguf(version=3 << 24), "big-endian"),
    "split": (raw_gguf([key("split.count", UINT32, struct.pack("<I", 2))]), "one part of a GGUF model"),
    "array-of-arrays": (raw_gguf([key("a", ARRAY, array(ARRAY, 1, array(UINT32, 0)))]), "array of arrays"),
    "IQ4_XS": (raw_gguf([], [tensor("a", [256], 23)], bytes(136)), "'a' is stored as IQ4_XS"),
}


@pytest.mark.parametrize("case", [*REFUSED, *UNSUPPORTED])
def test_a_bad_file_is_refused_in_one_line(case):
    data, pattern = (REFUSED | UNSUPPORTED)[case]
    with pytest.raises(FreeholdError, match=pattern) as caught:
        header_of(data)
    assert type(caught.value) is (BadFile if case in REFUSED else UnsupportedModel)
    assert caught.value.message.startswith("m.gguf: ")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    _, tensors = header_of(whole)
    end = max(tensor.offset + tensor.num_bytes for tensor in tensors.values())
    for length in range(end):
        with pytest.raises(BadFile):
            header_of(whole[:length])
