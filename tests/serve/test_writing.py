"""Answers while they are written: how they come does not matter, and nothing that a client sends breaks them."""

import copy
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, with_config

from freehold.serve.anthropic import MessageWriting
from freehold.serve.dialect_shapes import MessageAnswer, ResponseAnswer
from freehold.serve.responses import ResponseWriting
from freehold.serve.responses_schema import ResponsesRequest
from freehold.text.answer import ReasoningPiece, TextPiece
from serve.scripted import SCRIPTS, ScriptedAnswers, call, ended, reasoning, said, text
from serve.servers import running_server

WORDS = st.text(min_size=1, max_size=5)
PIECES = st.lists(st.one_of(WORDS.map(text), WORDS.map(reasoning), st.just(call("f", '{"a": 1}'))), max_size=12)


def anthropic_writing():
    return MessageWriting(model="m", input_tokens=7)


def responses_writing():
    return ResponseWriting(ResponsesRequest(model="m", input="Hello?"))


def written(make, deltas):
    writing = make()
    events = writing.start() + [event for delta in deltas for event in writing.take(delta)]
    return nameless(writing.answer()), events


def nameless(value):
    """Return an answer without ids and times."""
    if isinstance(value, dict):
        return {k: nameless(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "completed_at")}
    return [nameless(each) for each in value] if isinstance(value, list) else value


def letters(piece):
    """Return a piece cut into its characters."""
    if isinstance(piece, TextPiece | ReasoningPiece):
        return [type(piece)(text=letter) for letter in piece.text]
    return [piece]


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_look_as_they_are_documented(name):
    for make, shape in ((anthropic_writing, MessageAnswer), (responses_writing, ResponseAnswer)):
        writing = make()
        for delta in SCRIPTS[name]:
            writing.take(delta)
        checked = TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(shape))
        assert checked.validate_python(writing.answer()) == writing.answer()


@pytest.mark.parametrize("make", [anthropic_writing, responses_writing])
@given(pieces=PIECES)
def test_answer_does_not_depend_on_how_it_came(make, pieces):
    at_once, _ = written(make, [ended(*pieces)])
    in_letters, events = written(make, [said(letter) for piece in pieces for letter in letters(piece)] + [ended()])
    assert in_letters == at_once
    json.dumps(events)


BODIES = {
    "/v1/messages": {
        "model": "scripted",
        "max_tokens": 2000,
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": ""},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]},
                    {"type": "text", "text": "x"},
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["x"],
    },
    "/v1/responses": {
        "model": "scripted",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t", "output": "x"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "metadata": {"a": "b"},
    },
}
ODD = (None, True, -1, 1e400, "", "\ud800", "x" * 2000, [], {}, [[]], {"type": "text"}, {"type": []}, {"role": {}})


@pytest.fixture(scope="module")
def url():
    with running_server(ScriptedAnswers(ended(text("x")))) as address:
        yield address


def places(value, above=()):
    """Yield the place of every value in a body."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*above, key)
        yield from places(each, (*above, key))


def changed(body, place, odd):
    """Return a body with something else in a place."""
    body = copy.deepcopy(body)
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = odd
    return body


@pytest.mark.parametrize("path", BODIES)
def test_odd_values_are_accepted_or_refused_but_never_break(url, path):
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}) as client:
        assert client.post(path, content=json.dumps(BODIES[path])).status_code == 200
        for place in places(BODIES[path]):
            for odd in ODD:
                response = client.post(path, content=json.dumps(changed(BODIES[path], place, odd)))
                assert response.status_code in (200, 400, 404), (place, odd)
                assert len(response.content) < 5000
