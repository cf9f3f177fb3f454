"""Any checkpoint that Freehold reads becomes a Hugging Face folder of safetensors."""

from dataclasses import dataclass
from pathlib import Path

import torch

from freehold.checkpoint.load import LoadReport, Progress, load_decoder, open_described, plain_dtype
from freehold.checkpoint.save import check_is_free, save_checkpoint
from freehold.checkpoint.text_side import load_text_side


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written: the family and dtype of the model, and what became of the weights on their way."""

    family: str
    dtype: torch.dtype
    report: LoadReport


def convert_checkpoint(
    path: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the checkpoint at `path` as a new folder, and return what was done to it.

    dtype: None keeps the stored one where all weights are plain, and is float32 where any is quantized.
    memory_bytes: what the weights may take (see `load_decoder`).
    Raises: BadInput and its kinds; nothing is left at `folder` then.
    """
    check_is_free(folder)  # before minutes of loading, and not only after them
    source, described = open_described(path)
    with source:
        text = load_text_side(source, described)
        decoder, report = load_decoder(
            source,
            described,
            dtype=dtype or plain_dtype(described) or torch.float32,
            device=torch.device("cpu"),
            memory_bytes=memory_bytes,
            progress=lambda done, total: progress(done, 2 * total),
        )
        save_checkpoint(
            folder,
            decoder,
            family=described.family,
            config=described.config,
            write_text_files=text.write_files,
            progress=lambda done, total: progress(total + done, 2 * total),
        )
    return Converted(family=described.family.name, dtype=decoder.dtype, report=report)
