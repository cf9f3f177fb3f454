"""The recipes by name: what each is told, what it plans and what it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from freehold.parallel.processes import Processes
from freehold.recipes import lora, pretrain, sft
from freehold.recipes.loop import Outcome, Watch
from freehold.recipes.plan import RunPlan
from freehold.recipes.settings import TrainSettings

Told = TypeVar("Told", bound=TrainSettings)
Planned = TypeVar("Planned", bound=TrainSettings, contravariant=True)


class Planning(Protocol[Planned]):
    """Says what one process of a run takes, of the least number of them that can share it if none is named."""

    def __call__(self, settings: Planned, num_processes: int | None = None) -> RunPlan: ...


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Told]):
    """A whole training. presets: returns settings that were published, by name."""

    settings: type[Told]
    plan: Planning[Told]
    run: Callable[[Told, Watch, Processes], Outcome]
    presets: Callable[[], Mapping[str, Told]] = dict


RECIPES: Mapping[str, Recipe[Any]] = {
    "pretrain": Recipe(
        settings=pretrain.PretrainSettings, plan=pretrain.plan, run=pretrain.run, presets=pretrain.presets
    ),
    "sft": Recipe(settings=sft.SftSettings, plan=sft.plan, run=sft.run),
    "lora": Recipe(settings=lora.LoraRunSettings, plan=lora.plan, run=lora.run),
}
