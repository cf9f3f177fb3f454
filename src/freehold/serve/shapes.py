"""What the answers of OpenAI's API look like. Made as plain dictionaries; these types check them and document them."""

from typing import Any, Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict

from freehold.serve.answers import AnswerUsage
from freehold.serve.schema import Drawing

FinishReason = Literal["stop", "length", "tool_calls"]


class ReasoningTokens(TypedDict):
    """How many of the tokens were reasoning."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Tokens read and written. Several answers to one prompt read it once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: ReasoningTokens


class TopScore(TypedDict):
    """A token and its natural log-probability before penalties, filters and temperature."""

    token: str
    bytes: list[int]
    logprob: float


class ChatScore(TopScore):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[TopScore]


class ChatScores(TypedDict):
    """The scores of an answer's tokens."""

    content: list[ChatScore]
    refusal: None


class CallFunction(TypedDict):
    """A function's name and its arguments, a JSON object in a string."""

    name: str
    arguments: str


class Call(TypedDict):
    """A call in an answer; streams say which one it is."""

    index: NotRequired[int]
    id: str
    type: Literal["function"]
    function: CallFunction


class ChatMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]


class ChatChoice(TypedDict):
    """One of the answers to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatScores | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """Whole answers. seed: of the first choice; choice i has seed + i."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int
    choices: list[ChatChoice]
    usage: Usage


class LegacyScores(TypedDict):
    """The scores of a completion's tokens, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One of the continuations; those of one prompt follow each other."""

    index: int
    text: str
    logprobs: LegacyScores | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """Whole continuations. seed: of each prompt's first choice; its choice i has seed + i."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(TypedDict):
    """A vector, as numbers or as their float32 bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(TypedDict):
    """A model by one of its names. root: its own name. max_model_len: tokens of a prompt and its answer together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(TypedDict):
    """The names that a request's model may have."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    """The ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class TokenizerInfo(TypedDict):
    """The texts that tokens and templates are made with; null where the model has none."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class Detokenized(TypedDict):
    """The text of ids."""

    prompt: str


class Status(TypedDict):
    """How the server is."""

    status: str


# Errors only: pydantic reads a class of its own once, a TypedDict anew for each of the ten statuses of every route.
class ErrorDetail(BaseModel):
    """One line about what went wrong, and the parameter it went wrong with."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be run."},
    401: {"model": ErrorBody, "description": "No key, or one that is not known."},
    403: {"model": ErrorBody, "description": "The key does not permit this."},
    404: {"model": ErrorBody, "description": "No such model."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    "4XX": {"model": ErrorBody, "description": "The request was refused before anything read it."},
    429: {"model": ErrorBody, "description": "Too many requests, or tokens; see Retry-After."},
    500: {"model": ErrorBody, "description": "The server failed at this request."},
    503: {"model": ErrorBody, "description": "The server is about to stop."},
    504: {"model": ErrorBody, "description": "The request was not done by its deadline."},
}


# Of routes that answer in one piece or as events.
STREAMABLE: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}


def usage_in_chunk(drawing: Drawing, usages: list[AnswerUsage]) -> dict[str, Usage | None]:
    """Return what a chunk says of usage before the last one, which has it all."""
    if not drawing.includes_usage:
        return {}
    return {"usage": usage_of(drawing, usages) if drawing.counts_along else None}


def usage_of(drawing: Drawing, usages: list[AnswerUsage]) -> Usage:
    """Return the usage of the answers to a request together. Choices that share a prompt read it once."""
    num_choices = drawing.num_choices
    firsts = range(0, len(usages), num_choices)
    read = sum(max(usage.prompt_tokens for usage in usages[first : first + num_choices]) for first in firsts)
    written = sum(usage.completion_tokens for usage in usages)
    return Usage(
        prompt_tokens=read,
        completion_tokens=written,
        total_tokens=read + written,
        completion_tokens_details=ReasoningTokens(reasoning_tokens=sum(usage.reasoning_tokens for usage in usages)),
    )
