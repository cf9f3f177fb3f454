"""What whole answers of Anthropic's API and of OpenAI's Responses API look like; these types document them."""

from typing import Any, Literal

from pydantic import BaseModel
from typing_extensions import TypedDict

from freehold.serve.shapes import ERRORS, ReasoningTokens


class TextBlock(TypedDict):
    """Text for the user."""

    type: Literal["text"]
    text: str


class ThinkingBlock(TypedDict):
    """Reasoning. The signature is empty: reasoning that comes back is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    """A call."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(TypedDict):
    """How many of the tokens were reasoning."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """Tokens read and written. No part of a prompt is billed otherwise, so those of the cache are 0."""

    input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageAnswer(TypedDict):
    """A whole message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    stop_details: None
    usage: MessageUsage


class CountedTokens(TypedDict):
    """Tokens that the model would read."""

    input_tokens: int


class MessageErrorDetail(BaseModel):
    """One line about what went wrong."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """An error."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str


class OutputText(TypedDict):
    """Text for the user. Nothing is annotated, and scores are not given."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(TypedDict):
    """Reasoning."""

    type: Literal["reasoning_text"]
    text: str


Progress = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(TypedDict):
    """A message for the user."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Progress
    content: list[OutputText]


class OutputReasoning(TypedDict):
    """Reasoning. It is given whole, so there is no summary."""

    type: Literal["reasoning"]
    id: str
    status: Progress
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(TypedDict):
    """A call."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Progress


class CachedTokens(TypedDict):
    """No part of a prompt is billed otherwise."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(TypedDict):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why an answer ends where it does."""

    reason: Literal["max_output_tokens"]


class ResponseAnswer(TypedDict):
    """A whole response, with what it repeats of its request."""

    id: str
    object: Literal["response"]
    status: Literal["completed", "incomplete"]
    created_at: int
    completed_at: int | None
    error: None
    incomplete_details: IncompleteDetails | None
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["auto", "none", "required"] | dict[str, str]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]


MESSAGE_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**described, "model": MessageErrorBody} for status, described in ERRORS.items()
}
