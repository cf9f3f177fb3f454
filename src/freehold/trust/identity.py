"""What a model is, as digests: the names that receipts and logs use for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Identity:
    """SHA-256 digests (hex) of what decides an answer, and the kernels that compute it.

    weights: of the weight file, or of the list of its shards' digests. config: of the settings that say how the
    weights are used. tokenizer, template, adapter: None where there is none. dtype: what the weights were loaded in.
    kernels: version and form, as in "0.1.0 avx512".
    """

    weights: str
    config: str
    tokenizer: str | None
    template: str | None
    dtype: str
    kernels: str
    adapter: str | None = None


def digest_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 of one file; of several, that of their digests and names, one line each, sorted by name."""
    digests = {file.name: _digest(file) for file in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest_config(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
