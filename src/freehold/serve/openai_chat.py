"""POST /v1/chat/completions: a conversation in, answers out, whole or as chunks. Both are made of the same deltas."""

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from freehold.serve.answers import Answers, AnswerUsage, Chat, Delta, Options, TokenText
from freehold.serve.asking import (
    FINGERPRINT,
    Head,
    caller_of,
    check_model,
    head_of,
    sampling_of,
    settings_of,
    with_priority,
    with_seed,
)
from freehold.serve.errors import Refused
from freehold.serve.forms import form_of
from freehold.serve.schema import ChatRequest, ToolChoice
from freehold.serve.shapes import (
    ERRORS,
    STREAMABLE,
    Call,
    CallFunction,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatScore,
    ChatScores,
    FinishReason,
    TopScore,
    usage_in_chunk,
    usage_of,
)
from freehold.serve.sse import DONE, EventStream, data_line, while_connected
from freehold.text.answer import Piece, ReasoningPiece, TextPiece, ToolCallPiece
from freehold.text.answer_grammar import Form

EFFORT_TOKENS = {"low": 1024, "medium": 4096, "high": 16384}
THINKING_SWITCH = "enable_thinking"


def routes(answers: Answers) -> APIRouter:
    """Return the route of chat completions."""
    router = APIRouter(tags=["OpenAI"])
    responses: dict[int | str, dict[str, Any]] = {200: {"model": ChatCompletion, "content": STREAMABLE}, **ERRORS}

    @router.post("/v1/chat/completions", responses=responses, response_class=JSONResponse)
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        check_model(body.model, request, answers)
        chat, options = chat_of(body, reasons=answers.reasons), options_of(body, answers)
        options = with_priority(options, body.priority, request)
        head = head_of("chatcmpl", body)
        prompt = await answers.read_chat(chat)
        asked = [(prompt, with_seed(options, head.seed + choice)) for choice in range(body.num_choices)]
        deltas = answers.stream(asked, caller_of(request))
        if body.stream:
            return EventStream(chunk_lines(deltas, head, body), settings=settings_of(request))
        return JSONResponse(await while_connected(request, whole(deltas, head, body)))

    return router


def chat_of(body: ChatRequest, *, reasons: bool) -> Chat:
    """Return the conversation of a request, with what its template is told. Tools that may not be called are left out.

    Raises: Refused where reasoning is wanted of a model that does not.
    """
    switches = dict(body.chat_template_kwargs or {})
    budget = "reasoning_budget" if body.reasoning_budget is not None else "reasoning_effort"
    if not reasons and _reasoning_tokens(body) is not None:
        raise Refused(f"{budget}: this model does not reason", param=budget)
    if reasons and body.reasoning_effort == "none":
        if switches.get(THINKING_SWITCH):
            raise Refused(f"reasoning_effort none contradicts {THINKING_SWITCH}", param="reasoning_effort")
        switches[THINKING_SWITCH] = False
    tools = [] if body.tool_choice == "none" else [tool.given for tool in body.tools or ()]
    return Chat(messages=[message.for_template() for message in body.messages], tools=tools, switches=switches)


