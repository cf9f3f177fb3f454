"""A run of a recipe in a process of a fleet."""

from dataclasses import replace
from typing import Any

from freehold.parallel.processes import Processes
from freehold.recipes import pretrain
from freehold.recipes.loop import Watch
from freehold.recipes.pretrain import PretrainSettings
from freehold.recipes.settings import ParallelSettings


def take_up(processes: Processes, settings: PretrainSettings, last_step: int) -> list[str]:
    """Go on with a run to a step, divided as the processes are, and return what was noted."""
    sizes: dict[str, Any] = {name: processes.size(name) for name in ("tensor", "expert", "context")}
    done, notes = [], list[str]()
    watch = Watch(progress=done.append, note=notes.append, should_stop=lambda: done[-1].step == last_step)
    pretrain.run(replace(settings, parallel=ParallelSettings(**sizes)), watch, processes)
    return notes
