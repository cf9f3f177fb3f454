"""`freehold plan`: what a training takes of memory, line by line, before it is begun."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import options
from freehold.cli.numbers import bytes_text
from freehold.cli.progress import waiting
from freehold.cli.run_file import RecipeName, Set, read_run
from freehold.cli.terminal import show_json, show_line, show_table

if TYPE_CHECKING:
    from freehold.recipes.plan import RunPlan


def plan(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The file of the run.", show_default=False)],
    changes: Set = None,
    as_json: options.Json = False,
) -> None:
    """Say what a run of `freehold train` would take of memory, and refuse what cannot fit.

    Only headers are read and nothing is written: each line is a kind of memory, what it takes at the run's peak, and
    why. A run that does not fit into what is free ends with exit code 2; `train` refuses it, too.

    Examples:

    \b
      freehold plan sft run.toml
      freehold plan lora run.toml --set data.budget_tokens=4096 --json
    """
    with waiting("Starting"):
        from freehold.engine.machine import memory_of
        from freehold.engine.model import parse_device
        from freehold.recipes.plan import check_memory
        from freehold.recipes.recipe import RECIPES
    settings = read_run(RECIPES[recipe], file, changes)
    planned = RECIPES[recipe].plan(settings)
    free_bytes = memory_of(parse_device(settings.device)).available_bytes
    if as_json:
        show_json(_plain(planned, free_bytes))
    else:
        _show(planned, free_bytes)
    check_memory(planned, free_bytes)


def _plain(planned: "RunPlan", free_bytes: int) -> dict[str, object]:
    lines = [{"name": line.name, "bytes": line.num_bytes, "why": line.why} for line in planned.lines]
    return {"lines": lines, "total_bytes": planned.total_bytes, "free_bytes": free_bytes}


def _show(planned: "RunPlan", free_bytes: int) -> None:
    rows = [(bytes_text(line.num_bytes), line.name, line.why) for line in planned.lines]
    show_table([*rows, (bytes_text(planned.total_bytes), "at its peak", "")])
    show_line(f"{bytes_text(free_bytes)} are free")
