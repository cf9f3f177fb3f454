"""A server's start in less time: what the system can do while Python imports, and no search for garbage meanwhile."""

import atexit
import ctypes
import gc
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from freehold.cli.progress import waiting


@contextmanager
def starting() -> Iterator[Executor]:
    """Yield a thread for what can be done beside a start.

    No garbage is collected meanwhile, and what is there at the end stays as long as the process: modules, classes and a
    vocabulary, which would be looked through again and again for a tenth of the time.
    """
    gc.disable()
    try:
        with ThreadPoolExecutor(max_workers=1) as beside:
            yield beside
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # for the interpreter's own last collection


def import_torch(beside: Executor) -> None:
    """Import torch and the engine, and FastAPI while the system loads torch's library.

    On that thread, not on this one: a cycle of torch's holds the frames that imported it first. Those of this thread
    come to hold the open file of the model, and no collection would let it go.
    """
    with waiting("Starting"):
        beside.submit(load_torch_library)
        import_module("fastapi")
        beside.submit(import_module, "freehold.engine.engine").result()


def load_torch_library() -> None:
    """Have the system load torch's largest library, which `import torch` finds loaded. Where it fails, that says why.

    To bind its symbols and register its operators takes no Python; but who imports it keeps all other threads waiting,
    and so does ctypes.CDLL(path).
    """
    torch = find_spec("torch")
    for folder in (torch and torch.submodule_search_locations) or ():
        ctypes.CDLL(None).dlopen(os.fsencode(Path(folder) / "lib" / "libtorch_cpu.so"), os.RTLD_NOW)
