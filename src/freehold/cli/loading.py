"""How a command gets its model: found, loaded under a progress bar, on the threads that were asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from freehold.checkpoint.fetch import find
from freehold.cli.options import DTYPE_NAMES, Dtype
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_note
from freehold.errors import NotFound
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.checkpoint.load import Described
    from freehold.checkpoint.source import Source
    from freehold.engine.model import Model
    from freehold.text.chat import ChatTemplate
    from freehold.text.tokenizer import Tokenizer


def load_model(
    name: str, *, device: str, dtype: Dtype | None, threads: int | None, adapter: Path | None = None
) -> "Model":
    """Return the model of a path or name, ready to run. What loading had to say is told."""
    source, described = open_model(find(name, Settings().models_dir))  # before torch: an unknown name takes no seconds
    with source:
        return load_opened_model(source, described, device=device, dtype=dtype, threads=threads, adapter=adapter)


def open_model(path: Path) -> "tuple[Source, Described]":
    """Return the open checkpoint of a path, and what its headers say. The source has to be closed."""
    with waiting("Starting"):
        from freehold.checkpoint.load import open_described

        return open_described(path)


def load_opened_model(
    source: "Source",
    described: "Described",
    *,
    device: str,
    dtype: Dtype | None,
    threads: int | None,
    adapter: Path | None = None,
) -> "Model":
    """Return what `load_model` returns, of a checkpoint that has been opened."""
    with waiting("Starting"):
        import torch

        from freehold.engine.machine import usable_threads
        from freehold.engine.model import load_opened
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_threads()))
    with bytes_bar(f"Loading {source.files[0].name}") as progress:
        chosen = DTYPE_NAMES[dtype] if dtype else None
        model = load_opened(source, described, device=device, dtype=chosen, adapter=adapter, progress=progress)
    for note in model.report.notes:
        show_note(f"note: {note}")
    return model


def load_tokenizer(name: str) -> "tuple[Tokenizer, ChatTemplate | None]":
    """Return the tokenizer and the chat template of a path or name; its weights are left alone."""
    path = find(name, Settings().models_dir)
    with waiting("Starting"):
        from freehold.checkpoint.load import open_described
        from freehold.checkpoint.text_side import load_text_side, text_side_of_folder
    if (path / "tokenizer.json").is_file():  # data for a model that is yet to be made needs no weights
        text = text_side_of_folder(path, "llama")  # a family decides how answers are read, which is not asked here
    else:
        source, described = open_described(path)
        with source:
            text = load_text_side(source, described)
    if text.tokenizer is None:
        raise NotFound(f"{path.name} has no tokenizer", hint="take tokenizer.json from the model's own repository")
    return text.tokenizer, text.template
