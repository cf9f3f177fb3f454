"""What a request asks for. No torch: these are values, checked once when they are made."""

from dataclasses import dataclass

from freehold.errors import BadRequest


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn. The default is greedy: the same question has the same answer.

    max_tokens: the longest answer; None is up to the model's context. seed: with the token's place in the answer, all
    that decides a draw. top_k, top_p, min_p: 0, 1 and 0 keep every token. repetition_penalty concerns prompt and answer,
    presence_penalty and frequency_penalty the answer. stop: strings that end the answer and are no part of it.
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
        limits = {
            "max_tokens": (1, float("inf")),
            "temperature": (0, 100),
            "top_k": (0, float("inf")),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BadRequest(f"{name} is {value}, wanted {low} to {high}")
        if "" in self.stop:
            raise BadRequest("a stop string is empty: every answer would end at once")

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
