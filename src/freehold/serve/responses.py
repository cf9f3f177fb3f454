"""OpenAI's Responses API: POST /v1/responses.

A streamed answer and a whole one are written by the same object, so they agree. What a request may hold is in
responses_schema.py.
"""

import secrets
import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from freehold.engine.request import SamplingParams
from freehold.serve.answers import Answers, AnswerUsage, Chat, Delta, Options
from freehold.serve.asking import SEED_BITS, caller_of, check_model, settings_of, with_priority
from freehold.serve.dialect_shapes import ResponseAnswer
from freehold.serve.errors import Refused
from freehold.serve.forms import form_of
from freehold.serve.openai_chat import EFFORT_TOKENS, THINKING_SWITCH
from freehold.serve.responses_schema import CallItem, MessageItem, ReasoningItem, ResponsesRequest, Texts, ToolChoice
from freehold.serve.schema import Strict
from freehold.serve.shapes import ERRORS, STREAMABLE
from freehold.serve.turns import Turns
from freehold.serve.writing import Event, streamed, whole
from freehold.text.answer import Piece, ReasoningPiece, TextPiece, ToolCallPiece

# Of a part: its type, and the events that tell of its text.
PART_OF = {TextPiece: "output_text", ReasoningPiece: "reasoning_text"}


def routes(answers: Answers) -> APIRouter:
    """Return the route of the Responses API."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/responses", responses={**ERRORS, 200: {"model": ResponseAnswer, "content": STREAMABLE}})
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        check_model(body.model, request, answers)
        options = with_priority(_options(body, answers), body.priority, request)
        prompt = await answers.read_chat(_chat(body, answers))
        writing = ResponseWriting(body)
        deltas = answers.stream([(prompt, options)], caller_of(request))
        if body.stream:
            return streamed(writing, deltas, settings_of(request))
        return JSONResponse(await whole(writing, deltas, request))

    return router


class ResponseWriting:
    """A response while it is written: deltas in, events out, and the whole response at the end.

    Pieces of one kind that follow each other are one item; a call is an item of its own.
    """

    def __init__(self, body: ResponsesRequest):
        self._head = _head(body)
        self._end: dict[str, Any] = {"status": "in_progress", "error": None, "incomplete_details": None, "usage": None}
        self._items: list[dict[str, Any]] = []
        self._open: type[Piece] | None = None  # what kind of pieces the last item still takes
        self._parts: list[str] = []  # of that item
        self._num_events = 0

    def start(self) -> list[Event]:
        """Return the events that come before all others."""
        return [self._event(f"response.{name}", response=self.answer()) for name in ("created", "in_progress")]

    def take(self, delta: Delta) -> list[Event]:
        """Return the events that a delta makes."""
        events: list[Event] = []
        for piece in delta.pieces:
            if isinstance(piece, ToolCallPiece):
                events += self._close("completed") + self._call(piece)
            else:
                events += self._text(piece)
        if delta.finish_reason:
            status = "incomplete" if delta.finish_reason == "length" else "completed"
            events += self._close(status)
            details = {"reason": "max_output_tokens"} if status == "incomplete" else None
            self._end |= {"status": status, "incomplete_details": details, "usage": _usage(delta.usage)}
            self._end["completed_at"] = int(time.time()) if status == "completed" else None
            events.append(self._event(f"response.{status}", response=self.answer()))
        return events

    def fail(self, body: dict[str, Any]) -> list[Event]:
        """Return the events that end a response which failed under way."""
        events = self._close("incomplete")
        self._end |= {"status": "failed", "error": {"code": "server_error", "message": body["error"]["message"]}}
        return [*events, self._event("response.failed", response=self.answer())]

    def answer(self) -> dict[str, Any]:
        """Return the response as it stands; whole after the last delta."""
        return {**self._head, **self._end, "output": list(self._items)}

    def _text(self, piece: TextPiece | ReasoningPiece) -> list[Event]:
        part = PART_OF[type(piece)]
        events: list[Event] = []
        if self._open is not type(piece):
            events += self._close("completed")
            self._open = type(piece)
            self._items.append(_new_item(piece))
            events.append(self._at("response.output_item.added", item=dict(self._items[-1])))
            events.append(self._in_part("response.content_part.added", part=_part(part, "")))
        self._parts.append(piece.text)
        return [*events, self._in_part(f"response.{part}.delta", delta=piece.text, **_scores(part))]

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        part, text = PART_OF[self._open], "".join(self._parts)
        self._items[-1] |= {"status": status, "content": [_part(part, text)]}
        self._open, self._parts = None, []
        return [
            self._in_part(f"response.{part}.done", text=text, **_scores(part)),
            self._in_part("response.content_part.done", part=_part(part, text)),
            self._at("response.output_item.done", item=self._items[-1]),
        ]

    def _call(self, piece: ToolCallPiece) -> list[Event]:
        # The parser counts the calls of an answer; here an id is told from those of all other answers.
        call = {"type": "function_call", "id": _new_id("fc"), "call_id": _new_id("call"), "name": piece.name}
        whole = {**call, "arguments": piece.arguments, "status": "completed"}
        self._items.append(whole)
        of_item = {"item_id": call["id"]}
        return [
            self._at("response.output_item.added", item={**call, "arguments": "", "status": "in_progress"}),
            self._at("response.function_call_arguments.delta", **of_item, delta=piece.arguments),
            self._at("response.function_call_arguments.done", **of_item, name=piece.name, arguments=piece.arguments),
            self._at("response.output_item.done", item=whole),
        ]

    def _in_part(self, kind: str, **fields: Any) -> Event:
        return self._at(kind, item_id=self._items[-1]["id"], content_index=0, **fields)

    def _at(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def _chat(body: ResponsesRequest, answers: Answers) -> Chat:
    effort = _effort(body)
    return Chat(
        messages=chat_messages(body),
        tools=[tool.for_template() for tool in body.tools or () if body.tool_choice != "none"],
        switches={THINKING_SWITCH: effort != "none"} if effort and answers.reasons else {},
    )


def chat_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the instructions and the input in the chat API's form. Raises: BadRequest where calls and results do not
    fit. To these models a developer is the system."""
    turns = Turns()
    if body.instructions:
        turns.say("system", [body.instructions])
    if isinstance(body.input, str):
        turns.say("user", [body.input])
        return turns.messages()
    for index, item in enumerate(body.input):
        match item:
            case MessageItem(role="assistant"):
                for text in _texts_of(item.content):
                    turns.answer(text)
            case MessageItem():
                turns.say("user" if item.role == "user" else "system", _texts_of(item.content))
            case ReasoningItem():
                turns.reason(item.text)
            case CallItem():
                turns.call(item.call_id, item.name, item.arguments, where=f"input[{index}]")
            case _:
                turns.result(item.call_id, "\n".join(_texts_of(item.output)), where=f"input[{index}]")
    return turns.messages()


