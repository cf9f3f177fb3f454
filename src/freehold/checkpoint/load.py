"""A checkpoint becomes a decoder: headers first, then the spec, then the match, then the bytes."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.checkpoint.dtypes import DTYPE_OF_FORMAT
from freehold.checkpoint.pack import is_packable, kept_weight, open_kept, pack_weight, packed_size
from freehold.checkpoint.rules import MOST_MISSING, Match, Matches, match_tensors
from freehold.checkpoint.source import Source, StoredTensor, open_source
from freehold.errors import BadFile, BadInput, BadRequest, CheckpointMismatch
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.families import Family, GgufFields, family_of_config, family_of_gguf
from freehold.models.linear import set_weight
from freehold.models.names import SAME, TensorNames
from freehold.models.spec import DecoderSpec
from freehold.ops.weight import Weight, large_bytes
from freehold.quantize.gguf_blocks import BLOCKS, dequantize

# A file's pages are released after so many bytes, so that reading a tensor keeps little of the file in memory.
READ_BYTES = 4 << 20

# Beside packed weights, smaller ones are copied: to meet one page of a file may bring in two megabytes around it, and
# the norms of a model are spread over all of its file.
LEAST_MAPPED_BYTES = 1 << 20

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


@dataclass(frozen=True, kw_only=True)
class Described:
    """A checkpoint whose headers were read and matched, and none of whose weights were.

    config: the config.json, or what the GGUF metadata stand for.
    """

    family: Family
    config: Mapping[str, Any]
    spec: DecoderSpec
    names: TensorNames
    matches: Matches
    notes: tuple[str, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.num_bytes for match in self.matches.matches for tensor in match.stored)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading did: where bytes went, and what was left out and why.

    tensors: number of stored tensors by storage format and the dtype of the parameter that they became, None where they
    stayed packed.
    mapped_bytes: weights used in place in the file. copied_bytes: weights that were converted or moved into memory of
    their own.
    """

    tensors: Mapping[tuple[str, torch.dtype | None], int]
    mapped_bytes: int
    copied_bytes: int
    notes: tuple[str, ...]


def describe(source: Source) -> Described:
    """Return what a source holds, after checking that its tensors and its config fit each other exactly.

    Raises: BadFile, UnsupportedModel, CheckpointMismatch; no weight is read.
    """
    family, config = _family_and_config(source)
    spec = family.read_config(config)
    notes = []
    if spec.mtp and not _stores_mtp(source):
        spec, config = replace(spec, mtp=None), {**config, "num_nextn_predict_layers": 0}
        notes.append("the config has an MTP module, the file stores none: it is left out")
    if "auto_map" in config:
        notes.append("auto_map names code of its own: ignored, Freehold runs no code from a checkpoint")
    if len(spec.blocks) > len(source.tensors) + MOST_MISSING:
        raise CheckpointMismatch(f"the config has {len(spec.blocks)} blocks, the file {len(source.tensors)} tensors")
    choose_names = family.tensor_names if source.kind == "safetensors" else family.gguf_names
    names = choose_names(spec, source.tensors.keys())
    matches = match_tensors(_measured(spec), names, source.tensors)
    notes += [f"`{name}` holds no weight: ignored" for name in matches.ignored]
    return Described(family=family, config=config, spec=spec, names=names, matches=matches, notes=tuple(notes))


def _family_and_config(source: Source) -> tuple[Family, Mapping[str, Any]]:
    if source.kind == "safetensors":
        if not source.metadata:
            raise BadFile("there is no config.json beside the weights", hint="copy it from where the weights came")
        return family_of_config(source.metadata), source.metadata
    architecture = source.metadata.get("general.architecture")
    family = family_of_gguf(architecture)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    divisors = _rope_divisors(source)
    return family, family.gguf_config(
        GgufFields(source.metadata, str(architecture), shapes=shapes, rope_divisors=divisors)
    )


def _rope_divisors(source: Source) -> Tensor | None:
    """Return the one tensor whose values belong to the config."""
    if (tensor := source.tensors.get("rope_freqs.weight")) is None:
        return None
    if len(tensor.shape) != 1 or tensor.num_bytes > READ_BYTES:
        raise BadFile(f"`{tensor.name}` has shape {list(tensor.shape)}, wanted is a short list of divisors")
    return read_tensor(source, tensor.name, torch.float32)


