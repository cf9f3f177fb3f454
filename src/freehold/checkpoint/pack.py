"""Weights as the kernels read them: packed when a model is loaded, or once and for all into a kept file.

Belongs here: which weights are packed, from which bytes, and the file beside a model that keeps the result, so that the
next start maps it instead of packing again. Not here: the packed layout (native/formats.h), and who uses the weights.

The kept file is safetensors with one uint8 tensor per packed parameter, and the fingerprint of the model that it was
made from. It holds nothing that the model does not: deleting it costs the time to pack again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from freehold.checkpoint.dtypes import DTYPE_OF_FORMAT
from freehold.checkpoint.rules import Match
from freehold.checkpoint.source import Source, open_source
from freehold.errors import BadFile, BadInput
from freehold.models.names import SAME
from freehold.ops.weight import Packed, pack, packed_bytes

# Which parameters are matrices of products or tables of rows.
PACKABLE = ("_proj.weight", "experts.up_proj", "experts.down_proj", "embeddings.weight", "lm_head.weight")

LAYOUT = 2  # of panels; a kept file of another is packed anew
FINGERPRINT = "fingerprint"
SAMPLES, SAMPLE_BYTES = 64, 4096


def is_packable(match: Match) -> bool:
    """Return whether a weight can be packed at its stored width: matrices of one format whose rows stay whole."""
    has_whole_rows = len({tensor.format for tensor in match.stored}) == 1 and match.rule.transform.keeps_rows
    is_matrix = match.name.endswith(PACKABLE) and not hasattr(match.parameter, "stays_float32")
    return has_whole_rows and is_matrix and packed_size(match) > 0


def is_quantized(match: Match) -> bool:
    """Return whether a weight that can be packed is a quantized one."""
    return match.stored[0].format not in DTYPE_OF_FORMAT


def packed_size(match: Match) -> int:
    """Return the bytes of a packed weight; 0 where its format cannot be packed."""
    return packed_bytes(match.stored[0].format, tuple(match.parameter.shape))


def pack_weight(source: Source, match: Match, *, out: Tensor) -> Packed:
    """Return a weight packed from what its file stores, little of which stays in memory.

    Mutates: out, of `packed_size`.
    """
    format, shape = match.stored[0].format, tuple(match.parameter.shape)
    part_shape = shape[1:] if match.rule.is_stack else shape
    for tensor, part in zip(match.stored, out.chunk(len(match.stored)), strict=True):
        stored = source.bytes_of(tensor.name)
        if match.rule.transform is not SAME:
            stored = match.rule.transform.load(stored.view(part_shape[0], -1)).contiguous().view(-1)
        pack(stored, format, shape=part_shape, out=part)
        source.release(tensor.name)
    return Packed(format=format, shape=shape, data=out)


def kept_path(weights: Path) -> Path:
    """Return where the kept file of a weight file is."""
    return weights.with_name(f"{weights.name}.packed.safetensors")


def open_kept(source: Source) -> Source | None:
    """Return the kept file that was made from this source, None where there is none or it was made from another."""
    path = kept_path(source.files[0])
    if not path.is_file():
        return None
    try:
        kept = open_source(path)
    except BadFile:
        return None
    stored = kept.tensors.get(FINGERPRINT)
    if stored is None or bytes(kept.bytes_of(FINGERPRINT).tolist()) != fingerprint(source):
        kept.close()
        return None
    return kept


def kept_weight(kept: Source, match: Match) -> Packed:
    """Return a packed weight as a view of the kept file.

    Raises: BadFile where that lacks it.
    """
    stored = kept.tensors.get(match.name)
    if stored is None or stored.num_bytes != packed_size(match):
        name = kept.files[0].name
        raise BadFile(
            f"{name} has no `{match.name}` of the wanted size", hint=f"delete {name}: it is made anew by pack"
        )
    return Packed(format=match.stored[0].format, shape=tuple(match.parameter.shape), data=kept.bytes_of(match.name))


def fingerprint(source: Source) -> bytes:
    """Return what tells one model's files from another's without reading them whole: their sizes, their tensors' names
    and places, and samples of their bytes."""
    digest = hashlib.sha256(f"packed layout {LAYOUT}".encode())
    for file in source.files:
        digest.update(f"{file.stat().st_size}".encode())
    for tensor in source.tensors.values():
        digest.update(f"{tensor.name} {tensor.format} {tensor.shape} {tensor.offset}".encode())
    names = sorted(source.tensors, key=lambda name: source.tensors[name].num_bytes)[-SAMPLES:]
    for name in names:
        digest.update(bytes(source.bytes_of(name)[:SAMPLE_BYTES].tolist()))
    return digest.digest()


def write_kept(
    source: Source, matches: Iterable[Match], *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write the kept file of a source, one weight in memory at a time; it comes into being whole or not at all.

    Raises: BadInput where nothing can be packed, or the disk has too little room or cannot be written.
    """
    packed = [match for match in matches if is_packable(match)]  # none without the compiled kernels
    sizes = {FINGERPRINT: hashlib.sha256().digest_size} | {match.name: packed_size(match) for match in packed}
    path, total = kept_path(source.files[0]), sum(sizes.values())
    if not packed:
        raise BadInput(
            f"{source.files[0].name} has no weights to pack", hint="float32 and float16 are used as they lie"
        )
    if (free := shutil.disk_usage(path.parent).free) < total:
        raise BadInput(f"{path.name} needs {total:,} bytes on its disk, {free:,} are free")
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
            try:
                partial.write(_header(sizes))
                partial.write(fingerprint(source))
                done = 0
                for match in packed:
                    out = torch.empty(packed_size(match), dtype=torch.uint8)
                    partial.write(pack_weight(source, match, out=out).data.numpy().data)
                    done += len(out)
                    progress(done, total)
                os.chmod(partial.name, 0o644)
                os.replace(partial.name, path)
            except BaseException:
                os.unlink(partial.name)
                raise
    except OSError as error:
        raise BadInput(f"{path.name} cannot be written: {error.strerror}", hint="is the disk full?") from None
    return path


def _header(sizes: dict[str, int]) -> bytes:
    """Return the header of a safetensors file of uint8 tensors: eight bytes of length, then JSON."""
    entries, offset = {}, 0
    for name, size in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
