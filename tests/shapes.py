"""The shape checker: reads axes off the names of tensor arguments and verifies them on every call.

`hidden_TD` has two axes; the `T` of one argument is the `T` of every other in the same call, and `B1` is `B` plus one.
"""

import functools
import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

SUFFIX = re.compile(r"_((?:[A-Z]\d*)+)$")
AXIS = re.compile(r"([A-Z])(\d*)")


def check_shapes(module: ModuleType) -> None:
    """Wrap the public functions of an ops module. Mutates: the module; import from it only afterwards."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == module.__name__:
            setattr(module, name, checked(function))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its tensor arguments' rank and sizes checked before each call."""
    signature = inspect.signature(function)
    axes_of = {name: AXIS.findall(suffix[1]) for name in signature.parameters if (suffix := SUFFIX.search(name))}

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in signature.bind(*arguments, **keywords).arguments.items():
            if name not in axes_of or not isinstance(value, Tensor):
                continue
            axes = axes_of[name]
            assert value.ndim == len(axes), f"{function.__name__}: {name} has shape {tuple(value.shape)}"
            for (letter, more), size in zip(axes, value.shape, strict=True):
                seen, where = sizes.setdefault(letter, (size - int(more or 0), name))
                wanted = seen + int(more or 0)
                assert size == wanted, f"{function.__name__}: {letter}{more} is {size} in {name}, {wanted} by {where}"
        return function(*arguments, **keywords)

    return call