def _measured(spec: DecoderSpec) -> Decoder:
    """Return the decoder on the meta device, for its names and shapes."""
    try:
        return build_decoder(spec, dtype=torch.float32)
    except RuntimeError:  # of torch, where a number of bytes does not fit into 64 bits
        raise BadFile("the config's sizes make a tensor that is larger than any can be") from None


def _stores_mtp(source: Source) -> bool:
    return any(name.startswith("mtp.") or ".nextn." in name for name in source.tensors)


def plain_dtype(described: Described) -> torch.dtype | None:
    """Return the dtype that most of a model's values are stored in, None where any of them is quantized.

    Most, for GGUF files keep norms in F32 beside matrices of BF16. Parameters that are float32 in every model, such as
    a router's, say nothing.
    """
    num_values: Counter[torch.dtype | None] = Counter()
    for match in described.matches.matches:
        if not hasattr(match.parameter, "stays_float32"):
            for tensor in match.stored:
                num_values[DTYPE_OF_FORMAT.get(tensor.format)] += math.prod(tensor.shape)
    return None if None in num_values else max(num_values, key=num_values.__getitem__)


def default_dtype(described: Described, device: torch.device) -> torch.dtype:
    """Return the dtype a model loads in when none is asked for.

    The stored one, if all weights are plain; for quantized weights the one that keeps their values exactly on a CPU
    (float32), and bfloat16 elsewhere. float16 becomes float32 on a CPU, where it has no fast arithmetic.
    """
    stored = plain_dtype(described)
    if device.type == "cpu":
        return torch.bfloat16 if stored is torch.bfloat16 else torch.float32
    return stored or torch.bfloat16


def load_decoder(
    source: Source,
    described: Described,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_packed: bool = False,
    memory_bytes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Decoder, LoadReport]:
    """Return the decoder of a described source, weights mapped where format, dtype and device allow.

    keep_packed: whether quantized and bfloat16 matrices are packed for the kernels, their values at the width they are
        stored at.
    Memory: the weights in `dtype` or packed, plus scratch for one tensor that a rule reshapes, at most.
    memory_bytes: what the weights that cannot be mapped may take; None does not ask.
    Raises: BadInput where they take more, before any is read; BadRequest where float16 cannot hold a value.
    """
    decoder = build_decoder(described.spec, dtype=dtype)
    parameters = dict(decoder.named_parameters())
    if memory_bytes is not None:
        _check_room(described, parameters, device=device, keep_packed=keep_packed, memory_bytes=memory_bytes)
    mapped = copied = 0
    sizes = {
        match.name: _loaded_bytes(match, parameters[match.name], keep_packed) for match in described.matches.matches
    }
    total = sum(sizes.values())
    progress(0, total)
    tensors: Counter[tuple[str, torch.dtype | None]] = Counter()
    with (open_kept(source) if keep_packed else None) or nullcontext() as kept:
        room = iter(_packed_room(described, sizes) if keep_packed and not kept else ())
        for match in described.matches.matches:
            wanted = parameters[match.name].dtype
            is_packed, value_bytes = keep_packed and is_packable(match), sizes[match.name]
            value: Weight
            if is_packed and kept:
                value, is_mapped = kept_weight(kept, match), True
            elif is_packed:
                value, is_mapped = pack_weight(source, match, out=next(room)), False
            elif _is_mappable(match, wanted, device) and not (keep_packed and value_bytes < LEAST_MAPPED_BYTES):
                value, is_mapped = _map(source, match, wanted), True
            else:
                value, is_mapped = _convert(source, match, wanted).to(device), False
            mapped, copied = mapped + is_mapped * value.nbytes, copied + (not is_mapped) * value.nbytes
            _assign(decoder, match.name, value)
            tensors.update((tensor.format, None if is_packed else wanted) for tensor in match.stored)
            progress(mapped + copied, total)
    decoder.tie_embeddings()
    if described.matches.repeated_head:
        _check_repeated_head(source, described.names)
    return decoder.requires_grad_(False), LoadReport(
        tensors=tensors, mapped_bytes=mapped, copied_bytes=copied, notes=described.notes
    )


def _packed_room(described: Described, sizes: Mapping[str, int]) -> Sequence[Tensor]:
    """Return room for each packed weight, all in one piece, which the system can back with large pages."""
    wanted = [sizes[match.name] for match in described.matches.matches if is_packable(match)]
    return large_bytes(sum(wanted)).split(wanted)


