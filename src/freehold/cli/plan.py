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
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many processes share the run; unset, as few as its [parallel] table can do with.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what a run of `freehold train` would take of memory, and refuse what cannot fit.

    Only headers are read and nothing is written: each line is a kind of memory, what it takes at the run's peak, and
    why. Where several processes share a run the lines are those of one: its part of the weights, and what it has of
    others. A run that does not fit into what is free ends with exit code 2; `train` refuses it, too.

    Examples:

    \b
      freehold plan sft run.toml
      freehold plan lora run.toml --set data.budget_tokens=4096 --json
      freehold plan sft run.toml --set parallel.weights=shard --processes 4
    """
    with waiting("Starting"):
        from freehold.engine.machine import memory_of
        from freehold.engine.model import parse_device
        from freehold.recipes.plan import check_memory
        from freehold.recipes.recipe import RECIPES
    settings = read_run(RECIPES[recipe], file, changes)
    planned = RECIPES[recipe].plan(settings, processes)
    free_bytes = memory_of(parse_device(settings.device)).available_bytes
    if as_json:
        show_json(_plain(planned, free_bytes))
    else:
        _show(planned, free_bytes)
    check_memory(planned, free_bytes)


def _plain(planned: "RunPlan", free_bytes: int) -> dict[str, object]:
    lines = [{"name": line.name, "bytes": line.num_bytes, "why": line.why} for line in planned.lines]
    return {
        "lines": lines,
        "processes": planned.num_processes,
        "total_bytes": planned.total_bytes,
        "free_bytes": free_bytes,
    }


def _show(planned: "RunPlan", free_bytes: int) -> None:
    rows = [(bytes_text(line.num_bytes), line.name, line.why) for line in planned.lines]
    count = planned.num_processes
    whose = "at its peak" if count == 1 else f"at its peak: one of {count} processes"
    show_table([*rows, (bytes_text(planned.total_bytes), whose, "")])
    together = "" if count == 1 else f"; all {count} on one machine take {bytes_text(count * planned.total_bytes)}"
    show_line(f"{bytes_text(free_bytes)} are free{together}")
