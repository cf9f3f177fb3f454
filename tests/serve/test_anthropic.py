"""Anthropic's API, asked by Anthropic's client over a socket."""

import json
from contextlib import contextmanager

import anthropic
import httpx
import pytest

from freehold.errors import Draining, EngineFailed, Overloaded, TimedOut
from serve.scripted import SCRIPTS, ScriptedAnswers, Stage, call, ended, reasoning, said, text
from serve.servers import ask_and_leave, running_server

QUESTION = [{"role": "user", "content": "Hello?"}]
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {}}}
ASKED = {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"a": 1}}]}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}


STAGE = Stage()


@pytest.fixture(scope="module", autouse=True)
def _server():
    with running_server(STAGE) as STAGE.url:
        yield


@contextmanager
def client_of(answers):
    STAGE.playing = answers
    with anthropic.Anthropic(base_url=STAGE.url, api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages=QUESTION, *, max_tokens=50, model="scripted", **more):
    return client.messages.create(model=model, max_tokens=max_tokens, messages=messages, **more)


def asked(messages=QUESTION, *, reasons=True, **more):
    """Return the conversation and the options that a request comes to."""
    answers = ScriptedAnswers(ended(), reasons=reasons)
    with client_of(answers) as client:
        ask(client, messages, **more)
    return answers.chats[0], answers.options[0]


def without_ids(message):
    """Return a message as plain values, but for the ids, which are each answer's own."""
    plain = message.to_dict()
    plain.pop("id")
    for block in plain["content"]:
        block.pop("id", None)
    return plain


@pytest.mark.parametrize("name", SCRIPTS)
def test_streamed_message_is_the_whole_one(name):
    with client_of(ScriptedAnswers(*SCRIPTS[name])) as client:
        whole = ask(client)
        with client.messages.stream(model="scripted", max_tokens=50, messages=QUESTION) as stream:
            streamed = stream.get_final_message()
    assert without_ids(streamed) == without_ids(whole)
    assert streamed.id != whole.id


def test_message_has_a_block_for_each_run_of_pieces_and_each_call():
    with client_of(ScriptedAnswers(*SCRIPTS["calls"])) as client:
        message = ask(client)
    blocks = without_ids(message)["content"]
    assert blocks == [
        {"type": "thinking", "thinking": "Two.", "signature": ""},
        {"type": "text", "text": "I ask."},
        {"type": "tool_use", "name": "weather", "input": {"city": "Graz"}},
        {"type": "tool_use", "name": "weather", "input": {}},
    ]
    ids = [block.id for block in message.content if block.type == "tool_use"]
    assert len(set(ids)) == 2
    assert all(each.startswith("toolu_") for each in ids)
    assert message.id.startswith("msg_")
    assert message.model == "scripted"
    assert message._request_id.startswith("req_")


@pytest.mark.parametrize(
    ("name", "reason", "sequence"),
    [
        ("text", "end_turn", None),
        ("cut", "max_tokens", None),
        ("calls", "tool_use", None),
        ("stop sequence", "stop_sequence", "three"),
    ],
)
def test_stop_reason_says_how_the_answer_ended(name, reason, sequence):
    with client_of(ScriptedAnswers(*SCRIPTS[name])) as client:
        message = ask(client)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_usage_counts_what_was_read_written_and_reasoned():
    with client_of(ScriptedAnswers(*SCRIPTS["reasoning"])) as client:
        usage = ask(client).usage
    assert (usage.input_tokens, usage.output_tokens, usage.output_tokens_details.thinking_tokens) == (7, 5, 3)


def test_events_come_in_the_documented_order():
    script = (said(reasoning("A")), said(text("B"), text("C")), said(call("f", "{}")), ended(reason="tool_calls"))
    with client_of(ScriptedAnswers(*script)) as client:
        events = list(ask(client, stream=True))
    shown = [(event.type, getattr(event, "index", None)) for event in events]
    assert shown == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert events[0].message.usage.input_tokens == 7
    assert events[0].message.content == []
    deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert deltas == ["thinking_delta", "text_delta", "text_delta", "input_json_delta"]
    assert events[-2].delta.stop_reason == "tool_use"


