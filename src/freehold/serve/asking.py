"""What every request of OpenAI's API is asked first: who sends it, which model it means, how its answers are drawn."""

import secrets
import time
import uuid
from dataclasses import dataclass, replace

from fastapi import Request

from freehold import __version__
from freehold.engine.request import SamplingParams
from freehold.serve.answers import Answers, Options
from freehold.serve.caller import Caller
from freehold.serve.configuration import ServeSettings
from freehold.serve.errors import Refused
from freehold.serve.schema import Drawing

FINGERPRINT = f"freehold-{__version__}"
# A seed that was not given: small enough for any client's numbers to hold it, with a choice's place added.
SEED_BITS = 48


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all chunks of a response begin with, in the order of the API. seed: of the first choice."""

    id: str
    created: int
    model: str
    seed: int


def caller_of(request: Request) -> Caller:
    """Return who sends a request, as the guard found out."""
    caller: Caller = request.state.caller
    return caller


def settings_of(request: Request) -> ServeSettings:
    """Return how the server that got a request was set up."""
    settings: ServeSettings = request.app.state.settings
    return settings


def names_of(answers: Answers, settings: ServeSettings) -> tuple[str, ...]:
    """Return the names that a request may call the model."""
    return (answers.model_name, *settings.aliases)


def check_model(name: str, request: Request, answers: Answers) -> None:
    """Raises: Refused, with status 404, where the model is another."""
    if name not in names_of(answers, settings_of(request)):
        message = f"there is no such model here; the one that is served is {answers.model_name!r}"
        raise Refused(message, param="model", code="model_not_found", status=404)


def head_of(prefix: str, drawing: Drawing) -> Head:
    """Return the head of a response: a new id, and the request's seed, or a drawn one."""
    seed = secrets.randbits(SEED_BITS) if drawing.seed is None else drawing.seed
    return Head(id=f"{prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=drawing.model, seed=seed)


def sampling_of(drawing: Drawing, answers: Answers, *, max_tokens: int | None) -> SamplingParams:
    """Return how answers are drawn, but for their seeds; what is not given is as in OpenAI's API.

    Raises: Refused for ids of no token.
    """

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=given(drawing.temperature, 1.0),
        top_k=max(0, drawing.top_k or 0),
        top_p=given(drawing.top_p, 1.0),
        min_p=given(drawing.min_p, 0.0),
        repetition_penalty=given(drawing.repetition_penalty, 1.0),
        presence_penalty=given(drawing.presence_penalty, 0.0),
        frequency_penalty=given(drawing.frequency_penalty, 0.0),
        stop=drawing.stops,
        min_tokens=drawing.min_tokens or 0,
        ignore_eos=bool(drawing.ignore_eos),
        logit_bias=_biases(drawing, answers) if drawing.logit_bias else {},
    )


def with_priority(options: Options, priority: int | None, request: Request) -> Options:
    """Return options with the priority that a request asks for: a lower number is earlier, a higher one in the engine.

    Raises: Refused, with status 403, where it would go ahead of others and its key does not permit that.
    """
    priority = priority or 0
    if priority < 0 and "priority" not in caller_of(request).scopes:
        message = "priority: this API key lacks the scope 'priority', which one below 0 needs"
        raise Refused(message, param="priority", code="forbidden", status=403)
    return replace(options, priority=-priority)


def with_seed(options: Options, seed: int) -> Options:
    """Return the options of one choice, which has a seed of its own."""
    return replace(options, sampling=replace(options.sampling, seed=seed))


def _biases(drawing: Drawing, answers: Answers) -> dict[int, float]:
    vocab_size = answers.engine.model.tokenizer.vocab_size
    biases = {int(key): bias for key, bias in (drawing.logit_bias or {}).items()}
    if unknown := [token for token in biases if token >= vocab_size]:
        raise Refused(f"logit_bias: {unknown[0]} is not an id; the last is {vocab_size - 1}", param="logit_bias")
    return biases
