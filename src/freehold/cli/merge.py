"""`freehold merge`: a model and its adapter become one checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import options
from freehold.cli.loading import load_model
from freehold.cli.numbers import bytes_text
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_json, show_line, show_note
from freehold.errors import BadInput

if TYPE_CHECKING:
    from freehold.engine.model import Model


def merge(
    model: options.ModelName,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter in PEFT's format.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.", show_default=False)],
    dtype: Annotated[
        options.Dtype | None,
        typer.Option(
            help="What the weights are stored in. Without it the stored one if all are plain, else bf16.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text whose loss is measured before and after merging.", show_default=False),
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Write a model with its adapter merged as a Hugging Face folder of safetensors.

    Merged weights are rounded once, to --dtype. Quantized weights are dequantized for it and are not quantized again,
    so the result is larger. What the rounding took is shown, and with --text the loss before and after.

    Examples:

    \b
      freehold merge smollm2-135m-instruct ./my-adapter --out ./my-model
      freehold merge model.gguf ./my-adapter --out ./my-model --text held-out.txt
    """
    with waiting("Starting"):
        from freehold.checkpoint.dtypes import dtype_name, parse_dtype
        from freehold.checkpoint.load import plain_dtype
        from freehold.checkpoint.save import check_is_free
        from freehold.engine.adapter import save_merged
    check_is_free(out)
    content = _read(text)
    loaded = load_model(model, adapter=adapter, device="cpu", dtype=None, threads=threads)
    stored = plain_dtype(loaded.described)
    chosen = parse_dtype(options.DTYPE_NAMES[dtype] if dtype else dtype_name(stored) if stored else "bfloat16")
    _note_quantized(model, stored is None, dtype_name(chosen))
    losses = _nats(loaded, content)
    with bytes_bar("Merging") as progress:
        lost = save_merged(
            out,
            loaded.decoder,
            family=loaded.described.family,
            config=loaded.described.config,
            dtype=chosen,
            write_text_files=loaded.text.write_files,
            progress=progress,
        )
    losses += _nats(loaded, content)
    if as_json:
        named = dict(zip(("unmerged", "merged"), losses, strict=False)) or None
        show_json({"folder": str(out), "dtype": dtype_name(chosen), "rounding": lost, "nats_per_token": named})
        return
    show_line(f"{out}: {dtype_name(chosen)}, {bytes_text(sum(file.stat().st_size for file in out.iterdir()))}")
    _show_losses(lost, losses)


def _note_quantized(model: str, is_quantized: bool, dtype: str) -> None:
    if is_quantized:
        show_note(f"note: {model} is quantized: the merged weights are {dtype}, and take more room")


def _show_losses(lost: float, losses: list[float]) -> None:
    show_line(f"  rounding took {lost:.1%} of what the adapter adds")
    if losses:
        show_line(f"  {losses[0]:.4f} nats per token unmerged, {losses[1]:.4f} merged")


def _read(text: Path | None) -> str:
    if text is None:
        return ""
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeError:
        raise BadInput(f"{text.name} is not UTF-8 text") from None
    except OSError as error:
        raise BadInput(f"{text.name} cannot be read: {error.strerror}") from None


def _nats(loaded: "Model", text: str) -> list[float]:
    if not text:
        return []
    from freehold.evaluate.perplexity import nats_per_token

    window = min(512, loaded.decoder.spec.max_positions)
    tokens = loaded.tokenizer.encode(text)
    if len(tokens) < window:
        raise BadInput(f"the text has {len(tokens)} tokens, a loss wants {window}", hint="take a longer text")
    with waiting("Measuring the loss"):
        return [nats_per_token(loaded.decoder, tokens, window=window)]
