"""What a request of Anthropic's Messages API may hold. Strict: what is not here is refused by its name.

Belongs here: fields, types and bounds. No torch. Not here: what is made of a request (anthropic.py).

`cache_control` is accepted wherever the API has it and has no effect: what is kept of a prompt is up to the engine.
`metadata` and `service_tier` have none either.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from freehold.serve.fields import JsonObject, Priority, refuse_others, tag_by
from freehold.serve.schema import MAX_MESSAGES, MAX_STOPS, MAX_TOKENS, MAX_TOOLS, ShortText, StopText, Strict

MAX_BLOCKS = 4096


class CacheControl(Strict):
    """Without effect."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    """Some text. citations: the null or [] that an answer may have had."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ThinkingBlock(Strict):
    """Reasoning, as an answer gave it. Signatures are empty in answers and not looked at here."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    name: ShortText
    input: JsonObject
    cache_control: CacheControl | None = None


TextOnly = Annotated[TextBlock, refuse_others("type", "block", "text")]


class ToolResultBlock(Strict):
    """What a call returned. is_error: the model reads "Error: " before it, for templates have no other place for it."""

    type: Literal["tool_result"]
    tool_use_id: ShortText
    content: str | Annotated[list[TextOnly], Field(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        text = "\n".join(texts_of(self.content or ""))
        return f"Error: {text}" if self.is_error else text


UserBlock = Annotated[
    Annotated[TextBlock, Tag("text block")] | Annotated[ToolResultBlock, Tag("tool_result block")],
    tag_by("type", "block"),
    refuse_others("type", "block", "text", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[ToolUseBlock, Tag("tool_use block")],
    tag_by("type", "block"),
    refuse_others("type", "block", "text", "thinking", "tool_use"),
]


class UserMessage(Strict):
    """What the user says, and what tools returned."""

    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_BLOCKS)]


class AssistantMessage(Strict):
    """What the model said. An empty answer comes back as the [] that it was."""

    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(max_length=MAX_BLOCKS)]


Message = Annotated[
    Annotated[UserMessage, Tag("user message")] | Annotated[AssistantMessage, Tag("assistant message")],
    tag_by("role", "message"),
    refuse_others("role", "message", "user", "assistant"),
]


class Tool(Strict):
    """A function that the model may call; input_schema is a JSON schema of an object."""

    type: Literal["custom"] | None = None
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: CacheControl | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the tool in OpenAI's form, which templates are written for."""
        description = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **description, "parameters": self.input_schema}}


class ToolChoice(Strict):
    """Whether tools may be, or have to be called, and several at once. none: the model does not see them."""

    type: Literal["auto", "none", "any", "tool"]
    name: ShortText | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("name", "a name goes with the type tool, which needs it")
        return self


class Thinking(Strict):
    """Whether the model reasons before it answers, and for how many tokens. Without it, it does not."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise PydanticCustomError("budget_tokens", "budget_tokens goes with the type enabled, which needs it")
        return self


class Metadata(Strict):
    """Without effect: whoever asks is known by the key."""

    user_id: ShortText | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens: what decides the prompt of an answer."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextOnly], Field(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Annotated[Thinking, refuse_others("type", "thinking configuration", "enabled", "disabled")] | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise PydanticCustomError(
                "unsupported", "a last message of the assistant, to be continued, is not supported"
            )
        return self


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    stream: bool | None = None
    priority: Priority | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @model_validator(mode="after")
    def _has_room_for_an_answer(self) -> Self:
        if self.thinking and self.thinking.budget_tokens and self.thinking.budget_tokens >= self.max_tokens:
            raise PydanticCustomError("budget_tokens", "thinking.budget_tokens has to be less than max_tokens")
        return self


def texts_of(content: str | list[TextBlock]) -> list[str]:
    """Return the texts of a content."""
    return [content] if isinstance(content, str) else [block.text for block in content]