def _texts_of(content: Texts) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def _effort(body: ResponsesRequest) -> str | None:
    return body.reasoning.effort if body.reasoning else None


def _options(body: ResponsesRequest, answers: Answers) -> Options:
    effort = _effort(body)
    if effort in EFFORT_TOKENS and not answers.reasons:
        raise Refused("reasoning.effort: this model does not reason before it answers", param="reasoning.effort")
    return Options(
        sampling=SamplingParams(
            max_tokens=body.max_output_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(SEED_BITS),
        ),
        reasoning_tokens=EFFORT_TOKENS.get(effort or ""),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        form=form_of(
            body.tool_choice if isinstance(body.tool_choice, str) else None,
            name=body.tool_choice.name if isinstance(body.tool_choice, ToolChoice) else None,
            is_parallel=body.parallel_tool_calls is not False,
            is_strict=any(tool.strict for tool in body.tools or ()),
            schema=body.text.schema_of_answer if body.text else None,
        ),
    )


def _head(body: ResponsesRequest) -> dict[str, Any]:
    """Return what a response repeats of its request, and what it has of its own from the beginning."""
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": _effort(body), "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _repeated(body.text and body.text.format, {"type": "text"})},
        "tool_choice": _repeated(body.tool_choice, "auto"),
        "tools": [{"parameters": None, **tool.given, "strict": bool(tool.strict)} for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }


def _repeated(given: Strict | str | None, default: Any) -> Any:
    return given.model_dump(by_alias=True, exclude_none=True) if isinstance(given, Strict) else given or default


def _new_item(piece: TextPiece | ReasoningPiece) -> dict[str, Any]:
    if isinstance(piece, TextPiece):
        item: dict[str, Any] = {"type": "message", "id": _new_id("msg"), "role": "assistant"}
    else:
        item = {"type": "reasoning", "id": _new_id("rs"), "summary": []}
    return {**item, "status": "in_progress", "content": []}


def _part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def _scores(part: str) -> dict[str, Any]:
    return {"logprobs": []} if part == "output_text" else {}


def _usage(usage: AnswerUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
