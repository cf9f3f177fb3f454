"""A decoder becomes a Hugging Face checkpoint: safetensors shards, config, and the files of its text side.

A checkpoint is written beside its final place and renamed when it is whole, so that nothing partial is ever left there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from freehold.checkpoint.dtypes import dtype_name
from freehold.checkpoint.load import Progress
from freehold.checkpoint.rules import stored_tensors
from freehold.errors import BadInput
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.families import Family
from freehold.models.names import TensorNames

MAX_SHARD_BYTES = 2 << 30  # of one file, and of what is copied in memory to write it


def save_checkpoint(
    folder: Path,
    decoder: Decoder,
    *,
    family: Family,
    config: Mapping[str, Any],
    write_text_files: Callable[[Path], None] = lambda folder: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a checkpoint that Freehold and transformers load, in the names of the family's published files.

    config: the config.json that described the decoder. write_text_files: puts tokenizer and template there.
    Raises: BadInput where something is at `folder` already, the disk has too little room, weights are packed, or an
        adapter is beside them.
    """
    if decoder.has_adapter:
        raise BadInput("a model is saved without its adapter, or merged with it", hint="merge it, or save it apart")
    if decoder.packed_weights():
        raise BadInput("packed weights are not saved as tensors", hint="load the model with a dtype of its own")
    names = family.tensor_names(decoder.spec, ())
    with new_folder(folder, _stored_bytes(decoder)) as partial:
        _write_config(partial, decoder, config)
        write_text_files(partial)
        _write_shards(partial, decoder, names, max_shard_bytes, progress)


def check_is_free(folder: Path) -> None:
    """Refuse a folder that exists already, or that cannot be made where it should be."""
    if os.path.lexists(folder):  # a link to nowhere, too
        raise BadInput(f"{folder.name} exists already", hint="name a folder that does not")
    if not folder.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {folder.parent} to put {folder.name} into")


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a folder to be, on whose disk there is too little room. Raises: BadInput."""
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise BadInput(f"{folder.name} needs {num_bytes:,} bytes on its disk, {free:,} are free")


@contextmanager
def new_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Make a folder that comes into being with its content, or not at all.

    num_bytes: what it will hold, for which there has to be room.
    Raises: BadInput.
    """
    check_is_free(folder)
    check_room(folder, num_bytes)
    partial = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _stored_bytes(decoder: Decoder) -> int:
    return sum(parameter.nbytes for parameter in decoder.parameters())


def _write_config(folder: Path, decoder: Decoder, config: Mapping[str, Any]) -> None:
    dtype = dtype_name(decoder.dtype)
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    text = json.dumps(kept | {"dtype": dtype, "torch_dtype": dtype}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _write_shards(folder: Path, decoder: Decoder, names: TensorNames, max_shard_bytes: int, progress: Progress) -> None:
    sizes = {
        name: value.nbytes for name, value in stored_tensors(build_decoder(decoder.spec, dtype=decoder.dtype), names)
    }
    plan = _plan_shards(sizes, max_shard_bytes)
    total, done = sum(sizes.values()), 0
    for shard, tensors in _shards(decoder, names, plan):
        try:
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        except SafetensorError as error:  # how the library says that the system refused a write
            raise BadInput(f"{shard} cannot be written: {error}", hint="is the disk full?") from None
        (folder / shard).chmod(0o644)  # the library makes it for its owner alone
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress(done, total)
    if len(set(plan.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, str]:
    """Return the file of each tensor: filled in order, a new one where the next tensor would not fit."""
    shard_of: dict[str, int] = {}
    numbers = count(1)
    number, used = next(numbers), 0
    for name, size in sizes.items():
        if used and used + size > max_shard_bytes:
            number, used = next(numbers), 0
        shard_of[name], used = number, used + size
    if number == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in shard_of.items()}


def _shards(decoder: Decoder, names: TensorNames, plan: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each file with its tensors, holding one file's tensors at a time."""
    current, tensors = "", dict[str, Tensor]()
    for name, value in stored_tensors(decoder, names):
        if plan[name] != current and tensors:
            yield current, tensors
            tensors = {}
        current = plan[name]
        tensors[name] = value.contiguous()
    yield current, tensors
