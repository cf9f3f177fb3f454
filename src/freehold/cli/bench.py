"""`freehold bench`: how fast a model runs here, and how much of what this machine can do that is."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.checkpoint.fetch import find
from freehold.cli import options
from freehold.cli.loading import load_model
from freehold.cli.numbers import bytes_text
from freehold.cli.picture import BarCell, check_picture, draw_table, write_picture
from freehold.cli.progress import steps_bar
from freehold.cli.terminal import show_json, show_line, show_table
from freehold.settings import Settings

if TYPE_CHECKING:
    from freehold.engine.model import Model
    from freehold.evaluate.speed import Limits, Speed

SPEED_COLOR, MEMORY_COLOR, COMPUTE_COLOR = "grey39", "#2a6f97", "#c8553d"


Prompts = Annotated[
    list[int] | None,
    typer.Option(
        min=1, help="Tokens of a prompt to read; may be given again. Without it 128 and 512.", show_default=False
    ),
]
Batches = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Sequences to write at once; may be given again. Without it 1, 4, 8 and 16, or what fits the memory.",
        show_default=False,
    ),
]
Depths = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        help="Tokens that each sequence has already; may be given again. Without it 0, 512 and 2048, or what fits "
        "the model's context.",
        show_default=False,
    ),
]


ARITHMETIC_TEXTS = {
    "float32": "float32",
    "up_to_six_bits": "weights of up to 6 bits by 8",
    "eight_bits": "weights of 8 bits by 8",
}


def bench(
    model: options.ModelName,
    prompt: Prompts = None,
    batch: Batches = None,
    depth: Depths = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured; the median is shown.")] = 5,
    dtype: options.LoadDtype = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw the result too, into a new SVG file.", show_default=False),
    ] = None,
) -> None:
    """Measure how fast a model reads and writes on this machine's CPU.

    Prefill is reading a prompt, decode is writing one token a step in each sequence. Beside tokens per second stands
    what bounds them: bytes read per token as a share of the memory bandwidth, and operations as a share of the compute
    peak, both measured in the same rounds. Other work on this machine disturbs it.

    Examples:

    \b
      freehold bench smollm2-135m-instruct
      freehold bench model.gguf --prompt 1024 --batch 1 --batch 32 --depth 0 --threads 4
      freehold bench ./folder --rounds 9 --picture speed.svg --json > speed.json
    """
    if picture is not None:
        check_picture(picture)
    name = find(model, Settings().models_dir).resolve().name
    loaded = load_model(model, device="cpu", dtype=dtype, threads=threads)
    from freehold.engine.machine import main_memory
    from freehold.evaluate.speed import measure_speed, plan_cases

    free = main_memory().available_bytes
    cases = plan_cases(loaded.decoder, prompts=prompt, depths=depth, batches=batch, memory_bytes=free)
    with steps_bar("Measuring") as progress:
        limits, speeds = measure_speed(loaded.decoder, cases, num_rounds=rounds, progress=progress)
    speeds.sort(key=lambda speed: speed.case.phase, reverse=True)  # prefill, then decode, each by depth
    if as_json:
        show_json(_plain(name, loaded, limits, speeds, num_rounds=rounds))
    else:
        _show(name, loaded, limits, speeds)
    if picture is not None:
        write_picture(picture, _drawn(name, loaded, limits, speeds))


def _heading(name: str, loaded: "Model", limits: "Limits") -> list[str]:
    """Return what was measured and on what, in two lines."""
    import torch

    from freehold.evaluate.work import held_formats
    from freehold.ops.native import native_report

    held = ", ".join(f"{form} {bytes_text(num_bytes)}" for form, num_bytes in held_formats(loaded.decoder).items())
    peak = f"{_giga(limits.operations_per_s)} GOP/s ({ARITHMETIC_TEXTS[limits.arithmetic]})"
    return [
        f"{name}: {loaded.described.family.name}, {held}",
        f"{_threads_text(torch.get_num_threads())}, kernels: {native_report()}; "
        f"this machine reads {_giga(limits.read_bytes_per_s)} GB/s and computes {peak}",
    ]


def _show(name: str, loaded: "Model", limits: "Limits", speeds: "list[Speed]") -> None:
    for line in _heading(name, loaded, limits):
        show_line(line)
    show_line()
    has_experts = any(speed.num_experts is not None for speed in speeds)
    header = ["", "depth", "tokens/s", "ms/step", "read/token", "of memory", "GOP/s", "of compute"]
    rows = [[*header, *(["experts"] if has_experts else [])]]
    for speed in speeds:
        experts = "-" if speed.num_experts is None else f"{speed.num_experts:.1f}"
        rows.append(
            [
                _what(speed),
                f"{speed.case.depth:,}",
                f"{speed.tokens_per_s:,.1f}",
                f"{speed.step_s * 1e3:,.1f}",
                bytes_text(round(speed.read_bytes)),
                f"{speed.bandwidth_share(limits):.0%}",
                _giga(speed.operations * speed.tokens_per_s),
                f"{speed.compute_share(limits):.0%}",
                *([experts] if has_experts else []),
            ]
        )
    show_table(rows)


def _drawn(name: str, loaded: "Model", limits: "Limits", speeds: "list[Speed]") -> str:
    """Return the picture: each speed beside the best of its phase, and its shares of the machine's limits."""
    best: dict[str, float] = {}
    for speed in speeds:
        best[speed.case.phase] = max(speed.tokens_per_s, best.get(speed.case.phase, 0.0))

    def share(value: float, color: str) -> BarCell:
        return BarCell(text=f"{value:.0%}", share=value, color=color)

    rows: list[Sequence[str | BarCell]] = []
    for before, speed in zip([None, *speeds], speeds, strict=False):
        if before and before.case.phase != speed.case.phase:
            rows.append(())
        best_share = speed.tokens_per_s / best[speed.case.phase]
        rows.append(
            (
                _what(speed),
                f"{speed.case.depth:,}",
                BarCell(text=f"{speed.tokens_per_s:,.1f}", share=best_share, color=SPEED_COLOR),
                share(speed.bandwidth_share(limits), MEMORY_COLOR),
                share(speed.compute_share(limits), COMPUTE_COLOR),
            )
        )
    header = ("", "depth", "tokens/s", "of memory", "of compute")
    return draw_table(_heading(name, loaded, limits), header, rows)


def _plain(name: str, loaded: "Model", limits: "Limits", speeds: "list[Speed]", *, num_rounds: int) -> dict[str, Any]:
    """Return everything for JSON."""
    import torch

    from freehold.evaluate.work import held_formats
    from freehold.ops.native import native_report

    cases = [
        {"phase": speed.case.phase}
        | asdict(speed.case)
        | {key: value for key, value in asdict(speed).items() if key != "case"}
        | {"bandwidth_share": speed.bandwidth_share(limits), "compute_share": speed.compute_share(limits)}
        for speed in speeds
    ]
    return {
        "model": name,
        "family": loaded.described.family.name,
        "held_bytes_by_format": held_formats(loaded.decoder),
        "num_threads": torch.get_num_threads(),
        "kernels": native_report(),
        "num_rounds": num_rounds,
        "limits": asdict(limits),
        "cases": cases,
    }


def _what(speed: "Speed") -> str:
    case = speed.case
    return f"prefill {case.prompt:,} tokens" if case.prompt else f"decode, batch {case.batch}"


def _giga(value: float) -> str:
    return f"{value / 1e9:,.1f}"


def _threads_text(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
