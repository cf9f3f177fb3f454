"""The weight files of a checkpoint: found, opened, mapped, and read as bytes. No other file opens weight files.

Belongs here: which files make up a checkpoint, and their bytes. Not here: formats (safetensors.py, gguf.py), what the
tensors are for.
"""

import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from freehold.checkpoint import gguf, safetensors
from freehold.checkpoint.stored import MAX_HEADER_BYTES, StoredTensor
from freehold.errors import BadFile, BadInput, NotFound, UnsupportedModel

__all__ = ["Source", "StoredTensor", "open_source"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Without it a private map counts as memory in full, and a model larger than this machine's memory could not be opened.
# Python has the name from 3.13 on; the number is Linux's on x86, ARM and RISC-V.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Source:
    """The open weight files of one checkpoint; made by `open_source`, closed by `close` or a `with` statement.

    kind: which format the files have. folder: where the files beside the weights are (config.json, tokenizer.json).
    files: the weight files, sorted. tensors: by name.
    metadata: of a GGUF file its keys; of safetensors what config.json holds, empty where there is none.
    header: of an adapter's file what it says beside its tensors.
    """

    def __init__(
        self,
        *,
        kind: Literal["safetensors", "gguf"],
        opened: Iterable["_WeightFile"],
        metadata: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        header: Mapping[str, str] | None = None,
    ):
        self._opened = {file.path.name: file for file in opened}
        self.kind = kind
        self.files = tuple(sorted(file.path for file in self._opened.values()))
        self.folder = self.files[0].parent
        self.metadata = metadata
        self.tensors = tensors
        self.header = header or {}

    def bytes_of(self, name: str) -> Tensor:
        """Return the bytes of a tensor, uint8 [num_bytes]: a view of the memory map, which outlives `close`.

        Writing to it changes this process's copy of the page, never the file.
        """
        tensor = self.tensors[name]
        if tensor.num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        file = self._opened[tensor.file]
        return torch.frombuffer(file.map, dtype=torch.uint8, offset=tensor.offset, count=tensor.num_bytes)

    def release(self, name: str) -> None:
        """Tell the system that the mapped pages of a tensor are not needed now: they leave this process's memory.

        Views stay valid: what is touched again is read again, without changes that were made to it. Only pages that no
        other tensor shares are released.
        """
        tensor = self.tensors[name]
        first = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.offset + tensor.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._opened[tensor.file].map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Close the files. Tensors of `bytes_of` stay valid; the map goes when the last of them does."""
        for file in self._opened.values():
            file.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_source(path: Path) -> Source:
    """Return the open weight files at `path`: a folder, a .safetensors or .gguf file, or the index of several shards.

    All headers are read and checked here; no byte of tensor data is.
    Raises: NotFound, BadFile, UnsupportedModel.
    """
    try:
        weights = _weights_in(path) if path.is_dir() else path
        _check_kind_of(weights)
        if weights.suffix == ".gguf":
            return _open_gguf(weights)
        if weights.suffix == ".safetensors":
            return _open_safetensors(weights)
        return _open_shards(weights)
    except OSError as error:
        raise BadFile(f"{path.name or path} cannot be read: {error.strerror}") from None


def open_adapter(folder: Path) -> Source:
    """Return the open weight file of an adapter's folder; its metadata are what adapter_config.json holds.

    Raises: NotFound, BadFile, UnsupportedModel.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise NotFound(f"there is no {name} in {folder.name or folder}", hint="name the folder of an adapter")
    try:
        return _open_adapter_weights(folder)
    except OSError as error:
        raise BadFile(f"{folder.name or folder} cannot be read: {error.strerror}") from None


class _WeightFile:
    """One open and mapped weight file."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            size = os.fstat(self._file.fileno()).st_size
            if size == 0:
                raise BadFile(f"{path.name}: the file is empty", hint="download it again")
            # Never closed by hand: torch.frombuffer keeps this object alive, but would not stop it from being unmapped.
            self.map = mmap.mmap(
                self._file.fileno(),
                size,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except BaseException:
            self._file.close()
            raise

    @property
    def buffer(self) -> memoryview:
        return memoryview(self.map)

    def close(self) -> None:
        self._file.close()


def _weights_in(folder: Path) -> Path:
    """Return the one file of a folder that stands for its weights."""
    found = [folder / name for name in (_SINGLE, _INDEX) if (folder / name).exists()]
    found += sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise BadInput(f"{folder.name or folder} holds {len(found)} models: {names}", hint="name one of the files")
    if found:
        return found[0]
    if pickles := sorted(path for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES):
        return pickles[0]
    raise NotFound(f"{folder.name or folder} holds none of {_SINGLE}, {_INDEX} and *.gguf")


def _check_kind_of(path: Path) -> None:
    """Refuse what is no regular file, and what has another format, by its name."""
    if not path.is_file():
        raise NotFound(f"there is no file or folder {path.name or path}")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsupportedModel(
            f"{path.name} is a pickle file, which can run any code when it is loaded",
            hint="convert it to safetensors where you trust it, or look for the model's safetensors files",
        )
    if path.suffix not in (".safetensors", ".gguf") and not path.name.endswith(".safetensors.index.json"):
        raise UnsupportedModel(f"{path.name} is neither a .safetensors nor a .gguf file, nor an index of shards")


def _opened(path: Path, until_whole: ExitStack) -> _WeightFile:
    """Return an open weight file that closes again where the rest of the checkpoint turns out to be unusable."""
    file = _WeightFile(path)
    until_whole.callback(file.close)
    return file


def _open_gguf(path: Path) -> Source:
    with ExitStack() as until_whole:
        file = _opened(path, until_whole)
        metadata, tensors = gguf.read_header(file.buffer, file=path.name)
        until_whole.pop_all()
        return Source(kind="gguf", opened=[file], metadata=metadata, tensors=tensors)


def _open_adapter_weights(folder: Path) -> Source:
    metadata = _metadata(folder / ADAPTER_CONFIG)
    with ExitStack() as until_whole:
        file = _opened(folder / ADAPTER_WEIGHTS, until_whole)
        tensors = safetensors.read_header(file.buffer, file=ADAPTER_WEIGHTS)
        header = safetensors.read_metadata(file.buffer, file=ADAPTER_WEIGHTS)
        until_whole.pop_all()
        return Source(kind="safetensors", opened=[file], metadata=metadata, tensors=tensors, header=header)


def _open_safetensors(path: Path) -> Source:
    metadata = _metadata(path.parent / _CONFIG)
    with ExitStack() as until_whole:
        file = _opened(path, until_whole)
        tensors = safetensors.read_header(file.buffer, file=path.name)
        until_whole.pop_all()
        return Source(kind="safetensors", opened=[file], metadata=metadata, tensors=tensors)


def _open_shards(index: Path) -> Source:
    metadata = _metadata(index.parent / _CONFIG)
    shard_of = safetensors.read_index(_read_small(index), file=index.name)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise NotFound(
            f"{index.name} names {len(shards)} shards, {len(missing)} of them missing, first {missing[0]}",
            hint="download the missing files into the same folder",
        )
    with ExitStack() as until_whole:
        files = [_opened(index.parent / shard, until_whole) for shard in shards]
        headers = {file.path.name: safetensors.read_header(file.buffer, file=file.path.name) for file in files}
        tensors = safetensors.merge_shards(headers, shard_of, file=index.name)
        until_whole.pop_all()
        return Source(kind="safetensors", opened=files, metadata=metadata, tensors=tensors)


def _metadata(path: Path) -> dict[str, Any]:
    return safetensors.parse_json_object(_read_small(path), file=path.name) if path.is_file() else {}


def _read_small(path: Path) -> bytes:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise BadFile(f"{path.name} has {path.stat().st_size} bytes, at most {MAX_HEADER_BYTES} are read")
    return path.read_bytes()