def test_each_event_is_named_by_its_type():
    STAGE.playing = ScriptedAnswers(*SCRIPTS["text"])
    body = {"model": "scripted", "max_tokens": 5, "messages": QUESTION, "stream": True}
    lines = httpx.post(f"{STAGE.url}/v1/messages", json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"
    assert all(f'"type":"{name}"' in data for name, data in zip(names, lines[1::3], strict=True))


def test_an_answer_can_be_sent_back_as_it_came():
    answers = ScriptedAnswers(*SCRIPTS["calls"])
    with client_of(answers) as client:
        with client.messages.stream(model="scripted", max_tokens=50, messages=QUESTION) as stream:
            message = stream.get_final_message()
        first, second = [block.id for block in message.content if block.type == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": second, "content": "rain", "cache_control": {"type": "ephemeral"}},
            {"type": "tool_result", "tool_use_id": first, "content": [{"type": "text", "text": "sun"}]},
            {"type": "text", "text": "Well?"},
        ]
        history = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
        ask(client, history, tools=[TOOL])
    calls = [
        {"id": first, "type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}},
        {"id": second, "type": "function", "function": {"name": "weather", "arguments": {}}},
    ]
    assert answers.chats[1].messages == [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "I ask.", "reasoning_content": "Two.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": first, "content": "sun"},
        {"role": "tool", "tool_call_id": second, "content": "rain"},
        {"role": "user", "content": "Well?"},
    ]


def test_system_and_messages_of_one_role_become_one_message_each():
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    messages = [
        {"role": "user", "content": "One"},
        {"role": "user", "content": [{"type": "text", "text": "Two", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": []},
        {"role": "user", "content": "Three"},
    ]
    chat, _ = asked(messages, system=system, cache_control={"type": "ephemeral"})
    assert [message["role"] for message in chat.messages] == ["system", "user", "user"]
    assert [part["text"] for part in chat.messages[0]["content"]] == ["Be brief.", "Be kind."]
    assert [part["text"] for part in chat.messages[1]["content"]] == ["One", "Two"]


def test_failed_tool_is_told_to_the_model():
    chat, _ = asked([*QUESTION, ASKED, {"role": "user", "content": [RESULT | {"is_error": True}]}])
    assert chat.messages[-1]["content"] == "Error: sunny"


def test_tools_reach_the_template_in_its_form():
    chat, options = asked(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    function = {"name": "weather", "description": "Tells it.", "parameters": TOOL["input_schema"]}
    assert chat.tools == [{"type": "function", "function": function}]
    assert not options.parallel_tool_calls


def test_tools_are_hidden_where_none_may_be_called():
    chat, options = asked(tools=[TOOL], tool_choice={"type": "none"})
    assert chat.tools == []
    assert options.parallel_tool_calls


def test_sampling_is_what_the_request_says():
    _, options = asked(extra_body={"temperature": 0, "top_p": 0.5, "top_k": 3}, stop_sequences=["a", "b"], max_tokens=9)
    drawn = options.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.stop) == (0, 0.5, 3, ("a", "b"))
    assert drawn.max_tokens == 9


def test_sampling_without_a_word_is_that_of_the_api_with_a_seed_of_its_own():
    (_, first), (_, second) = asked(), asked()
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize(
    ("thinking", "switch", "budget"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True, 1024),
        ({"type": "disabled"}, False, None),
        (anthropic.omit, False, None),
    ],
    ids=["enabled", "disabled", "absent"],
)
def test_model_reasons_where_it_is_asked_to(thinking, switch, budget):
    chat, options = asked(thinking=thinking, max_tokens=2000)
    assert chat.switches == {"enable_thinking": switch}
    assert options.reasoning_tokens == budget


def test_model_that_does_not_reason_need_not_be_told():
    chat, _ = asked(reasons=False, thinking={"type": "disabled"})
    assert chat.switches == {}


REFUSED = {
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    "document": ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
    "image in a result": (
        {"messages": [*QUESTION, ASKED, {"role": "user", "content": [RESULT | {"content": [{"type": "image"}]}]}]},
        "messages[2].content[0].content[0]: blocks with the type image",
    ),
    "redacted": (
        {"messages": [*QUESTION, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": ""}]}]},
        "redacted_thinking",
    ),
    "system role": ({"messages": [{"role": "system", "content": "x"}, *QUESTION]}, "messages with the role system"),
    "prefill": ({"messages": [*QUESTION, {"role": "assistant", "content": "Well"}]}, "to be continued"),
    "result after text": (
        {"messages": [*QUESTION, ASKED, {"role": "user", "content": [{"type": "text", "text": "x"}, RESULT]}]},
        "messages[2].content[1]: a tool_result has to come before any text",
    ),
    "no result": ({"messages": [*QUESTION, ASKED, *QUESTION]}, "a call has no result"),
    "stray result": ({"messages": [{"role": "user", "content": [RESULT]}]}, "no call with this id"),
    "two results": ({"messages": [*QUESTION, ASKED, {"role": "user", "content": [RESULT, RESULT]}]}, "second result"),
    "same call twice": (
        {"messages": [*QUESTION, {"role": "assistant", "content": ASKED["content"] * 2}, *QUESTION]},
        "messages[1].content[1]: a second call",
    ),
    "unnamed tool": ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "a name goes with the type tool"),
    "named any": (
        {"tools": [TOOL], "tool_choice": {"type": "any", "name": "weather"}},
        "a name goes with the type tool",
    ),
    "server tool": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    "two tools of a name": ({"tools": [TOOL, TOOL]}, "second tool named 'weather'"),
    "budget": ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "budget_tokens has to be less than max_tokens"),
    "adaptive": ({"thinking": {"type": "adaptive"}}, "thinking: thinking configurations with the type adaptive"),
    "no budget": ({"extra_body": {"thinking": {"type": "enabled"}}}, "thinking: budget_tokens goes with"),
    "hot": ({"extra_body": {"temperature": 1.5}}, "temperature: Input should be less than or equal to 1"),
    "text for a number": ({"extra_body": {"temperature": "1"}}, "temperature"),
    "container": ({"container": "c"}, "container is not supported"),
    "output config": ({"output_config": {"effort": "low"}}, "output_config is not supported"),
    "unknown": ({"extra_body": {"wish": 1}}, "wish is not supported"),
    "unknown in a block": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "wish": 1}]}]},
        "messages[0].content[0].wish is not supported",
    ),
    "empty stop": ({"stop_sequences": [""]}, "stop_sequences[0]"),
    "no messages": ({"messages": []}, "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name):
    given, told = REFUSED[name]
    with client_of(ScriptedAnswers(ended())) as client, pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **given)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert told in caught.value.body["error"]["message"]
    assert caught.value.body["request_id"] == caught.value.response.headers["x-request-id"]


