"""The learning rate over a run: a pure function of how far the run is.

Belongs here: schedules, and those of published models. Not here: who sets a rate on what (optim.py, step.py).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from freehold.errors import BadInput

Shape = Literal["linear", "cosine", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, a stable time, decay (WSD); all lengths in one unit, steps or tokens.

        rate   peak    ______________
                      /              \\
               end   /                \\__
                    |warmup|          |decay|
                    0                    total

    warmup: rises in a straight line from nothing. decay: falls to `end` in a shape; as long as the rest of the run, it
    leaves no stable time: that is the cosine, or the linear, schedule. Before the decay nothing depends on `total`, so
    a run can be made longer as long as it is stable.
    Paper: Hu et al., 2024, arXiv 2404.06395, section 4 (WSD); Hägele et al., 2024, arXiv 2405.18392 (minus sqrt).
    """

    peak: float
    total: int
    end: float = 0.0
    warmup: int = 0
    decay: int = 0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        assert min(self.peak, self.end, self.warmup, self.decay) >= 0, f"nothing of {self} is negative"
        if self.warmup + self.decay > self.total:
            raise BadInput(
                f"a schedule of {self.total:,} is too short for {self.warmup:,} of warm-up and {self.decay:,} of decay"
            )

    def at(self, done: int) -> float:
        """Return the rate of the step with whose end `done` steps, or tokens, will be done.

        The first step has a rate above zero, that which completes the warm-up has the peak, the last one the end.
        """
        if done < self.warmup:
            return self.peak * done / self.warmup
        stable_end = self.total - self.decay
        if done <= stable_end or not self.decay:
            return self.peak
        progress = min(1.0, (done - stable_end) / self.decay)
        return self.end + (self.peak - self.end) * _remaining(self.shape, progress)

    def scaled(self, total: int) -> "Schedule":
        """Return the schedule of a run of another length, its parts in the same proportions."""
        factor = total / self.total
        return replace(self, total=total, warmup=int(self.warmup * factor), decay=int(self.decay * factor))


def _remaining(shape: Shape, progress: float) -> float:
    """Return what is left of the fall, from 1 at progress 0 to 0 at progress 1."""
    match shape:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "minus_sqrt":
            return 1.0 - math.sqrt(progress)


def cosine(*, peak: float, total: int, end: float = 0.0, warmup: int = 0) -> Schedule:
    """Return the schedule that falls as half a cosine from the end of its warm-up on."""
    return Schedule(peak=peak, end=end, warmup=warmup, decay=total - warmup, total=total, shape="cosine")


def linear(*, peak: float, total: int, end: float = 0.0, warmup: int = 0) -> Schedule:
    """Return the schedule that falls in a straight line from the end of its warm-up on."""
    return Schedule(peak=peak, end=end, warmup=warmup, decay=total - warmup, total=total, shape="linear")


BILLION = 10**9

# Pre-training of Nemotron 3 as published, in tokens. The shape of Super's decay is published; Nano's and Ultra's are
# given the same.
NEMOTRON_3 = {
    "nano": Schedule(
        peak=1e-3, end=1e-5, warmup=8_400_000_000, decay=5_000 * BILLION, total=25_000 * BILLION, shape="minus_sqrt"
    ),
    "super": Schedule(
        peak=4.5e-4, end=4.5e-6, warmup=200 * BILLION, decay=5_000 * BILLION, total=25_000 * BILLION, shape="minus_sqrt"
    ),
    "ultra": Schedule(
        peak=2.5e-4, end=2.5e-6, warmup=200 * BILLION, decay=5_000 * BILLION, total=20_000 * BILLION, shape="minus_sqrt"
    ),
}
