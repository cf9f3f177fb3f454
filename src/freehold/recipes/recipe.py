"""The recipes by name: what each is told, what it plans and what it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from freehold.parallel.processes import Processes
from freehold.recipes import lora, pretrain, sft
from freehold.recipes.loop import Outcome, Watch
from freehold.recipes.plan import RunPlan
from freehold.recipes.settings import TrainSettings

Told = TypeVar("Told", bound=TrainSettings)


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Told]):
    """A whole training. presets: returns settings that were published, by name."""

    settings: type[Told]
    plan: Callable[[Told], RunPlan]
    run: Callable[[Told, Watch, Processes], Outcome]
    presets: Callable[[], Mapping[str, Told]] = dict


RECIPES: Mapping[str, Recipe[Any]] = {
    "pretrain": Recipe(
        settings=pretrain.PretrainSettings, plan=pretrain.plan, run=pretrain.run, presets=pretrain.presets
    ),
    "sft": Recipe(settings=sft.SftSettings, plan=sft.plan, run=sft.run),
    "lora": Recipe(settings=lora.LoraRunSettings, plan=lora.plan, run=lora.run),
}
