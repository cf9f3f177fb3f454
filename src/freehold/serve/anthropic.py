"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

A streamed answer and a whole one are written by the same object, so they agree. What a request may hold is in
anthropic_schema.py. The headers anthropic-version and anthropic-beta have no effect.
"""

import json
import secrets
from collections.abc import Mapping
from itertools import groupby
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from freehold.engine.request import SamplingParams
from freehold.serve.answers import Answers, AnswerUsage, Chat, Delta, Options
from freehold.serve.anthropic_schema import CountRequest, Message, MessagesRequest, texts_of
from freehold.serve.asking import SEED_BITS, caller_of, check_model, settings_of, with_priority
from freehold.serve.dialect_shapes import MESSAGE_ERRORS, CountedTokens, MessageAnswer
from freehold.serve.errors import Refused, request_id_of
from freehold.serve.forms import form_of
from freehold.serve.openai_chat import THINKING_SWITCH
from freehold.serve.shapes import STREAMABLE
from freehold.serve.turns import Turns
from freehold.serve.writing import Event, streamed, whole
from freehold.text.answer import Piece, ReasoningPiece, TextPiece, ToolCallPiece

# Where Anthropic's clients look for a request's id.
REQUEST_ID_HEADER = "request-id"
# Of a choice of tools, in OpenAI's words.
CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def routes(answers: Answers) -> APIRouter:
    """Return the routes of the Messages API."""
    router = APIRouter(tags=["Anthropic"])

    @router.post("/v1/messages", responses={**MESSAGE_ERRORS, 200: {"model": MessageAnswer, "content": STREAMABLE}})
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        check_model(body.model, request, answers)
        options = with_priority(_options(body), body.priority, request)
        prompt = await answers.read_chat(_chat(body, answers))
        writing = MessageWriting(model=body.model, input_tokens=len(prompt.ids))
        deltas = answers.stream([(prompt, options)], caller_of(request))
        response = (
            streamed(writing, deltas, settings_of(request))
            if body.stream
            else JSONResponse(await whole(writing, deltas, request))
        )
        response.headers[REQUEST_ID_HEADER] = request_id_of(request.scope)
        return response

    @router.post("/v1/messages/count_tokens", responses=MESSAGE_ERRORS)
    async def count_tokens(body: CountRequest, request: Request) -> CountedTokens:
        """Return how many tokens the model would read."""
        check_model(body.model, request, answers)
        prompt = await answers.read_chat(_chat(body, answers))
        return CountedTokens(input_tokens=len(prompt.ids))

    return router


class MessageWriting:
    """A message while it is written: deltas in, events out, and the whole message at the end.

    Pieces of one kind that follow each other are one block; a call is a block of its own.
    """

    def __init__(self, *, model: str, input_tokens: int):
        self._head = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._usage = _usage(AnswerUsage(prompt_tokens=input_tokens, completion_tokens=0, reasoning_tokens=0))
        self._end: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
        self._blocks: list[dict[str, Any]] = []
        self._open: type[Piece] | None = None  # what kind of pieces the last block still takes
        self._parts: list[str] = []  # of that block

    def start(self) -> list[Event]:
        """Return the event that comes before all others."""
        return [{"type": "message_start", "message": self.answer()}]

    def take(self, delta: Delta) -> list[Event]:
        """Return the events that a delta makes."""
        events: list[Event] = []
        for piece in delta.pieces:
            if isinstance(piece, ToolCallPiece):
                events += self._close() + self._call(piece)
            else:
                events += self._text(piece)
        if delta.finish_reason:
            self._usage, self._end = _usage(delta.usage), _end(delta)
            events += self._close()
            events += [{"type": "message_delta", "delta": self._end, "usage": self._usage}, {"type": "message_stop"}]
        return events

    def answer(self) -> dict[str, Any]:
        """Return the message as it stands; whole after the last delta."""
        return {**self._head, "content": list(self._blocks), **self._end, "usage": self._usage}

    def fail(self, body: dict[str, Any]) -> list[Event]:
        """Return the event that ends a message which failed under way."""
        return [body]

    def _text(self, piece: TextPiece | ReasoningPiece) -> list[Event]:
        kind = "text" if isinstance(piece, TextPiece) else "thinking"
        events: list[Event] = []
        if self._open is not type(piece):
            events += self._close()
            self._open = type(piece)
            # There is no signature, but clients expect one.
            block = {"type": kind, kind: ""} | ({} if kind == "text" else {"signature": ""})
            self._blocks.append(block)
            events.append(self._at("content_block_start", content_block=dict(block)))
        self._parts.append(piece.text)
        return [*events, self._at("content_block_delta", delta={"type": f"{kind}_delta", kind: piece.text})]

    def _call(self, piece: ToolCallPiece) -> list[Event]:
        # The parser counts the calls of an answer; here an id is told from those of all other answers.
        block = {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": piece.name}
        self._blocks.append({**block, "input": json.loads(piece.arguments)})
        return [
            self._at("content_block_start", content_block={**block, "input": {}}),
            self._at("content_block_delta", delta={"type": "input_json_delta", "partial_json": piece.arguments}),
            self._at("content_block_stop"),
        ]

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        block = self._blocks[-1]
        block[block["type"]] = "".join(self._parts)
        self._open, self._parts = None, []
        return [self._at("content_block_stop")]

    def _at(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "index": len(self._blocks) - 1, **fields}


def _chat(body: CountRequest, answers: Answers) -> Chat:
    thinks = body.thinking is not None and body.thinking.type == "enabled"
    if thinks and not answers.reasons:
        raise Refused("thinking: this model does not reason before it answers", param="thinking")
    is_shown = body.tool_choice is None or body.tool_choice.type != "none"
    return Chat(
        messages=chat_messages(body),
        tools=[tool.for_template() for tool in body.tools or () if is_shown],
        switches={THINKING_SWITCH: thinks} if answers.reasons else {},
    )


def chat_messages(body: CountRequest) -> list[dict[str, Any]]:
    """Return the system and the messages in OpenAI's form. Raises: BadRequest where calls and results do not fit.

    Messages of one role that follow each other are one, as in Anthropic's API.
    """
    turns = Turns()
    if body.system:
        turns.say("system", texts_of(body.system))
    for role, group in groupby(enumerate(body.messages), key=lambda each: each[1].role):
        add = _add_user if role == "user" else _add_assistant
        add(turns, dict(group))
    return turns.messages()


def _add_user(turns: Turns, messages: Mapping[int, Message]) -> None:
    texts: list[str] = []
    for index, message in messages.items():
        if isinstance(message.content, str):
            texts.append(message.content)
            continue
        for place, block in enumerate(message.content):
            if block.type == "tool_result":
                where = f"messages[{index}].content[{place}]"
                if texts:
                    raise Refused(f"{where}: a tool_result has to come before any text", param="messages")
                turns.result(block.tool_use_id, block.text, where=where)
            elif block.type == "text":
                texts.append(block.text)
    if texts:
        turns.say("user", texts)


def _add_assistant(turns: Turns, messages: Mapping[int, Message]) -> None:
    for index, message in messages.items():
        if isinstance(message.content, str):
            turns.answer(message.content)
            continue
        for place, block in enumerate(message.content):
            match block.type:
                case "text":
                    turns.answer(block.text)
                case "thinking":
                    turns.reason(block.thinking)
                case "tool_use":
                    turns.call(block.id, block.name, block.input, where=f"messages[{index}].content[{place}]")


def _options(body: MessagesRequest) -> Options:
    choice = body.tool_choice
    return Options(
        sampling=SamplingParams(
            max_tokens=body.max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=secrets.randbits(SEED_BITS),
            stop=tuple(body.stop_sequences or ()),
        ),
        reasoning_tokens=body.thinking.budget_tokens if body.thinking else None,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        form=form_of(
            CHOICES[choice.type] if choice else None,
            name=choice.name if choice else None,
            is_parallel=not (choice and choice.disable_parallel_tool_use),
            is_strict=any(tool.strict for tool in body.tools or ()),
        ),
    )


def _end(delta: Delta) -> dict[str, str | None]:
    reason, sequence = STOP_REASONS[str(delta.finish_reason)], None
    if delta.finish_reason == "stop" and delta.stop_sequence is not None:
        reason, sequence = "stop_sequence", delta.stop_sequence
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _usage(usage: AnswerUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
