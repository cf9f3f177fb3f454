"""The GGUF format: metadata and tensor table of one file.

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    per key     name string, value type u32, value
    per tensor  name string, dimensions u32, sizes u64 (fastest first), type u32, offset u64
    padding to the alignment, then data; offsets count from here and are multiples of the alignment

    string      length u64, UTF-8
    array       element type u32, count u64, elements

Belongs here: reading and checking all that, from one pass over the bytes. Not here: opening files, decoding blocks,
the meaning of keys.

The `gguf` library gives the numbers of types their names. Its reader is not used: it trusts the lengths and counts that
a file states, and takes more than twenty times as long over a large vocabulary.
"""

import struct
from dataclasses import replace
from math import prod
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType

from freehold.checkpoint.stored import MAX_HEADER_BYTES, StoredTensor, check_name, check_shape, shown
from freehold.errors import BadFile, UnsupportedModel
from freehold.quantize.gguf_blocks import BLOCKS

MAX_ARRAY_ELEMENTS = 1 << 22  # of one file; a vocabulary of 262,144 with all its arrays takes 1.3 million
MAX_ALIGNMENT = 1 << 16
_DEFAULT_ALIGNMENT = 32
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # a name of one letter and a value of one byte
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_LENGTH = struct.Struct("<Q")
_STRUCT_CODES = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "B",
}


def read_header(buffer: memoryview, *, file: str) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the metadata and the tensors of one GGUF file, tensors in the order of their bytes.

    Raises: BadFile, UnsupportedModel.
    """
    cursor = _Cursor(buffer, file)
    num_tensors, num_keys = _counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name()
        if key in metadata:
            raise BadFile(f"{file}: key {shown(key)} occurs twice")
        metadata[key] = _value(cursor, cursor.integer("I"), key)
    _check_not_split(metadata, file)
    alignment = _alignment(metadata, file)
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    return metadata, _placed(entries, cursor, alignment=alignment)


class _Cursor:
    """A position in the header that never leaves the file, nor the part of it that a header may take."""

    def __init__(self, buffer: memoryview, file: str):
        self.file = file
        self.file_size = len(buffer)
        self.header = buffer[:MAX_HEADER_BYTES]
        self.at = 0
        self.elements_left = MAX_ARRAY_ELEMENTS

    def advance(self, num_bytes: int) -> int:
        """Return the position, and step over so many bytes that must be there."""
        start = self.at
        if num_bytes > len(self.header) - start:
            end = "the file ends" if len(self.header) == self.file_size else "the largest header allowed ends"
            raise BadFile(
                f"{self.file}: the header wants {num_bytes} bytes at {start}, but {end} at {len(self.header)}",
                hint="the file is damaged or cut short; download it again",
            )
        self.at += num_bytes
        return start

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        return layout.unpack_from(self.header, self.advance(layout.size))

    def integer(self, code: str) -> int:
        (value,) = self.numbers(code, 1)
        return int(value)

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """Return strings that follow each other; one call for all, for a vocabulary has hundreds of thousands."""
        header, size, at, found = self.header, len(self.header), self.at, list[str]()
        for _ in range(count):
            start = at + 8
            end = start + _LENGTH.unpack_from(header, at)[0] if start <= size else size + 1
            if end > size:
                self.at = at
                self.advance(8)
                self.advance(end - start)  # one of them refuses
            try:
                found.append(str(header[start:end], "utf-8"))
            except UnicodeDecodeError:
                raise BadFile(f"{self.file}: the string at byte {start} of the header is not UTF-8") from None
            at = end
        self.at = at
        return found

    def name(self) -> str:
        name = self.text()
        check_name(name, file=self.file)
        return name


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Return the numbers of tensors and of keys, from the head of the file."""
    file = cursor.file
    if cursor.file_size < 24 or bytes(cursor.header[cursor.advance(4) : cursor.at]) != b"GGUF":
        raise BadFile(f"{file}: it does not start as a GGUF file does", hint="check that its download is whole")
    version = cursor.integer("I")
    if version & 0xFFFF == 0:
        raise UnsupportedModel(f"{file}: it is a big-endian GGUF file", hint="convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise UnsupportedModel(f"{file}: it is a GGUF file of version {version}, read are 2 and 3")
    num_tensors, num_keys = cursor.numbers("Q", 2)
    if num_tensors * _MIN_TENSOR_BYTES + num_keys * _MIN_KEY_BYTES > len(cursor.header) - cursor.at:
        raise BadFile(
            f"{file}: it announces {num_tensors} tensors and {num_keys} keys, more than its header could hold"
        )
    return num_tensors, num_keys


def _value(cursor: _Cursor, type_number: int, key: str) -> Any:
    """Return a value of the metadata as a Python number, boolean, string or list."""
    if type_number == GGUFValueType.STRING:
        return cursor.text()
    if type_number == GGUFValueType.ARRAY:
        return _array(cursor, cursor.integer("I"), cursor.integer("Q"), key)
    return _scalars(cursor, type_number, 1, key)[0]


def _array(cursor: _Cursor, type_number: int, count: int, key: str) -> list[Any]:
    if count > cursor.elements_left:
        raise BadFile(
            f"{cursor.file}: with {shown(key)} its arrays have more than {MAX_ARRAY_ELEMENTS} elements in all"
        )
    cursor.elements_left -= count
    if type_number == GGUFValueType.STRING:
        return cursor.texts(count)
    if type_number == GGUFValueType.ARRAY:
        raise UnsupportedModel(f"{cursor.file}: key {shown(key)} is an array of arrays")
    return _scalars(cursor, type_number, count, key)


def _scalars(cursor: _Cursor, type_number: int, count: int, key: str) -> list[Any]:
    code = _STRUCT_CODES.get(type_number)  # type: ignore[call-overload]
    if code is None:
        raise BadFile(f"{cursor.file}: key {shown(key)} has a value of unknown type {type_number}")
    values = list(cursor.numbers(code, count))
    if type_number != GGUFValueType.BOOL:
        return values
    if not {0, 1}.issuperset(values):
        raise BadFile(f"{cursor.file}: key {shown(key)} has a boolean that is neither 0 nor 1")
    return [value == 1 for value in values]


def _check_not_split(metadata: dict[str, Any], file: str) -> None:
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{file}: it is one part of a GGUF model in several files", hint="join them with llama-gguf-split --merge"
        )


