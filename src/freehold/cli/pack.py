"""`freehold pack`: keep a model's packed weights beside it, so that it starts at once."""

from freehold.checkpoint.fetch import find
from freehold.cli import options
from freehold.cli.numbers import bytes_text
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_json, show_line
from freehold.settings import Settings


def pack(source: options.ModelName, as_json: options.Json = False) -> None:
    """Keep a quantized or bfloat16 model's weights as the kernels read them, in a file beside it.

    Loading such a model packs its weights first, which takes seconds for a large one. With the kept file they are
    mapped instead. It takes about the room of the model once more, appears whole or not at all, and is used from the
    next start on for as long as the model's file stays the same. Deleting it loses nothing.

    Examples:

    \b
      freehold pack smollm2-135m-instruct
      freehold pack ./nano-30b-a3b-q4_0.gguf
    """
    path = find(source, Settings().models_dir)
    with waiting("Starting"):
        from freehold.checkpoint.load import open_described
        from freehold.checkpoint.pack import write_kept
    opened, described = open_described(path)
    with opened, bytes_bar(f"Packing {path.name}") as progress:
        kept = write_kept(opened, described.matches.matches, progress=progress)
    if as_json:
        show_json({"path": str(kept), "bytes": kept.stat().st_size})
        return
    show_line(f"{kept}: {bytes_text(kept.stat().st_size)}, used whenever {path.name} is loaded")
