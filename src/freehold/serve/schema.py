"""What a request of OpenAI's API may hold. Strict: what is not here is refused by its name, and so are the wrong types.

Belongs here: fields, types and bounds, and what can be said of them without a model. No torch. Not here: answers
(shapes.py), and what is made of a request (openai_chat.py, openai_completions.py, embeddings.py, models.py).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import PydanticCustomError

from freehold.serve.fields import JsonObject, Priority, Unsupported, refuse_others
from freehold.serve.forms import ANY_OBJECT

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_TOKENS = 1 << 31
SEED_LIMIT = 1 << 63

StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
ShortText = Annotated[str, StringConstraints(max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 24)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """A value without a field that is not named, without a type that only resembles, without NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message's content; these models read only text."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that the model made: its arguments are a JSON object in a string."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # as streams give it


class Message(Strict):
    """A message of a conversation. Fields that only answers have may come back as the null or the [] that they were."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: ShortText | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: ShortText | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as text/messages.py takes it. To these models a developer is the system."""
        names = {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"}
        given = self.model_dump(include=names, exclude_none=True)
        return given | ({"role": "system"} if self.role == "developer" else {})


class Function(Strict):
    """A function that the model may call; its parameters are a JSON schema."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool. `given` is it as it came: its keys in their order are what the model reads."""

    type: Literal["function"]
    function: Function
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        return self._given

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        tool = validate(given)
        tool._given = given
        return tool


class ChosenFunction(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """A function that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class StreamOptions(Strict):
    """include_usage: a last chunk with the tokens read and written. continuous_usage_stats: those so far in each other.
    include_obfuscation: there is none to include."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(Strict):
    """A JSON schema that an answer keeps to. `strict` has no effect: it always does."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    content: Annotated[JsonObject, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with the type json_schema, which needs it")
        return self

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        if self.type == "json_object":
            return ANY_OBJECT
        return self.json_schema.content if self.json_schema else None


class Drawing(Strict):
    """What chat and completions share: how an answer is drawn, how many there are, and how they come.

    `user` has no effect: whoever asks is known by the key.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31, description="0 and -1 are all.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, description="Nothing ends an answer before.")] | None = None
    ignore_eos: Annotated[bool, Field(description="Go on past the model's own ends.")] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    user: ShortText | None = None

    @field_validator("logit_bias")
    @classmethod
    def _has_ids(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        if not all(key.isascii() and key.isdecimal() and len(key) <= 9 for key in biases or ()):
            raise PydanticCustomError("token_id", "every key has to be a token's id")
        return biases

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is for streams: give stream true")
        if self.counts_along and not self.includes_usage:
            raise PydanticCustomError("stream_options", "continuous_usage_stats needs include_usage true")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def counts_along(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(Drawing):
    """POST /v1/chat/completions. `metadata`, `store: false`, `service_tier`, `safety_identifier` and `prompt_cache_key`
    have no effect: nothing is stored, there is one tier, and what is kept of prompts is up to the engine."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[Literal["none", "auto", "required"] | ToolChoice, refuse_others("type", "choice", "function")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None
    reasoning_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS, description="In tokens.")] | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Field(max_length=16)] | None = None
    response_format: ResponseFormat | None = None
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    verbosity: Literal["medium"] | None = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ; give one")
        if self.reasoning_effort is not None and self.reasoning_budget is not None:
            raise PydanticCustomError("reasoning", "reasoning_effort and reasoning_budget exclude each other")
        return self


class CompletionRequest(Drawing):
    """POST /v1/completions. Without max_tokens an answer has up to 16, as in OpenAI's API."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, description="0 only with echo.")] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(description="As n: all that are drawn are given.")] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.best_of not in (None, self.num_choices):
            raise PydanticCustomError("best_of", "best_of is not supported but where it is n")
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens is 0, which leaves nothing to answer without echo")
        if len(self.prompts) * self.num_choices > MAX_PROMPTS:
            raise PydanticCustomError("n", f"prompts times n is more than {MAX_PROMPTS}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return several(self.prompt)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings: for each text the mean of its hidden states, of length 1. `user` has no effect."""

    model: str
    input: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Unsupported = None
    user: ShortText | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation as the model's template writes it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages")
        if self.prompt is not None and (self.tools or self.chat_template_kwargs):
            raise PydanticCustomError("tools", "tools and chat_template_kwargs go with messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 24)]


def several(given: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    """Return one text, or one list of ids, as a list of one; a list of them as it is."""
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else given