def options_of(body: ChatRequest, answers: Answers) -> Options:
    """Return what a request says of its answers, but for their seeds."""
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return Options(
        sampling=sampling_of(body, answers, max_tokens=max_tokens),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        reasoning_tokens=_reasoning_tokens(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        form=_form(body),
    )


def _form(body: ChatRequest) -> Form:
    choice = body.tool_choice
    return form_of(
        choice if isinstance(choice, str) else None,
        name=choice.function.name if isinstance(choice, ToolChoice) else None,
        is_parallel=body.parallel_tool_calls is not False,
        is_strict=any(tool.function.strict for tool in body.tools or ()),
        schema=body.response_format.schema_of_answer if body.response_format else None,
    )


def _reasoning_tokens(body: ChatRequest) -> int | None:
    if body.reasoning_budget is not None:
        return body.reasoning_budget
    return EFFORT_TOKENS.get(body.reasoning_effort or "")


@dataclass(kw_only=True)
class _Choice:
    """One answer, as far as it has come."""

    wants_scores: bool
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    scores: list[ChatScore] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    usage: AnswerUsage = field(default_factory=AnswerUsage)

    def take(self, delta: Delta) -> list[dict[str, Any]]:
        """Return what a delta adds, as chunks do. Mutates: itself, which then holds it too."""
        self.scores += map(_score, delta.scores)
        self.usage = delta.usage
        if delta.finish_reason:
            self.finish_reason = delta.finish_reason
        return [self._add(piece) for piece in delta.pieces]

    def _add(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case TextPiece(text=text):
                self.text.append(text)
                return {"content": text}
            case ReasoningPiece(text=text):
                self.reasoning.append(text)
                return {"reasoning_content": text}
            case ToolCallPiece():
                # Not the piece's own id, which is the same in every answer: clients send many answers back at once.
                function = CallFunction(name=piece.name, arguments=piece.arguments)
                call = Call(id=f"call_{uuid.uuid4().hex}", type="function", function=function)
                self.calls.append(call)
                return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}

    def finished(self, index: int) -> ChatChoice:
        """Return the whole answer."""
        text = "".join(self.text)
        message = ChatMessage(role="assistant", content=None if self.calls and not text else text, refusal=None)
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        scores = ChatScores(content=self.scores, refusal=None) if self.wants_scores else None
        return ChatChoice(index=index, message=message, logprobs=scores, finish_reason=self.finish_reason)


async def whole(deltas: AsyncGenerator[tuple[int, Delta], None], head: Head, body: ChatRequest) -> ChatCompletion:
    """Return all answers when they are done."""
    choices = _choices(body)
    async with aclosing(deltas):
        async for index, delta in deltas:
            choices[index].take(delta)
    return ChatCompletion(
        id=head.id,
        object="chat.completion",
        created=head.created,
        model=head.model,
        system_fingerprint=FINGERPRINT,
        seed=head.seed,
        choices=[choice.finished(index) for index, choice in enumerate(choices)],
        usage=usage_of(body, _usages(choices)),
    )


async def chunk_lines(
    deltas: AsyncGenerator[tuple[int, Delta], None], head: Head, body: ChatRequest
) -> AsyncGenerator[bytes, None]:
    """Yield answers as the events of a stream, as they come."""
    choices = _choices(body)
    begun: set[int] = set()
    async with aclosing(deltas):
        async for index, delta in deltas:
            parts = choices[index].take(delta)
            extra = usage_in_chunk(body, _usages(choices))
            if index not in begun:
                begun.add(index)
                yield _chunk(head, index, {"role": "assistant", "content": ""}, extra)
            scores = [_score(score) for score in delta.scores]
            for part in parts or ([{"content": ""}] if scores else []):
                yield _chunk(head, index, part, extra, scores=scores)
                scores = []
            if delta.finish_reason:
                yield _chunk(head, index, {}, extra, finish_reason=delta.finish_reason)
    if body.includes_usage:
        yield data_line({**_chunk_head(head), "choices": [], "usage": usage_of(body, _usages(choices))})
    yield DONE


def _chunk(
    head: Head,
    index: int,
    delta: dict[str, Any],
    extra: Mapping[str, Any],
    *,
    scores: Sequence[ChatScore] = (),
    finish_reason: FinishReason | None = None,
) -> bytes:
    logprobs = {"content": scores, "refusal": None} if scores else None
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return data_line({**_chunk_head(head), "choices": [choice], **extra})


def _chunk_head(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": FINGERPRINT,
        "seed": head.seed,
    }


def _choices(body: ChatRequest) -> list[_Choice]:
    return [_Choice(wants_scores=bool(body.logprobs)) for _ in range(body.num_choices)]


def _usages(choices: Sequence[_Choice]) -> list[AnswerUsage]:
    return [choice.usage for choice in choices]


def _score(score: TokenText) -> ChatScore:
    assert score.logprob is not None, "only the first token of a prompt has none"
    top = [TopScore(token=text, bytes=list(raw), logprob=logprob) for text, raw, logprob in score.top]
    return ChatScore(token=score.text, bytes=list(score.token_bytes), logprob=score.logprob, top_logprobs=top)
