"""What a request of OpenAI's Responses API may hold. Strict: what is not here is refused by its name.

Belongs here: fields, types and bounds. No torch. Not here: what is made of a request (responses.py).

Nothing is stored: `store` is false, also where it is not given, and whatever refers to something stored is refused.
`user`, `safety_identifier`, `prompt_cache_key` and `service_tier` have no effect; `metadata` comes back in the answer.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, StringConstraints, Tag, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import PydanticCustomError

from freehold.serve.fields import JsonObject, Priority, refuse_others, refuse_true, tag_by
from freehold.serve.forms import ANY_OBJECT
from freehold.serve.schema import MAX_TOKENS, MAX_TOOLS, NamedSchema, ShortText, Strict

MAX_ITEMS = 4096
MAX_PARTS = 4096
# Refused when they ask for anything. Clients also send them empty: null, false or [].
UNSUPPORTED = (
    "background",
    "conversation",
    "include",
    "max_tool_calls",
    "previous_response_id",
    "prompt",
    "top_logprobs",
)
STORED = "nothing is stored, so store can only be false"

Role = Literal["user", "assistant", "system", "developer"]
Status = Literal["in_progress", "completed", "incomplete"]
Identity = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class TextPart(Strict):
    """Some text. annotations, logprobs: the null or [] that an answer had."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Nothing | None = None
    logprobs: Nothing | None = None


class ReasoningText(Strict):
    """Some reasoning, or a summary of it."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


TextOnly = Annotated[TextPart, refuse_others("type", "part", "input_text", "output_text")]
Texts = str | Annotated[list[TextOnly], Field(min_length=1, max_length=MAX_PARTS)]


class MessageItem(Strict):
    """A message; the assistant's may be one of an answer, with its id and status."""

    type: Literal["message"] = "message"
    role: Role
    content: Texts
    id: Identity | None = None
    status: Status | None = None


class CallItem(Strict):
    """A call that the model made: its arguments are a JSON object in a string."""

    type: Literal["function_call"]
    call_id: Identity
    name: ShortText
    arguments: str
    id: Identity | None = None
    status: Status | None = None


class ResultItem(Strict):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Identity
    output: Texts
    id: Identity | None = None
    status: Status | None = None


class ReasoningItem(Strict):
    """Reasoning, as an answer gave it: in its content, or else in its summary."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS)]
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS)] | None = None
    id: Identity | None = None
    status: Status | None = None
    encrypted_content: None = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary)


Item = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[CallItem, Tag("function_call item")]
    | Annotated[ResultItem, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")],
    tag_by("type", "item", default="message"),
    refuse_others("type", "item", "message", "function_call", "function_call_output", "reasoning"),
]


class Tool(Strict):
    """A function that the model may call; its parameters are a JSON schema. `given` is it as it came."""

    type: Literal["function"]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        return self._given

    def for_template(self) -> dict[str, Any]:
        """Return the tool in the chat API's form, which templates are written for, its keys in their order."""
        names = ("name", "description", "parameters")
        return {
            "type": "function",
            "function": {key: value for key, value in self._given.items() if key in names and value is not None},
        }

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        tool = validate(given)
        tool._given = given
        return tool


class Reasoning(Strict):
    """For how long the model reasons before it answers."""

    effort: Literal["none", "low", "medium", "high"] | None = None
    summary: None = None
    generate_summary: None = None


class TextFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(NamedSchema):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]


class TextConfig(Strict):
    """What an answer has to look like."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("text format")]
            | Annotated[TextFormat, Tag("json_object format")]
            | Annotated[SchemaFormat, Tag("json_schema format")],
            tag_by("type", "format"),
            refuse_others("type", "format", "text", "json_object", "json_schema"),
        ]
        | None
    ) = None

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        if isinstance(self.format, SchemaFormat):
            return self.format.content
        return ANY_OBJECT if self.format and self.format.type == "json_object" else None


class StreamOptions(Strict):
    """include_obfuscation: there is none to include."""

    include_obfuscation: Literal[False] | None = None


class ToolChoice(Strict):
    """A function that has to be called."""

    type: Literal["function"]
    name: ShortText


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    tools: (
        Annotated[list[Annotated[Tool, refuse_others("type", "tool", "function")]], Field(max_length=MAX_TOOLS)] | None
    ) = None
    tool_choice: (
        Annotated[Literal["none", "auto", "required"] | ToolChoice, refuse_others("type", "choice", "function")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    store: Annotated[Literal[False], refuse_true(STORED)] | None = None
    metadata: (
        Annotated[dict[Annotated[str, StringConstraints(max_length=64)], ShortText], Field(max_length=16)] | None
    ) = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_empty(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key not in UNSUPPORTED or value not in (None, False, [])}

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is for streams: give stream true")
        return self
