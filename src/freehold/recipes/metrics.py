"""The numbers of a run, step by step: lines of JSON beside its saves, and TensorBoard's files where they are wanted.

A line is written before the step is saved. What a killed run wrote past its last save is dropped when it goes on, for
those steps come again: no step is there twice, and none is missing.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freehold.errors import BadFile, UnsupportedModel
from freehold.train.shards import write_whole

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """One step of a run. All but seconds is the same whenever the same run is made again.

    loss, held_out_loss: nats per supervised token, of this step's batch before its move, and of the held-out data
    after it. mtp_losses, balance, worst_violation, gradient_norm: see `StepReport`. tokens: of the run so far.
    seconds: what the step took, without saving and measuring.
    """

    step: int
    tokens: int
    step_tokens: int
    supervised_tokens: int
    loss: float
    mtp_losses: tuple[float, ...]
    balance: float
    worst_violation: float
    gradient_norm: float
    learning_rate: float
    held_out_loss: float | None
    seconds: float


class Metrics:
    """The files of a run's numbers, from a step on."""

    def __init__(self, folder: Path, *, after_step: int, tensorboard: bool) -> None:
        """Open them, without what was written of later steps. Mutates: the files. Raises: UnsupportedModel."""
        self._writer = _tensorboard(folder / TENSORBOARD, after_step) if tensorboard else None
        self._file = folder / METRICS
        kept = [line for line in read_metrics(folder) if line["step"] <= after_step]
        write_whole(self._file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, line: StepLine) -> None:
        """Write a step's line."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(line)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())  # before the step can be saved
        if self._writer:
            for name, value in asdict(line).items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, line.step)
            self._writer.flush()

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self._writer:
            self._writer.close()


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics; a last one that was cut short is none. Raises: BadFile."""
    file = folder / METRICS
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found = {"step": 0, **json.loads(line)}
        except (ValueError, TypeError, RecursionError):
            found = {"step": None}
        if type(found["step"]) is not int:
            raise BadFile(f"{METRICS}, line {number} is damaged", hint="move it away; the run goes on without")
        yield found


def _tensorboard(folder: Path, after_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UnsupportedModel(
            "`tensorboard` is true, and tensorboardX is not installed", hint="pip install 'freehold[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=after_step + 1)
