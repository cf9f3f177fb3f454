"""`freehold convert`: any checkpoint that Freehold reads becomes a Hugging Face folder of safetensors."""

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
from freehold.errors import BadInput, BadRequest
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.checkpoint.load import Described
    from freehold.models.decoder import Decoder

PLAIN_FORMATS: dict[str, Dtype] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


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
    if chosen == "f16":
        _check_range(loaded.decoder)
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
    changes = [_change(stored, count, chosen) for stored, count in sorted(loaded.report.formats.items())]
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
        from freehold.checkpoint.load import open_described
    source, described = open_described(path)
    source.close()
    return _stored_dtype(described) or "f32"


def _stored_dtype(described: "Described") -> Dtype | None:
    """Return what the embeddings are stored in, None where any weight is quantized."""
    formats = {tensor.format for match in described.matches.matches for tensor in match.stored}
    if not formats <= PLAIN_FORMATS.keys():
        return None
    embeddings = next(match for match in described.matches.matches if match.name == "embeddings.weight")
    return PLAIN_FORMATS[embeddings.stored[0].format]


def _check_range(decoder: "Decoder") -> None:
    """Refuse float16 where a value has become infinite in it, or is no number."""
    for name, parameter in decoder.named_parameters():
        if not parameter.isfinite().all():
            raise BadRequest(f"{name} has values that float16 cannot hold", hint="use --dtype bf16")


def _change(stored: str, count: int, dtype: Dtype) -> str:
    """Return what became of the tensors of one storage format."""
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    if PLAIN_FORMATS.get(stored) == dtype:
        return f"{tensors} of {stored}: unchanged"
    how = "exact" if dtype == "f32" else "rounded once"
    if stored not in PLAIN_FORMATS:
        how = "dequantized in float32, " + ("not rounded" if dtype == "f32" else "then rounded once")
    return f"{tensors} of {stored} to {DTYPE_NAMES[dtype]}: {how}"
