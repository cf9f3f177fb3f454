"""`freehold convert`: any checkpoint that Freehold reads becomes a Hugging Face folder of safetensors."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.checkpoint.fetch import find
from freehold.cli import options
from freehold.cli.loading import load_model
from freehold.cli.numbers import bytes_text
from freehold.cli.options import DTYPE_NAMES, Dtype
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_json, show_line
from freehold.errors import BadInput
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.checkpoint.load import Described
    from freehold.models.decoder import Decoder

PLAIN_FORMATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


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
    _check_is_free(dest)
    chosen = dtype or _kept_dtype(path)
    loaded = load_model(source, device="cpu", dtype=chosen, threads=None)
    from freehold.checkpoint.save import save_checkpoint
    from freehold.trust.identity import digest_files

    with bytes_bar(f"Writing {dest.name}") as progress:
        save_checkpoint(
            dest,
            loaded.decoder,
            family=loaded.described.family,
            config=loaded.described.config,
            write_text_files=loaded.text.write_files,
            progress=progress,
        )
    with waiting("Taking digests"):
        sha256 = {file.name: digest_files([file]) for file in sorted(dest.iterdir())}
    changes = _changes(loaded.described, loaded.decoder)
    if as_json:
        notes = list(loaded.report.notes)
        show_json({"folder": str(dest), "dtype": chosen, "changes": changes, "notes": notes, "sha256": sha256})
        return
    size = sum(file.stat().st_size for file in dest.iterdir())
    show_line(f"{dest}: {loaded.described.family.name}, {chosen}, {bytes_text(size)}")
    for line in (*changes, *loaded.report.notes):
        show_line(f"  {line}")
    for file, digest in sha256.items():
        show_line(f"SHA-256 {digest}  {file}")


def _check_is_free(dest: Path) -> None:
    """Refuse a destination before minutes of loading, and not after them."""
    if dest.exists():
        raise BadInput(f"{dest.name} exists already", hint="name a folder that does not")
    if not dest.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {dest.parent} to put {dest.name} into")


def _kept_dtype(path: Path) -> Dtype:
    """Return the dtype that loses nothing: the stored one, or float32."""
    with waiting("Starting"):
        from freehold.checkpoint.load import open_described, plain_dtype
    source, described = open_described(path)
    source.close()
    stored = str(plain_dtype(described)).removeprefix("torch.")
    return next((short for short, name in DTYPE_NAMES.items() if name == stored), "f32")


def _changes(described: "Described", decoder: "Decoder") -> list[str]:
    """Return what became of the tensors, a line for each storage format and the dtype it is written in."""
    parameters = dict(decoder.named_parameters())
    counts = Counter(
        (tensor.format, str(parameters[match.name].dtype).removeprefix("torch."))
        for match in described.matches.matches
        for tensor in match.stored
    )
    return [_change(stored, dtype, count) for (stored, dtype), count in sorted(counts.items())]


def _change(stored: str, dtype: str, count: int) -> str:
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    if PLAIN_FORMATS.get(stored) == dtype:
        return f"{tensors} of {stored}: unchanged"
    is_exact = dtype == "float32"
    how = "exact" if is_exact else "rounded once"
    if stored not in PLAIN_FORMATS:
        how = "dequantized in float32, " + ("not rounded" if is_exact else "then rounded once")
    return f"{tensors} of {stored} to {dtype}: {how}"
