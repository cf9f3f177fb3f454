"""The C++ kernels for CPUs, and which form of them runs: AVX-512, portable, or none.

Belongs here: the choice of form and the signatures. Not here: any check of a tensor; the op that calls does that.
Without the compiled extension (a source tree on the path) every op runs its torch reference.
"""

from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

from freehold.settings import Settings


class Kernels(Protocol):
    """What one form offers. Tensors are addresses of contiguous CPU memory; native/*.h describe each kernel."""

    def rms_norm(
        self,
        out: int,
        hidden: int,
        weight: int,
        num_tokens: int,
        width: int,
        eps: float,
        hidden_is_bfloat16: bool,
        weight_is_bfloat16: bool,
        cast_then_multiply: bool,
        /,
    ) -> None: ...


@cache
def forms() -> dict[str, Kernels]:
    """Return the forms that this build has and this machine runs, by name, best first; none without the extension."""
    try:
        extension: Any = import_module("freehold.ops.native._kernels")
    except ModuleNotFoundError:  # only its absence is forgiven; an extension that fails to load is an error
        return {}
    return {
        name: cast(Kernels, getattr(extension, name)) for name in ("avx512", "portable") if hasattr(extension, name)
    }


@cache
def kernels() -> Kernels | None:
    """Return the form that the settings choose, or None where the torch references run."""
    return forms().get(native_report())


@cache
def native_report() -> str:
    """Return the name of what runs: "avx512", "portable" or "off"."""
    match Settings().native:
        case "auto":
            return next(iter(forms()), "off")
        case mode:
            return mode if mode in forms() else "off"
