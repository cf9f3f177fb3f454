"""`freehold convert`: any checkpoint that Freehold reads becomes a Hugging Face folder of safetensors."""

from typing import Annotated

import typer

from freehold.checkpoint.fetch import find
from freehold.cli import options
from freehold.cli.numbers import bytes_text
from freehold.cli.options import DTYPE_NAMES, Dtype
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_json, show_line
from freehold.settings import Settings


def convert(
    source: options.ModelName,
    dest: options.NewFolder,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="What the weights are stored in. Without it the stored one if all are plain, else f32, "
            "which keeps the values of quantized weights exactly.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder of safetensors.

    Beside the weights it has config, tokenizer, chat template and generation config. Quantized weights are
    dequantized in float32 and rounded once. DEST must not exist; it appears whole or not at all, also when Ctrl-C
    ends the command.

    Examples:

    \b
      freehold convert smollm2-135m-instruct ./smollm2
      freehold convert model.gguf ./model-bf16 --dtype bf16
    """
    path = find(source, Settings().models_dir)
    with waiting("Starting"):
        from freehold.checkpoint.convert import convert_checkpoint
        from freehold.checkpoint.dtypes import dtype_name, loss_of, parse_dtype
        from freehold.engine.machine import main_memory
        from freehold.trust.identity import digest_files
    with bytes_bar(f"Converting {path.name}") as progress:
        converted = convert_checkpoint(
            path,
            dest,
            dtype=parse_dtype(DTYPE_NAMES[dtype]) if dtype else None,
            memory_bytes=main_memory().available_bytes,
            progress=progress,
        )
    with waiting("Taking digests"):
        sha256 = {file.name: digest_files([file]) for file in sorted(dest.iterdir())}
    became = [(stored, kept, count) for (stored, kept), count in converted.report.tensors.items() if kept is not None]
    counts = sorted((stored, dtype_name(kept), count) for stored, kept, count in became)
    changes = [_change(stored, kept, count, loss_of(stored, parse_dtype(kept))) for stored, kept, count in counts]
    written = next(short for short, name in DTYPE_NAMES.items() if name == dtype_name(converted.dtype))
    notes = list(converted.report.notes)
    if as_json:
        show_json({"folder": str(dest), "dtype": written, "changes": changes, "notes": notes, "sha256": sha256})
        return
    size = sum(file.stat().st_size for file in dest.iterdir())
    show_line(f"{dest}: {converted.family}, {written}, {bytes_text(size)}")
    for line in (*changes, *notes):
        show_line(f"  {line}")
    for file, digest in sha256.items():
        show_line(f"SHA-256 {digest}  {file}")


def _change(stored: str, kept: str, count: int, loss: str) -> str:
    """Return what became of the tensors of one storage format."""
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    return f"{tensors} of {stored}: {loss}" if loss == "unchanged" else f"{tensors} of {stored} to {kept}: {loss}"
