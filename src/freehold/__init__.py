"""Freehold: own an open-weights language model.

    import freehold
    model = freehold.load("smollm2-135m-instruct")
    model.chat([{"role": "user", "content": "Hello"}], max_tokens=64).text

`load` and `Model` are imported on first use, so that `freehold --help` does not wait for torch.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from freehold.settings import let_torch_threads_sleep

if TYPE_CHECKING:
    from freehold.engine.model import Model, load

let_torch_threads_sleep()

try:
    __version__ = version("freehold")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from freehold.engine import model

        return getattr(model, name)
    raise AttributeError(f"module 'freehold' has no attribute {name!r}")
