"""Answers while they are written: how they come does not matter, and nothing that a client sends breaks them."""

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
from serve.bodies import BODIES, ODD, changed, places
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


@pytest.fixture(scope="module")
def url():
    with running_server(ScriptedAnswers(ended(text("x")))) as address:
        yield address


@pytest.mark.parametrize("path", BODIES)
def test_odd_values_are_accepted_or_refused_but_never_break(url, path):
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}) as client:
        assert client.post(path, content=json.dumps(BODIES[path])).status_code == 200
        for place in places(BODIES[path]):
            for odd in ODD:
                response = client.post(path, content=json.dumps(changed(BODIES[path], place, odd)))
                assert response.status_code in (200, 400, 404), (place, odd)
                assert len(response.content) < 5000
