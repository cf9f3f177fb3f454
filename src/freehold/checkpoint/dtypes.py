"""The dtypes that a model can have: their names, the storage formats that hold them, and what a change of them costs.

Belongs here: the one table of them. Not here: the block formats of quantized weights (quantize/gguf_blocks.py), and
the dtypes that a safetensors header may name (checkpoint/safetensors.py).
"""

import torch

from freehold.errors import BadRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The formats whose values are used as they are stored, in both kinds of files.
DTYPE_OF_FORMAT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    if name not in DTYPES:
        raise BadRequest(f"dtype {name!r} is not known", hint=f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, as configs spell it."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def loss_of(stored_format: str, dtype: torch.dtype) -> str:
    """Return in words what a weight's values go through on their way from a storage format to a dtype."""
    stored = DTYPE_OF_FORMAT.get(stored_format)
    if stored is None:
        return "dequantized in float32, " + ("not rounded" if dtype is torch.float32 else "then rounded once")
    if stored is dtype:
        return "unchanged"
    return "exact" if dtype is torch.float32 else "rounded once"