def _check_room(
    described: Described,
    parameters: Mapping[str, Tensor],
    *,
    device: torch.device,
    keep_packed: bool,
    memory_bytes: int,
) -> None:
    """Refuse what would end in the system killing this process."""
    needed = sum(
        _loaded_bytes(match, parameters[match.name], keep_packed)
        for match in described.matches.matches
        if (keep_packed and is_packable(match)) or not _is_mappable(match, parameters[match.name].dtype, device)
    )
    if needed > memory_bytes:
        raise BadInput(
            f"the weights need {needed:,} bytes of memory, {memory_bytes:,} are free on {device}",
            hint="a smaller dtype takes less; `freehold inspect` says what fits",
        )


def _loaded_bytes(match: Match, parameter: Tensor, keep_packed: bool) -> int:
    return packed_size(match) if keep_packed and is_packable(match) else parameter.nbytes


def _is_mappable(match: Match, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a parameter can be used as it lies in the file."""
    tensor = match.stored[0]
    is_same = len(match.stored) == 1 and not match.rule.is_stack and match.rule.transform is SAME
    is_stored_so = DTYPE_OF_FORMAT.get(tensor.format) is dtype and tensor.offset % dtype.itemsize == 0
    return device.type == "cpu" and is_same and is_stored_so


def _map(source: Source, match: Match, dtype: torch.dtype) -> Tensor:
    """Return the parameter as a view of the file."""
    tensor = match.stored[0]
    return source.bytes_of(tensor.name).view(dtype).view(tensor.shape)


def _convert(source: Source, match: Match, dtype: torch.dtype) -> Tensor:
    """Return the parameter in memory of its own."""
    if match.rule.transform is not SAME:
        assert not match.rule.is_stack, "no family transforms the parts of a stack"
        stored = read_tensor(source, match.stored[0].name, torch.float32)
        value = match.rule.transform.load(stored).to(dtype).contiguous()
        _check_range(match.stored[0], value)
        return value
    value = torch.empty(match.parameter.shape, dtype=dtype)
    parts = value.unbind() if match.rule.is_stack else [value]
    for tensor, part in zip(match.stored, parts, strict=True):
        _read_into(source, tensor, part)
    return value


def read_tensor(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    """Return one stored tensor, dequantized, in memory of its own."""
    tensor = source.tensors[name]
    value = torch.empty(tensor.shape, dtype=dtype)
    _read_into(source, tensor, value)
    return value


def _read_into(source: Source, tensor: StoredTensor, out: Tensor) -> None:
    """Fill `out` with a stored tensor, a few rows at a time, so that little of the file stays in memory."""
    data, blocks = source.bytes_of(tensor.name), BLOCKS[tensor.format]
    rows = out.view(-1, out.shape[-1])
    row_bytes = blocks.bytes_of_shape((rows.shape[1],))
    num_rows = max(1, READ_BYTES // max(row_bytes, 1))
    for begin in range(0, len(rows), num_rows):
        part = rows[begin : begin + num_rows]
        raw = data[begin * row_bytes : (begin + len(part)) * row_bytes]
        dequantize(raw, tensor.format, shape=tuple(part.shape), out=part)
        _check_range(tensor, part)
        source.release(tensor.name)


def _check_range(tensor: StoredTensor, value: Tensor) -> None:
    """Refuse float16 where a value has become infinite in it."""
    if value.dtype is torch.float16 and tensor.format != "F16" and value.isinf().any():
        raise BadRequest(f"{tensor.name} has values that float16 cannot hold", hint="use bfloat16 or float32")


def _assign(decoder: Decoder, name: str, value: Weight) -> None:
    owner, _, leaf = name.rpartition(".")
    set_weight(decoder.get_submodule(owner), leaf, value)


def _check_repeated_head(source: Source, names: TensorNames) -> None:
    """Refuse a tied model that stores an output head of its own with other values."""
    head, embeddings = (source.tensors[name] for name in names.head)
    same = head.format == embeddings.format and torch.equal(
        source.bytes_of(head.name), source.bytes_of(embeddings.name)
    )
    for tensor in (head, embeddings):
        source.release(tensor.name)
    if not same:
        raise CheckpointMismatch(
            f"config.json ties the embeddings, but `{head.name}` and `{embeddings.name}` are stored with other values"
        )


def open_described(path: Path) -> tuple[Source, Described]:
    """Return a checkpoint's open source and what it holds; the source is closed again where that fails."""
    source = open_source(path)
    try:
        return source, describe(source)
    except BaseException:
        source.close()
        raise
