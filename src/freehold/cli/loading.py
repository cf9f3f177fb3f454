"""How a command gets its model: found, loaded under a progress bar, on the threads that were asked for."""

from typing import TYPE_CHECKING

from freehold.checkpoint.fetch import find
from freehold.cli.options import DTYPE_NAMES, Dtype
from freehold.cli.progress import bytes_bar, waiting
from freehold.cli.terminal import show_note
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.engine.model import Model


def load_model(name: str, *, device: str, dtype: Dtype | None, threads: int | None) -> "Model":
    """Return the model of a path or name, ready to run. What loading had to say is told."""
    path = find(name, Settings().models_dir)  # before torch: a name that is not known should not take seconds
    with waiting("Starting"):
        import torch

        from freehold.engine.machine import usable_threads
        from freehold.engine.model import load
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_threads()))
    with bytes_bar(f"Loading {path.name}") as progress:
        model = load(path, device=device, dtype=DTYPE_NAMES[dtype] if dtype else None, progress=progress)
    for note in model.report.notes:
        show_note(f"note: {note}")
    return model
