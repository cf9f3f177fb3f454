"""What a request asks for, and the events that answer it. No torch: values, checked once when they are made."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from freehold.errors import BadRequest

if TYPE_CHECKING:  # what follows it needs the library of grammars, and a request without one does not
    from freehold.text.grammar import Grammar

# Smallest and largest value. Where these are integers, the value must be one.
LIMITS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 31),
    "min_tokens": (0, 1 << 31),
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

    max_tokens: the longest answer; None is up to the model's context. min_tokens: until it has so many nothing ends it:
    ids that would are not drawn, stop strings not looked for. ignore_eos: the model's own end ids are ids like any
    other, so an answer goes on to max_tokens where nothing else was told to end it. seed: with the token's place in the
    answer, all that decides a draw. top_k, top_p, min_p: 0, 1 and 0 keep every token. repetition_penalty concerns
    prompt and answer, presence_penalty and frequency_penalty the answer. stop: strings that end the answer and are no
    part of it. stop_ids: ids that end it, beside the model's own. logit_bias: what is added to the logits of some ids.
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
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            kinds = int if isinstance(low, int) else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
                noun = "an integer" if isinstance(low, int) else "a number"
                raise BadRequest(f"{name} is {value!r:.60}, wanted {noun} from {low} to {high}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadRequest(f"min_tokens is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise BadRequest(f"ignore_eos is {self.ignore_eos!r:.60}, wanted true or false")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(stop, str) for stop in self.stop):
            raise BadRequest(f"stop is {self.stop!r:.60}, wanted a tuple of strings")
        if "" in self.stop:
            raise BadRequest("a stop string is empty: every answer would end at once")
        if not isinstance(self.stop_ids, Set) or not all(type(stop_id) is int for stop_id in self.stop_ids):
            raise BadRequest(f"stop_ids is {self.stop_ids!r:.60}, wanted a set of ids")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or not math.isfinite(bias):
                raise BadRequest(f"logit_bias has {token!r:.30}: {bias!r:.30}, wanted are ids with finite numbers")

    def end_ids(self, stop_ids: Set[int]) -> frozenset[int]:
        """Return the ids that end an answer of a model whose own these are."""
        return self.stop_ids if self.ignore_eos else self.stop_ids | stop_ids

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class ReasoningBudget:
    """How many tokens an answer may reason before it has to answer.

    After num_tokens of reasoning the next newline closes it, after grace_tokens more it is closed where it stands, and
    in any case so early that answer_tokens of max_tokens are left. What follows the closing mark is not a stop id at
    once, so no answer is empty.

    open_ids, close_ids: the marks as ids. newline_ids: ids whose text ends with a newline. is_open: whether the prompt
        has opened the reasoning already.
    """

    num_tokens: int
    open_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    newline_ids: frozenset[int]
    is_open: bool
    grace_tokens: int = 64
    answer_tokens: int = 32


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and what is wanted of it.

    prompt, stop_ids: ids; the latter are the tokenizer's own, which end an answer. id: what a log calls the request.
    tenant, weight: whose share of the machine it takes, and how large that is beside others'. priority: of waiting
    requests the highest runs first. deadline_s: seconds from submission until it has to be done. num_logprobs: None for
    no scores, else how many of the likeliest are scored beside the token itself; scores_prompt: whether the prompt's
    tokens are scored too. embeds: no answer is wanted, but the mean of the prompt's hidden states, normalised. grammar:
    what the answer is held to, reasoning included; where it is complete, only a stop id can follow.
    """

    prompt: tuple[int, ...]
    id: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    deadline_s: float | None = None
    num_logprobs: int | None = None
    scores_prompt: bool = False
    embeds: bool = False
    reasoning: ReasoningBudget | None = None
    grammar: "Grammar | None" = None

    @property
    def end_ids(self) -> frozenset[int]:
        return self.sampling.end_ids(self.stop_ids)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A token's natural log-probability before penalties, filters and temperature, and those of the likeliest ids."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a request ended: a stop id or max_tokens, or what kept it from that, with a line that says why."""

    reason: Literal["stop", "length", "cancelled", "deadline", "failed"]
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a request. The last event, and no other, has a finish.

    tokens: further ids of the answer, a stop id included. scores: one for each token, where they are wanted.
    prompt_scores: once, the first token's is None. embedding: once. queue_s, prefill_s: with the first token or the
    embedding, seconds from submission to the first step, and from there to the end of this one.
    """

    tokens: tuple[int, ...] = ()
    scores: tuple[Score, ...] = ()
    prompt_scores: tuple[Score | None, ...] = ()
    embedding: tuple[float, ...] = ()
    queue_s: float | None = None
    prefill_s: float | None = None
    finish: Finish | None = None
