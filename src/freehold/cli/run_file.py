"""A training as the command line names it: a recipe, and the TOML file of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from freehold.errors import BadInput, NotFound

if TYPE_CHECKING:
    from freehold.recipes.recipe import Recipe
    from freehold.recipes.settings import TrainSettings

RecipeName = Annotated[
    Literal["pretrain", "sft", "lora"],
    typer.Argument(
        metavar="RECIPE",
        help="pretrain: a new model from its first weights on. sft: every weight of a checkpoint. lora: an adapter "
        "beside a checkpoint that stays as it is stored, quantized too.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the file; may be given again.", show_default=False
    ),
]


def read_run(recipe: "Recipe[TrainSettings]", file: Path, changes: list[str] | None) -> "TrainSettings":
    """Return the settings of a run. Raises: BadInput, NotFound."""
    from freehold.recipes.toml import read_settings

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}", hint="freehold train RECIPE --example prints one") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInput(f"{file} is no text file") from None
    return read_settings(text, recipe.settings, changes=changes or ())
