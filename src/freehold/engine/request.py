"""What a request asks for. No torch: these are values, checked once when they are made."""

from collections.abc import Set
from dataclasses import dataclass

from freehold.errors import BadRequest

# Smallest and largest value. Where these are integers, the value must be one.
LIMITS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 31),
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "seed": (-(1 << 63), 1 << 64),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn. The default is greedy: the same question has the same answer.

    max_tokens: the longest answer; None is up to the model's context. seed: with the token's place in the answer, all
    that decides a draw. top_k, top_p, min_p: 0, 1 and 0 keep every token. repetition_penalty concerns prompt and
    answer, presence_penalty and frequency_penalty the answer. stop: strings that end the answer and are no part of it.
    stop_ids: ids that end it, beside the model's own.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            kinds = int if isinstance(low, int) else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
                noun = "an integer" if isinstance(low, int) else "a number"
                raise BadRequest(f"{name} is {value!r:.60}, wanted {noun} from {low} to {high}")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(stop, str) for stop in self.stop):
            raise BadRequest(f"stop is {self.stop!r:.60}, wanted a tuple of strings")
        if "" in self.stop:
            raise BadRequest("a stop string is empty: every answer would end at once")
        if not isinstance(self.stop_ids, Set) or not all(type(stop_id) is int for stop_id in self.stop_ids):
            raise BadRequest(f"stop_ids is {self.stop_ids!r:.60}, wanted a set of ids")

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
