"""Tiny checkpoint files for tests: valid ones from the formats' own libraries, and raw ones with any field wrong."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch

STRING, ARRAY, UINT32, UINT64, BOOL = 8, 9, 4, 10, 7  # GGUF's numbers of value types
F32, Q8_0 = 0, 8  # ggml's numbers of tensor types


def safetensors_bytes() -> bytes:
    """Return a valid safetensors file of three tensors, as its library writes it."""
    tensors = {
        "norm.weight": torch.arange(4, dtype=torch.float32),
        "proj.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "ids": torch.arange(5, dtype=torch.uint8),
    }
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def entry(dtype: str, shape: Sequence[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file with this header (JSON text as it is, other values written as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, Any]) -> None:
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(path: Path) -> Path:
    """Write a valid GGUF file with values and tensors of several types, as its library writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 0.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", ""])
    writer.add_array("llama.attention.head_count_kv", [2, 0])
    writer.add_tensor("output_norm.weight", np.arange(3, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.arange(8, dtype=np.float16).reshape(2, 4))
    values = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    """Return a string as GGUF stores it."""
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(name: str, sizes: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    layout = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return text(name) + layout


def raw_gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> bytes:
    """Return a GGUF file of these parts, its data aligned to 32 bytes, with counts that may lie."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data
