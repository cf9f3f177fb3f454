"""The safetensors format: the header of one file, and the index of a checkpoint in several.

    8 bytes   length n of the header, little-endian
    n bytes   JSON: {"__metadata__": {str: str}, name: {"dtype": str, "shape": [int], "data_offsets": [int, int]}, ...}
    rest      data; offsets count from here

Belongs here: reading and checking those two. Not here: opening files, the data itself, what the tensors are for.
"""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

import torch

from freehold.checkpoint.stored import MAX_HEADER_BYTES, StoredTensor, check_name, check_shape, shown
from freehold.errors import BadFile, UnsupportedModel

# Every safetensors dtype that torch has, too; elements of less than a byte are left out.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_SHARD_NAME = re.compile(r"[A-Za-z0-9._+-]{1,200}\.safetensors")


def read_header(buffer: memoryview, *, file: str) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name, in the order of their bytes.

    Raises: BadFile, UnsupportedModel.
    """
    start, header = _header(buffer, file)
    _check_metadata(header.pop("__metadata__", {}), file)
    tensors = [_tensor(name, entry, start, file) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    _check_coverage(tensors, start, len(buffer), file)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(buffer: memoryview, *, file: str) -> dict[str, str]:
    """Return what the header of one safetensors file says beside its tensors. Raises: BadFile."""
    metadata: dict[str, str] = _header(buffer, file)[1].get("__metadata__", {})
    _check_metadata(metadata, file)
    return metadata


def read_index(data: bytes, *, file: str) -> dict[str, str]:
    """Return which shard holds each tensor, from the bytes of an index file.

    Raises: BadFile.
    """
    index = parse_json_object(data, file=file)
    shard_of = index.pop("weight_map", None)
    index.pop("metadata", None)
    if index or not isinstance(shard_of, dict) or not shard_of:
        seen = f"the unknown field {shown(next(iter(index)))}" if index else "no weight_map with tensors"
        raise BadFile(f"{file}: it has {seen}; wanted are metadata and weight_map")
    for name, shard in shard_of.items():
        check_name(name, file=file)
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            seen = shown(shard) if isinstance(shard, str) else type(shard).__name__
            raise BadFile(
                f"{file}: tensor {shown(name)} is said to be in {seen}, wanted is a .safetensors file beside it"
            )
    return shard_of


def merge_shards(
    shards: Mapping[str, Mapping[str, StoredTensor]], shard_of: Mapping[str, str], *, file: str
) -> dict[str, StoredTensor]:
    """Return the tensors of all shards; each is in the one shard that the index names, and no other tensor exists.

    Raises: BadFile.
    """
    merged: dict[str, StoredTensor] = {}
    for shard, tensors in shards.items():
        for name, tensor in tensors.items():
            if (wanted := shard_of.get(name)) != shard:
                where = f"puts it in {wanted}" if wanted else "does not name it"
                raise BadFile(f"{shard}: it holds tensor {shown(name)}, but {file} {where}")
            merged[name] = tensor
    for name, shard in shard_of.items():
        if name not in merged:
            raise BadFile(f"{shard}: tensor {shown(name)} is not in it, but {file} says so")
    return merged


def parse_json_object(data: bytes, *, file: str) -> dict[str, Any]:
    """Return a JSON object in which no key occurs twice; bare Infinity is accepted, as Hugging Face writes it.

    Raises: BadFile.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise BadFile(f"{file}: its JSON is nested too deeply") from None
    except ValueError as error:  # damaged JSON, damaged UTF-8, a number of thousands of digits
        raise BadFile(f"{file}: its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BadFile(f"{file}: its JSON is of type {type(value).__name__}, wanted is an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(duplicate)} occurs twice")
    return fields


def _header(buffer: memoryview, file: str) -> tuple[int, dict[str, Any]]:
    """Return where the data begins, and the JSON before it."""
    start = 8 + _header_length(buffer, file)
    return start, parse_json_object(bytes(buffer[8:start]), file=file)


def _header_length(buffer: memoryview, file: str) -> int:
    if len(buffer) < 8:
        raise BadFile(f"{file}: it has {len(buffer)} bytes, fewer than the 8 that start a safetensors file")
    length = int.from_bytes(buffer[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadFile(
            f"{file}: it announces a header of {length} bytes, at most {MAX_HEADER_BYTES} are read",
            hint="check that this is a safetensors file and that its download is whole",
        )
    if length > len(buffer) - 8:
        raise BadFile(
            f"{file}: it announces a header of {length} bytes, but only {len(buffer) - 8} follow",
            hint="the file is cut short; download it again",
        )
    return length


def _check_metadata(metadata: object, file: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(f"{file}: its __metadata__ is not a map of strings to strings")


def _tensor(name: str, entry: object, data_start: int, file: str) -> StoredTensor:
    """Return the tensor that one field of the header describes, checked on its own."""
    check_name(name, file=file)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise BadFile(f"{file}: tensor {shown(name)} wants exactly the fields dtype, shape and data_offsets")
    shape = _sizes(entry["shape"], f"shape of {shown(name)}", file)
    offsets = _sizes(entry["data_offsets"], f"data_offsets of {shown(name)}", file)
    check_shape(shape, name=name, file=file)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadFile(f"{file}: data_offsets of {shown(name)} are not a begin and an end")
    num_bytes = prod(shape) * _dtype(entry["dtype"], name, file).itemsize
    if num_bytes != offsets[1] - offsets[0]:
        raise BadFile(
            f"{file}: tensor {shown(name)} has {offsets[1] - offsets[0]} bytes, its dtype and shape want {num_bytes}"
        )
    return StoredTensor(
        name=name,
        format=entry["dtype"],
        shape=shape,
        file=file,
        offset=data_start + offsets[0],
        num_bytes=num_bytes,
    )


def _sizes(value: object, what: str, file: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise BadFile(f"{file}: {what} is not a list of integers from 0 to 2^63")
    return tuple(value)


def _dtype(dtype: object, name: str, file: str) -> torch.dtype:
    if not isinstance(dtype, str) or len(dtype) > 16 or not dtype.isprintable():
        raise BadFile(f"{file}: dtype of {shown(name)} is not the name of one")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"{file}: tensor {shown(name)} has dtype {dtype}, read are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _check_coverage(tensors: list[StoredTensor], start: int, file_size: int, file: str) -> None:
    """Refuse overlaps, gaps, and data that is cut short or goes on after the last tensor."""
    if tensors and tensors[0].offset != start:
        raise BadFile(
            f"{file}: {tensors[0].offset - start} bytes before tensor {shown(tensors[0].name)} belong to none"
        )
    for tensor, after in pairwise(tensors):
        if (end := tensor.offset + tensor.num_bytes) != after.offset:
            how = "overlap" if end > after.offset else "leave a gap between them"
            raise BadFile(f"{file}: tensors {shown(tensor.name)} and {shown(after.name)} {how}")
    end = tensors[-1].offset + tensors[-1].num_bytes if tensors else start
    if end > file_size:
        raise BadFile(
            f"{file}: its tensors need {end} bytes, the file has {file_size}",
            hint="the file is cut short; download it again",
        )
    if end < file_size:
        raise BadFile(f"{file}: {file_size - end} bytes after the last tensor belong to none")