def _alignment(metadata: dict[str, Any], file: str) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment.bit_count() != 1:
        seen = alignment if isinstance(alignment, int) else type(alignment).__name__
        raise BadFile(f"{file}: general.alignment is {seen}, wanted is a power of two from 8 to {MAX_ALIGNMENT}")
    return alignment


def _tensor_entry(cursor: _Cursor) -> StoredTensor:
    """Return one tensor of the table; its offset counts from the start of the data still."""
    name = cursor.name()
    num_dims = cursor.integer("I")
    if not 1 <= num_dims <= 4:
        raise BadFile(f"{cursor.file}: tensor {shown(name)} has {num_dims} dimensions, GGUF has 1 to 4")
    shape = tuple(reversed(cursor.numbers("Q", num_dims)))
    check_shape(shape, name=name, file=cursor.file)
    type_number, offset = cursor.integer("I"), cursor.integer("Q")
    format = _format(type_number, name, cursor.file)
    block = BLOCKS[format]
    if prod(shape) == 0 or shape[-1] % block.num_values:
        raise BadFile(
            f"{cursor.file}: tensor {shown(name)} of shape {list(shape)} has no rows of whole {format} blocks"
        )
    return StoredTensor(
        name=name, format=format, shape=shape, file=cursor.file, offset=offset, num_bytes=block.bytes_of_shape(shape)
    )


def _format(type_number: int, name: str, file: str) -> str:
    try:
        format = str(GGMLQuantizationType(type_number).name)
    except ValueError:
        raise BadFile(f"{file}: tensor {shown(name)} has the unknown type {type_number}") from None
    if format not in BLOCKS:
        raise UnsupportedModel(
            f"{file}: tensor {shown(name)} is stored as {format}, which Freehold does not decode",
            hint=f"take a file quantized to one of {', '.join(BLOCKS)}",
        )
    return format


def _placed(entries: list[StoredTensor], cursor: _Cursor, *, alignment: int) -> dict[str, StoredTensor]:
    """Return the tensors with absolute offsets, which must follow one another, each aligned, to the end of the file.

    That is what ggml demands of every file, and it rules out overlaps and hidden data.
    """
    file = cursor.file
    data_start = end = _round_up(cursor.at, alignment)
    tensors: dict[str, StoredTensor] = {}
    for entry in entries:
        if entry.name in tensors:
            raise BadFile(f"{file}: tensor {shown(entry.name)} occurs twice")
        start = _round_up(end, alignment)
        if data_start + entry.offset != start:
            raise BadFile(
                f"{file}: tensor {shown(entry.name)} has offset {entry.offset}, "
                f"wanted is {start - data_start}, where the one before ends"
            )
        tensors[entry.name] = replace(entry, offset=start)
        end = start + entry.num_bytes
    if entries and end > cursor.file_size:
        raise BadFile(
            f"{file}: its tensors need {end} bytes, the file has {cursor.file_size}",
            hint="the file is cut short; download it again",
        )
    if cursor.file_size > _round_up(end, alignment):
        raise BadFile(f"{file}: {cursor.file_size - end} bytes after the last tensor belong to none")
    return tensors


def _round_up(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
