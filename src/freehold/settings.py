"""The environment, read here and nowhere else."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from freehold.errors import BadInput

NativeMode = Literal["auto", "avx512vnni", "avx512", "avx2", "portable", "off"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which of several processes that were started together this one is: by torchrun, or whatever sets what it sets.

    rank: among all. count: of them. local_rank: among those of this machine. num_here: of those.
    """

    rank: int
    count: int
    local_rank: int
    num_here: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment may decide.

    models_dir: where `freehold fetch` puts models and where catalogue names are looked up (FREEHOLD_MODELS).
    native: which form of the native kernels runs: the best for this machine, one by name, or none, which leaves the
        torch references (FREEHOLD_NATIVE). A form that this machine does not run is none.
    database_url: where API keys and their usage are kept (FREEHOLD_DATABASE); without it, a file of this user.
    launch: this process among others (RANK, WORLD_SIZE, LOCAL_RANK and
        LOCAL_WORLD_SIZE, as torchrun sets them); None where it is alone.
    """

    models_dir: Path = field(default_factory=lambda: _models_dir())
    native: NativeMode = field(default_factory=lambda: _native_mode())
    database_url: str = field(default_factory=lambda: _database_url())
    launch: Launch | None = field(default_factory=lambda: _launch())


def let_torch_threads_sleep() -> None:
    """Have torch's threads sleep between its parallel loops, unless the environment says otherwise; before torch loads.

    GNU OpenMP's threads spin after each loop, on the processor that our kernels' threads want next: decode of a small
    model took more than three times as long (docs/log.md, 2026-11-24).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _models_dir() -> Path:
    if chosen := os.environ.get("FREEHOLD_MODELS"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "freehold" / "models"


def _native_mode() -> NativeMode:
    mode = os.environ.get("FREEHOLD_NATIVE", "auto")
    if mode not in get_args(NativeMode):
        raise BadInput(f"FREEHOLD_NATIVE is {mode!r}", hint=f"use one of {', '.join(get_args(NativeMode))}")
    return cast(NativeMode, mode)


def _database_url() -> str:
    if chosen := os.environ.get("FREEHOLD_DATABASE"):
        return chosen
    # Not beside the models, which lie in a cache that anybody may empty.
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return f"sqlite:///{Path(data).expanduser().absolute() / 'freehold' / 'freehold.db'}"


def _launch() -> Launch | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [os.environ.get(name) for name in names]
    if given[0] is None or given[1] is None:
        return None
    if not all(value is None or value.isdecimal() for value in given):
        raise BadInput(
            f"{', '.join(names)} are {', '.join(map(repr, given))}, wanted numbers", hint="torchrun sets them"
        )
    rank, count, local_rank, num_here = (int(value or 0) for value in given)
    return Launch(rank=rank, count=count, local_rank=local_rank, num_here=max(1, num_here))
