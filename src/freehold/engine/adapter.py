"""An adapter as a folder: adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them.

Belongs here: such folders, read and written, and an adapted model as a checkpoint without adapter.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from freehold.adapt.lora import merge, unpack
from freehold.adapt.peft import BASE_KEY, adapter_config, adapter_tensors, attach_peft
from freehold.checkpoint.load import Progress, read_tensor
from freehold.checkpoint.save import new_folder, save_checkpoint
from freehold.checkpoint.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source, StoredTensor, open_adapter
from freehold.errors import BadFile, BadInput, CheckpointMismatch
from freehold.models.decoder import Decoder
from freehold.models.families import Family
from freehold.trust.identity import digest_files

# Of the numbers of A and B.
FORMATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What loading an adapter found: the digest of its two files, and what had to be said."""

    sha256: str
    notes: tuple[str, ...] = ()


def save_adapter(folder: Path, decoder: Decoder, *, family: Family, base_sha256: str | None) -> None:
    """Write a decoder's adapter as a new folder that PEFT loads; it comes into being whole or not at all.

    base_sha256: `Identity.weights` of the base, which is then the only one that the adapter is loaded for; None where
        any is taken.
    Raises: BadInput.
    """
    tensors = adapter_tensors(decoder, family)
    text = json.dumps(adapter_config(decoder), indent=2) + "\n"
    header = {BASE_KEY: base_sha256} if base_sha256 else None  # of two keys the library writes either one first
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values()) + len(text)) as partial:
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        try:
            save_file(tensors, partial / ADAPTER_WEIGHTS, metadata=header)
        except SafetensorError as error:  # how the library says that the system refused a write
            raise BadInput(f"{ADAPTER_WEIGHTS} cannot be written: {error}", hint="is the disk full?") from None
        (partial / ADAPTER_WEIGHTS).chmod(0o644)


def load_adapter(folder: Path, decoder: Decoder, *, family: Family, base_sha256: Callable[[], str]) -> AdapterReport:
    """Put the adapter of a folder beside a decoder's weights, and return what was found. Mutates: decoder.

    base_sha256: returns the digest of the decoder's weights; called where the adapter says for which it was made.
    Raises: CheckpointMismatch where it was made for other weights, or its tensors do not fit; BadFile where one holds
        NaN or infinity, too; NotFound.
    """
    with open_adapter(folder) as source:
        config, notes = source.metadata, list[str]()
        named = {str(place[BASE_KEY]) for place in (source.header, config) if BASE_KEY in place}
        if not named:
            notes.append(f"{folder.name} does not say for which weights it was made: only its shapes were checked")
        elif named != {found := base_sha256()}:
            raise CheckpointMismatch(
                f"{folder.name} was made for weights of SHA-256 {named.pop()[:16]}, these have {found[:16]}",
                hint="load it with the model that it was made for",
            )
        for name, tensor in source.tensors.items():
            _check_tensor(name, tensor)
        tensors = {name: _read_matrix(source, tensor, folder) for name, tensor in source.tensors.items()}
        attach_peft(decoder, family, config=config, tensors=tensors)
    return AdapterReport(sha256=digest_files([folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]), notes=tuple(notes))


def adapter_bytes(folder: Path) -> int:
    """Return the bytes that the adapter of a folder takes in memory; only its headers are read."""
    with open_adapter(folder) as source:
        return sum(prod(t.shape) * _dtype_of(t).itemsize for t in source.tensors.values())


def _check_tensor(name: str, tensor: StoredTensor) -> None:
    """Refuse what is no matrix, or holds other numbers than adapters do. Raises: CheckpointMismatch."""
    if tensor.format not in FORMATS or len(tensor.shape) != 2 or 0 in tensor.shape:
        raise CheckpointMismatch(
            f"`{name}` is {tensor.format} {list(tensor.shape)}, wanted is a matrix of {', '.join(FORMATS)}"
        )


def _read_matrix(source: Source, tensor: StoredTensor, folder: Path) -> Tensor:
    """Return a matrix of an adapter, all of it finite numbers. Raises: BadFile."""
    matrix = read_tensor(source, tensor.name, _dtype_of(tensor))
    # One pass; NaN is the least and the most. What is empty has neither.
    if matrix.numel() and not all(extreme.isfinite() for extreme in matrix.aminmax()):
        raise BadFile(
            f"{folder / ADAPTER_WEIGHTS}: `{tensor.name}` has {int((~matrix.isfinite()).sum()):,} of "
            f"{matrix.numel():,} values that are NaN or infinite",
            hint="copy the file again, or take an adapter from before its training diverged",
        )
    return matrix


def _dtype_of(tensor: StoredTensor) -> torch.dtype:
    return torch.bfloat16 if tensor.format == "BF16" else torch.float32


def save_merged(
    folder: Path,
    decoder: Decoder,
    *,
    family: Family,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    write_text_files: Callable[[Path], None],
    progress: Progress = lambda done, total: None,
) -> float:
    """Write a decoder with its adapter merged as a checkpoint, and return what rounding took (see `merge`).

    dtype: of the weights. config, write_text_files: see `save_checkpoint`.
    Mutates: decoder, which is as it was saved afterwards.
    Raises: BadInput.
    """
    lost = merge(decoder, dtype)
    unpack(decoder, dtype)
    save_checkpoint(folder, decoder, family=family, config=config, write_text_files=write_text_files, progress=progress)
    return lost
