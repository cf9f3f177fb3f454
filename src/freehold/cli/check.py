"""`freehold check`: the laws of the design, checked on a real model and shown with what was measured."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import options
from freehold.cli.loading import load_model
from freehold.cli.progress import steps_bar
from freehold.cli.terminal import show_json, show_line, show_table
from freehold.errors import BadFile, CheckFailed

if TYPE_CHECKING:
    from freehold.evaluate.laws import Finding


def check(
    model: options.ModelName,
    seed: Annotated[int, typer.Option(help="What decides the tokens that the laws are tried on.")] = 0,
    adapter: options.Adapter = None,
    device: options.Device = "cpu",
    dtype: options.LoadDtype = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Check that a model computes on this machine as it should.

    No weight is NaN, prefill equals decode, a sequence gives the same in any company, saving and loading changes
    nothing, kernels equal their references. Each is shown with the difference that was measured and how much of it is
    tolerated. The exit code is 1 where a law does not hold, 2 where weights are NaN or infinite.

    Examples:

    \b
      freehold check smollm2-135m-instruct
      freehold check ./folder --dtype bf16 --device cuda
      freehold check model.gguf --json
    """
    loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, threads=threads)
    from freehold.evaluate.laws import check_laws

    names = loaded.described.family.tensor_names(loaded.decoder.spec, ())
    with steps_bar("Checking") as progress:
        findings = list(check_laws(loaded.decoder, names, seed=seed, progress=progress))
    if as_json:
        show_json([_plain(finding) for finding in findings])
    else:
        _show(findings)
    weights = next(finding for finding in findings if finding.law == "finite weights")
    if not weights.holds:  # the file is at fault, not this machine
        raise BadFile(f"the weights are damaged: {weights.detail}", hint="fetch or convert them again")
    if failed := [finding for finding in findings if not finding.holds]:
        what = "1 law does" if len(failed) == 1 else f"{len(failed)} laws do"
        details = "; ".join(f"{finding.law}: {finding.detail}" for finding in failed)
        raise CheckFailed(f"{what} not hold: {details}", hint="do not trust this model's answers here")


def _plain(finding: "Finding") -> dict[str, Any]:
    """Return a finding for JSON, which has no NaN."""
    measured = finding.measured
    return asdict(finding) | {"measured": measured if measured is not None and math.isfinite(measured) else None}


def _show(findings: list["Finding"]) -> None:
    rows = [["law", "holds", "measured", "tolerance", "claim"]]
    for finding in findings:
        numbers = [f"{n:.1e}" if n is not None else "-" for n in (finding.measured, finding.tolerance)]
        rows.append([finding.law, "yes" if finding.holds else "NO", *numbers, f"{finding.claim} ({finding.detail})"])
    show_table(rows)
    held = sum(finding.holds for finding in findings)
    show_line(f"{held} of {len(findings)} hold")
