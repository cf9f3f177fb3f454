"""What every reader says about a tensor in a file, and the bounds that every reader keeps.

Belongs here: `StoredTensor`, limits, and how a name from a file is checked and shown. Not here: any file format.
"""

from dataclasses import dataclass
from math import prod

from freehold.errors import BadFile

# Headers are parsed into Python objects many times their size, so this bounds memory too. The largest real ones are far
# below: one safetensors file with every tensor of Nemotron 3 Ultra in NVFP4 would take 22 MB, a GGUF file with a
# vocabulary of 262,144 takes 15 MB.
MAX_HEADER_BYTES = 32 << 20
MAX_NAME_LENGTH = 256
MAX_DIMS = 8
_MAX_INT64 = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor's bytes are and what they mean.

    format: safetensors' dtype ("BF16", "F8_E4M3") or ggml's type ("Q4_K"); where both have a name, it means the same.
    shape: in torch's order, slowest dimension first. file: name of the file within the checkpoint, for messages.
    offset: absolute, in bytes.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int


def shown(name: str) -> str:
    """Return a name from a file as a message may show it: quoted, escaped and short."""
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}... ({len(name)} characters)"


def check_name(name: str, *, file: str) -> None:
    """Refuse a name that is empty, too long, or would garble the terminal that shows it.

    Raises: BadFile.
    """
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise BadFile(f"{file}: {shown(name)} is no name: 1 to {MAX_NAME_LENGTH} printable characters are")


def check_shape(shape: tuple[int, ...], *, name: str, file: str) -> None:
    """Refuse a shape with more dimensions or elements than a tensor can have.

    Raises: BadFile.
    """
    if len(shape) > MAX_DIMS:
        raise BadFile(f"{file}: tensor {shown(name)} has {len(shape)} dimensions, more than {MAX_DIMS}")
    if prod(max(size, 1) for size in shape) > _MAX_INT64 // 16:  # 16 bytes is the widest element
        raise BadFile(f"{file}: tensor {shown(name)} has more elements than 64 bits can count")
