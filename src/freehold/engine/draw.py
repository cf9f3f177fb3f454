"""The next token of an answer, drawn from logits as a request wants it; and what a token's score is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.engine.request import SamplingParams, Score
from freehold.errors import BadInput
from freehold.ops.sampling import Drawing, penalize, sample_rows, uniform_draw


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an answer goes on: the logits [V] of what may come, what is there, and what may not come.

    allowed: a byte for each id, zero where a grammar forbids it; None where there is none.
    """

    logits_V: Tensor
    prompt: Sequence[int]
    answer: Sequence[int]
    sampling: SamplingParams
    banned: Collection[int] = ()
    allowed: bytes | None = None


@torch.inference_mode()
def draw(places: Sequence[Place]) -> list[int | BadInput]:
    """Return the token that comes next in each place, or an error where the weights are broken.

    Each depends on its own place alone.
    """
    rows = [_adjusted(place) for place in places]
    drawings = [
        Drawing(
            temperature=place.sampling.temperature,
            top_k=place.sampling.top_k,
            top_p=place.sampling.top_p,
            min_p=place.sampling.min_p,
            uniform=uniform_draw(place.sampling.seed, len(place.answer)),
        )
        for place in places
    ]
    tokens = sample_rows(rows, drawings) if rows else []
    return [_no_number() if row_V[token].isnan() else token for row_V, token in zip(rows, tokens, strict=True)]


def _no_number() -> BadInput:
    return BadInput("the model computed no number", hint="`freehold check` names weights that are NaN or infinite")


def _adjusted(place: Place) -> Tensor:
    """Return the logits with what is allowed, bias, bans and penalties."""
    logits_V, sampling = place.logits_V, place.sampling
    if place.allowed is not None:
        logits_V = _only(logits_V, place.allowed)
    if place.banned or sampling.logit_bias:
        logits_V = _biased(logits_V, sampling, place.banned)
    return _penalized(logits_V, place.prompt, place.answer, sampling) if sampling.penalizes else logits_V


def _only(logits_V: Tensor, allowed: bytes) -> Tensor:
    allowed_V = torch.frombuffer(bytearray(allowed), dtype=torch.uint8)[: len(logits_V)]
    return logits_V.masked_fill(allowed_V.to(logits_V.device) == 0, -torch.inf)


def _biased(logits_V: Tensor, sampling: SamplingParams, banned: Collection[int]) -> Tensor:
    logits_V = logits_V.clone()
    for token, bias in sampling.logit_bias.items():
        if 0 <= token < len(logits_V):
            logits_V[token] += bias
    for token in banned:
        if token < len(logits_V):
            logits_V[token] = -torch.inf
    return logits_V


def _penalized(logits_V: Tensor, prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams) -> Tensor:
    written = torch.tensor(answer, dtype=torch.int64, device=logits_V.device)
    seen = [token for token in {*prompt, *answer} if token < len(logits_V)]
    return penalize(
        logits_V,
        seen=torch.tensor(seen, dtype=torch.int64, device=logits_V.device),
        generated_counts_V=torch.bincount(written, minlength=len(logits_V)),
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
    )


@torch.inference_mode()
def scores(logits_TV: Tensor, tokens: Sequence[int], num_top: int) -> list[Score]:
    """Return the score of each token among the logits that it was, or could have been, drawn from.

    Precision: float64, so that the logarithm of the sum over a large vocabulary has no error that can be seen.
    """
    found = []
    for logits_V, token in zip(logits_TV, tokens, strict=True):
        logprobs_V = logits_V.double().log_softmax(dim=0)
        values, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(Score(id=token, logprob=float(logprobs_V[token]), top=top))
    return found
