"""OpenAI's Responses API, asked by OpenAI's client over a socket."""

from contextlib import contextmanager

import httpx
import openai
import pytest

from freehold.errors import Draining, EngineFailed, Overloaded, TimedOut
from serve.scripted import SCRIPTS, ScriptedAnswers, Stage, call, ended, reasoning, said, text
from serve.servers import ask_and_leave, running_server

TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
USER = {"role": "user", "content": "Hello?"}


STAGE = Stage()


@pytest.fixture(scope="module", autouse=True)
def _server():
    with running_server(STAGE) as STAGE.url:
        yield


@contextmanager
def client_of(answers):
    STAGE.playing = answers
    with openai.OpenAI(base_url=f"{STAGE.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, given="Hello?", *, model="scripted", **more):
    return client.responses.create(model=model, input=given, **more)


def asked(given="Hello?", *, reasons=True, **more):
    """Return the conversation and the options that a request comes to."""
    answers = ScriptedAnswers(ended(), reasons=reasons)
    with client_of(answers) as client:
        ask(client, given, **more)
    return answers.chats[0], answers.options[0]


def without_ids(response):
    """Return a response as plain values, but for the ids and times, which are each answer's own."""
    plain = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        plain.pop(name)
    for item in plain["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return plain


def put_together(events):
    """Return the items that the events of a stream tell of, by the changes alone."""
    items = []
    for event in events:
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(items)
                items.append(event.item.to_dict())
            case "response.content_part.added":
                items[event.output_index]["content"].append(event.part.to_dict())
            case "response.output_text.delta" | "response.reasoning_text.delta":
                items[event.output_index]["content"][event.content_index]["text"] += event.delta
            case "response.function_call_arguments.delta":
                items[event.output_index]["arguments"] += event.delta
    return items


@pytest.mark.parametrize("name", SCRIPTS)
def test_streamed_response_is_the_whole_one(name):
    with client_of(ScriptedAnswers(*SCRIPTS[name])) as client:
        whole = ask(client)
        events = list(ask(client, stream=True))
    assert without_ids(events[-1].response) == without_ids(whole)
    items = [item | {"status": None} for item in put_together(events)]
    assert items == [item.to_dict() | {"status": None} for item in events[-1].response.output]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output


def test_client_puts_a_stream_together():
    with (
        client_of(ScriptedAnswers(*SCRIPTS["calls"])) as client,
        client.responses.stream(model="scripted", input="Hello?", tools=[TOOL]) as stream,
    ):
        response = stream.get_final_response()
    assert response.output_text == "I ask."
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output[2].arguments == '{"city": "Graz"}'


def test_events_come_in_the_documented_order():
    script = (said(reasoning("A")), said(text("B"), text("C")), said(call("f", "{}")), ended(reason="tool_calls"))
    with client_of(ScriptedAnswers(*script)) as client:
        events = list(ask(client, stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.status == "in_progress"
    assert events[0].response.usage is None
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1


def test_each_event_is_named_by_its_type():
    STAGE.playing = ScriptedAnswers(*SCRIPTS["text"])
    body = {"model": "scripted", "input": "Hello?", "stream": True}
    lines = httpx.post(f"{STAGE.url}/v1/responses", json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[0] == "response.created"
    assert names[-1] == "response.completed"
    assert all(f'"type":"{name}"' in data for name, data in zip(names, lines[1::3], strict=True))


def test_response_repeats_what_was_asked():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
    metadata = {"run": "7"}
    with client_of(ScriptedAnswers(*SCRIPTS["reasoning"])) as client:
        response = ask(
            client,
            instructions="Be brief.",
            max_output_tokens=9,
            metadata=metadata,
            parallel_tool_calls=False,
            reasoning={"effort": "low"},
            temperature=0,
            text={"format": {"type": "text"}},
            tool_choice="none",
            tools=[tool],
            top_p=0.5,
        )
    plain = response.to_dict()
    assert plain["instructions"] == "Be brief."
    assert (plain["temperature"], plain["top_p"], plain["max_output_tokens"]) == (0, 0.5, 9)
    assert (plain["tool_choice"], plain["tools"], plain["parallel_tool_calls"]) == ("none", [tool], False)
    assert plain["metadata"] == metadata
    assert plain["reasoning"] == {"effort": "low", "summary": None}
    assert plain["store"] is False
    assert (plain["status"], plain["error"], plain["incomplete_details"]) == ("completed", None, None)
    assert plain["id"].startswith("resp_")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 5, 12)
    assert usage.output_tokens_details.reasoning_tokens == 3


def test_answer_that_was_cut_is_incomplete():
    with client_of(ScriptedAnswers(*SCRIPTS["cut"])) as client:
        response = ask(client)
        events = list(ask(client, stream=True))
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"
    assert events[-1].type == "response.incomplete"


def test_an_answer_can_be_sent_back_as_it_came():
    answers = ScriptedAnswers(*SCRIPTS["calls"])
    with client_of(answers) as client:
        response = ask(client, tools=[TOOL])
        first, second = [item.call_id for item in response.output if item.type == "function_call"]
        results = [
            {"type": "function_call_output", "call_id": second, "output": "rain"},
            {"type": "function_call_output", "call_id": first, "output": [{"type": "input_text", "text": "sun"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Well?"}]},
        ]
        ask(client, [USER, *response.output, *results], instructions="Be brief.")
    assert first != second
    calls = [
        {"id": first, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Graz"}'}},
        {"id": second, "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    assert answers.chats[1].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "I ask.", "reasoning_content": "Two.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": first, "content": "sun"},
        {"role": "tool", "tool_call_id": second, "content": "rain"},
        {"role": "user", "content": "Well?"},
    ]


def test_calls_one_after_the_other_are_messages_of_their_own():
    second = CALL | {"call_id": "call_2"}
    chat, _ = asked([USER, CALL, RESULT, second, RESULT | {"call_id": "call_2"}])
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant", "tool"]


def test_developer_is_the_system():
    chat, _ = asked([{"role": "developer", "content": "Be brief."}, USER])
    assert [message["role"] for message in chat.messages] == ["system", "user"]


def test_tools_reach_the_template_in_its_form():
    chat, options = asked(tools=[TOOL], parallel_tool_calls=False)
    function = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
    assert chat.tools == [{"type": "function", "function": function}]
    assert not options.parallel_tool_calls


def test_tools_are_hidden_where_none_may_be_called():
    chat, _ = asked(tools=[TOOL], tool_choice="none")
    assert chat.tools == []


def test_sampling_is_what_the_request_says():
    _, options = asked(temperature=0, top_p=0.5, max_output_tokens=9)
    assert (options.sampling.temperature, options.sampling.top_p, options.sampling.max_tokens) == (0, 0.5, 9)


def test_sampling_without_a_word_is_that_of_the_api_with_a_seed_of_its_own():
    (_, first), (_, second) = asked(), asked()
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.max_tokens) == (1.0, 1.0, None)
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize(
    ("effort", "switches", "budget"),
    [
        ("none", {"enable_thinking": False}, None),
        ("low", {"enable_thinking": True}, 1024),
        ("medium", {"enable_thinking": True}, 4096),
        ("high", {"enable_thinking": True}, 16384),
        (None, {}, None),
    ],
)
def test_effort_is_a_budget_of_reasoning(effort, switches, budget):
    chat, options = asked(reasoning={"effort": effort})
    assert chat.switches == switches
    assert options.reasoning_tokens == budget


def test_what_asks_for_nothing_may_be_given():
    asked(
        background=False,
        conversation=None,
        include=[],
        previous_response_id=None,
        prompt_cache_key="k",
        safety_identifier="s",
        service_tier="auto",
        store=False,
        truncation="disabled",
        user="u",
    )


REFUSED = {
    "store": ({"store": True}, "store: nothing is stored"),
    "previous response": ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
    "conversation": ({"conversation": "conv_1"}, "conversation is not supported"),
    "background": ({"background": True}, "background is not supported"),
    "include": ({"include": ["reasoning.encrypted_content"]}, "include is not supported"),
    "prompt": ({"prompt": {"id": "p"}}, "prompt is not supported"),
    "scores": ({"top_logprobs": 3}, "top_logprobs is not supported"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "grammar": ({"text": {"format": {"type": "grammar"}}}, "text.format: formats with the type grammar"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity is not supported"),
    "built-in tool": (
        {"tools": [{"type": "web_search"}]},
        "tools[0]: tools with the type web_search are not supported",
    ),
    "two tools of a name": ({"tools": [TOOL, TOOL]}, "second tool named 'weather'"),
    "built-in choice": (
        {"tools": [TOOL], "tool_choice": {"type": "web_search"}},
        "choices with the type web_search are not supported",
    ),
    "effort": ({"reasoning": {"effort": "xhigh"}}, "reasoning.effort"),
    "summary": ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    "image": (
        {"given": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        "input[0].content[0]: parts with the type input_image",
    ),
    "reference": ({"given": [{"type": "item_reference", "id": "x"}]}, "input[0]: items with the type item_reference"),
    "role": ({"given": [{"role": "tool", "content": "x"}]}, "input[0].role: Input should be"),
    "no result": ({"given": [USER, CALL]}, "a call has no result"),
    "late result": ({"given": [USER, CALL, USER, RESULT]}, "a call has no result"),
    "stray result": ({"given": [USER, RESULT]}, "input[1]: no call with this id"),
    "broken arguments": ({"given": [USER, CALL | {"arguments": "{"}, RESULT]}, "arguments"),
    "no input": ({"given": []}, "input"),
    "stop": ({"extra_body": {"stop": ["x"]}}, "stop is not supported"),
    "text for a number": ({"extra_body": {"temperature": "1"}}, "temperature"),
    "unknown in an item": ({"given": [USER | {"wish": 1}]}, "input[0].wish is not supported"),
    "options without a stream": ({"stream_options": {"include_obfuscation": False}}, "give stream true"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name):
    given, told = REFUSED[name]
    with client_of(ScriptedAnswers(ended())) as client, pytest.raises(openai.BadRequestError) as caught:
        ask(client, **given)
    assert caught.value.type == "invalid_request_error"
    assert told in caught.value.body["message"]


def test_model_that_does_not_reason_need_not_be_told():
    chat, options = asked(reasons=False, reasoning={"effort": "none"})
    assert chat.switches == {}
    assert options.reasoning_tokens is None


def test_effort_is_refused_where_the_model_does_not_reason():
    answers = ScriptedAnswers(ended(), reasons=False)
    with client_of(answers) as client, pytest.raises(openai.BadRequestError, match="does not reason") as caught:
        ask(client, reasoning={"effort": "low"})
    assert caught.value.param == "reasoning.effort"


@pytest.mark.parametrize("field", ["metadata", "tools"])
def test_what_could_not_be_sent_back_is_refused(field):
    value = {"metadata": r'{"x": "\ud800"}', "tools": '[{"type": "function", "name": "f", "parameters": {"x": NaN}}]'}
    body = f'{{"model": "scripted", "input": "Hello?", "{field}": {value[field]}}}'
    STAGE.playing = ScriptedAnswers(ended())
    response = httpx.post(f"{STAGE.url}/v1/responses", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(field)


def test_model_of_another_name_is_not_found():
    with client_of(ScriptedAnswers(ended())) as client, pytest.raises(openai.NotFoundError):
        ask(client, model="gpt")


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("too much is waiting"), 429),
        (Draining("it is about to stop"), 503),
        (TimedOut("the request was late"), 504),
        (EngineFailed("it failed"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_failure_before_the_first_event_has_its_own_status(error, status, streams):
    with client_of(ScriptedAnswers(error)) as client, pytest.raises(openai.APIStatusError) as caught:
        ask(client, stream=streams)
    assert caught.value.status_code == status


def test_failure_under_way_is_the_last_event():
    with client_of(ScriptedAnswers(said(text("Hel")), EngineFailed("it failed"))) as client:
        events = list(ask(client, stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.sequence_number == len(events) - 1
    assert last.response.status == "failed"
    assert (last.response.error.code, last.response.error.message) == ("server_error", "it failed")
    assert last.response.output[0].content[0].text == "Hel"
    assert last.response.output[0].status == "incomplete"


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_answer_ends_when_its_client_is_gone(streams):
    answers = ScriptedAnswers(said(text("Hel")), None)
    STAGE.playing = answers
    body = {"model": "scripted", "input": "Hello?", "stream": streams}
    if streams:
        with httpx.stream("POST", f"{STAGE.url}/v1/responses", json=body) as response:
            next(response.iter_raw())
    else:
        ask_and_leave(f"{STAGE.url}/v1/responses", body, has_begun=answers.begun.is_set)
    assert answers.closed.wait(60)