def test_thinking_is_refused_where_the_model_does_not_reason():
    answers = ScriptedAnswers(ended(), reasons=False)
    with client_of(answers) as client, pytest.raises(anthropic.BadRequestError, match="does not reason"):
        ask(client, thinking={"type": "enabled", "budget_tokens": 10})


@pytest.mark.parametrize("value", ["NaN", r'"\ud800"'])
def test_what_could_not_be_sent_back_is_refused(value):
    tool = f'{{"name": "f", "input_schema": {{"x": {value}}}}}'
    body = f'{{"model": "scripted", "max_tokens": 5, "messages": {json.dumps(QUESTION)}, "tools": [{tool}]}}'
    STAGE.playing = ScriptedAnswers(ended())
    response = httpx.post(f"{STAGE.url}/v1/messages", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("tools[0].input_schema: this is not JSON")


def test_max_tokens_is_needed():
    STAGE.playing = ScriptedAnswers(ended())
    response = httpx.post(f"{STAGE.url}/v1/messages", json={"model": "scripted", "messages": QUESTION})
    assert response.status_code == 400
    assert "max_tokens" in response.json()["error"]["message"]


def test_model_of_another_name_is_not_found():
    with client_of(ScriptedAnswers(ended())) as client, pytest.raises(anthropic.NotFoundError) as caught:
        ask(client, model="another")
    assert caught.value.body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("too much is waiting"), 429, "rate_limit_error"),
        (Draining("it is about to stop"), 503, "overloaded_error"),
        (TimedOut("the request was late"), 504, "timeout_error"),
        (EngineFailed("it failed"), 500, "api_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_failure_before_the_first_event_has_its_own_status(error, status, kind, streams):
    with client_of(ScriptedAnswers(error)) as client, pytest.raises(anthropic.APIStatusError) as caught:
        ask(client, stream=streams)
    assert caught.value.status_code == status
    assert caught.value.body["error"]["type"] == kind


def test_failure_under_way_ends_the_stream_with_an_error():
    with client_of(ScriptedAnswers(said(text("Hel")), EngineFailed("it failed"))) as client:
        stream = iter(ask(client, stream=True))
        assert [next(stream).type for _ in range(3)] == ["message_start", "content_block_start", "content_block_delta"]
        with pytest.raises(anthropic.APIStatusError) as caught:
            next(stream)
    assert caught.value.body["error"] == {"type": "api_error", "message": "it failed"}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_answer_ends_when_its_client_is_gone(streams):
    answers = ScriptedAnswers(said(text("Hel")), None)
    STAGE.playing = answers
    body = {"model": "scripted", "max_tokens": 5, "messages": QUESTION, "stream": streams}
    if streams:
        with httpx.stream("POST", f"{STAGE.url}/v1/messages", json=body) as response:
            next(response.iter_raw())
    else:
        ask_and_leave(f"{STAGE.url}/v1/messages", body, has_begun=answers.begun.is_set)
    assert answers.closed.wait(60)


def test_tokens_are_counted_without_an_answer():
    answers = ScriptedAnswers()
    with client_of(answers) as client:
        counted = client.messages.count_tokens(
            model="scripted",
            messages=QUESTION,
            system="Be brief.",
            tools=[TOOL],
            thinking={"type": "enabled", "budget_tokens": 1 << 20},
        )
    assert counted.input_tokens == 7
    assert answers.options == []
    assert [message["role"] for message in answers.chats[0].messages] == ["system", "user"]
    assert answers.chats[0].switches == {"enable_thinking": True}
