"""`freehold fetch`: bring a model to this machine, or list what can be brought by name."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from freehold.checkpoint import fetch as fetching
from freehold.cli import options
from freehold.cli.numbers import bytes_text
from freehold.cli.progress import bytes_bar
from freehold.cli.terminal import show_json, show_line, show_table
from freehold.settings import Settings


def fetch(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A name of the catalogue, hf:owner/name[/file.gguf][@revision], or a local file or folder.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Bring a model to this machine, or list what can be brought.

    Every byte is checked. Without NAME the catalogue is listed. A model is stored whole or not at all, below
    ~/.cache/freehold/models or where FREEHOLD_MODELS says. Fetching it again verifies its digests. hf: needs the
    extra: pip install 'freehold[hub]'.

    Examples:

    \b
      freehold fetch
      freehold fetch smollm2-135m-instruct
      freehold fetch hf:Qwen/Qwen2.5-0.5B-Instruct
    """
    if source is None:
        _list_catalogue(as_json=as_json)
    else:
        _fetch(source, as_json=as_json)


def _fetch(source: str, *, as_json: bool) -> None:
    models_dir = Settings().models_dir
    was_present = fetching.is_fetched(source, models_dir=models_dir)
    with bytes_bar(f"{'Verifying' if was_present else 'Fetching'} {source}") as progress:
        path = fetching.fetch(source, models_dir=models_dir, progress=progress)
    sha256 = fetching.digests(source, models_dir=models_dir)
    name = _folder_of(path).name
    if as_json:
        show_json({"name": name, "path": str(path), "was_present": was_present, "sha256": sha256})
        return
    show_line(f"{name} {'was here already; verified' if was_present else 'is fetched'}: {path}")
    for file, digest in sha256.items():
        show_line(f"SHA-256 {digest}  {file}")
    show_line(f"next: freehold chat {name}")


def _folder_of(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _list_catalogue(*, as_json: bool) -> None:
    models_dir = Settings().models_dir
    entries = fetching.catalogue().values()
    present = {entry.name: fetching.is_fetched(entry.name, models_dir=models_dir) for entry in entries}
    if as_json:
        show_json([asdict(entry) | {"is_present": present[entry.name]} for entry in entries])
        return
    rows = [(e.name, e.licence, bytes_text(e.bytes), "present" if present[e.name] else "-", e.title) for e in entries]
    show_table([("name", "licence", "size", "here", "what it is"), *rows])
    show_line(f"models are kept in {models_dir}")
    for name in fetching.shipped():
        show_line(f"{name} came with Freehold: freehold chat {name}")
