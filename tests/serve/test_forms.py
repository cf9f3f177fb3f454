"""Forced calls and schemas with real models, through the clients of each API: answers keep to them in any way sent."""

import json

import openai
import pytest
from anthropic import Anthropic

from inputs import qwen_coder_gguf, smollm2_gguf
from serve.servers import MODEL_NAME, openai_client, running_server

SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["place", "days", "unit"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "What will the weather be in Rome?"}]
WEATHER = {"name": "get_weather", "description": "The weather of a place", "parameters": SCHEMA}
CLOCK = {"name": "clock", "description": "What time it is"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
COMMON = {"model": MODEL_NAME, "max_tokens": 120, "temperature": 1.0}


@pytest.fixture(scope="module")
def qwen():
    with running_server(qwen_coder_gguf()) as url:
        yield url


@pytest.fixture(scope="module")
def smol():
    with running_server(smollm2_gguf()) as url:
        yield url


def keeps(value):
    return (
        list(value) == ["place", "days", "unit"]
        and isinstance(value["place"], str)
        and len(value["place"]) <= 20
        and type(value["days"]) is int
        and 1 <= value["days"] <= 14
        and value["unit"] in ("C", "F")
    )


def test_a_named_function_is_called_once_with_arguments_that_keep_to_its_schema_streamed_and_whole(qwen):
    request = COMMON | {"messages": QUESTION, "tools": TOOLS, "tool_choice": NAMED, "seed": 3}
    with openai_client(qwen) as client:
        (choice,) = client.chat.completions.create(**request).choices
        (call,) = choice.message.tool_calls
        streamed = [chunk.choices[0].delta for chunk in client.chat.completions.create(**request, stream=True)]
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "get_weather")
    assert keeps(json.loads(call.function.arguments))
    (part,) = [part for delta in streamed for part in delta.tool_calls or ()]
    assert part.function.arguments == call.function.arguments


def test_a_required_call_is_one_where_calls_may_not_be_parallel(qwen):
    request = COMMON | {"messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "seed": 4}
    with openai_client(qwen) as client:
        (choice,) = client.chat.completions.create(**request, parallel_tool_calls=False).choices
    (call,) = choice.message.tool_calls
    assert call.function.name in ("get_weather", "clock")
    assert call.function.name == "clock" or keeps(json.loads(call.function.arguments))


def test_anthropics_any_and_tool_force_a_call_streamed_and_whole(qwen):
    tools = [
        {"name": "get_weather", "description": "The weather of a place", "input_schema": SCHEMA},
        {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
    ]
    request = {"model": MODEL_NAME, "max_tokens": 120, "messages": QUESTION, "tools": tools}
    request["extra_body"] = {"temperature": 0}
    one = {"disable_parallel_tool_use": True}
    with Anthropic(base_url=qwen, api_key="none", max_retries=0, timeout=300) as client:
        named = client.messages.create(**request, tool_choice={"type": "tool", "name": "clock"})
        whole = client.messages.create(**request, tool_choice={"type": "any", **one})
        with client.messages.stream(**request, tool_choice={"type": "any", **one}) as stream:
            streamed = stream.get_final_message()
    assert [(block.type, block.name, block.input) for block in named.content] == [("tool_use", "clock", {})]
    (block,) = whole.content
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert (block.name, block.input) == (streamed.content[0].name, streamed.content[0].input)
    assert block.name == "clock" or keeps(block.input)


def test_the_responses_api_holds_calls_and_texts_and_says_so(qwen):
    tools = [{"type": "function", **CLOCK, "parameters": None, "strict": True}]
    request = {"model": MODEL_NAME, "max_output_tokens": 120, "input": "What time is it?"}
    schema = {"type": "json_schema", "name": "weather", "schema": SCHEMA}
    with openai_client(qwen) as client:
        called = client.responses.create(**request, tools=tools, tool_choice={"type": "function", "name": "clock"})
        written = client.responses.create(**request, text={"format": schema})
    assert [(item.type, item.name, item.arguments) for item in called.output] == [("function_call", "clock", "{}")]
    assert called.to_dict()["tool_choice"] == {"type": "function", "name": "clock"}
    assert called.tools[0].strict is True
    assert keeps(json.loads(written.output_text))
    assert written.to_dict()["text"]["format"] == schema


def test_an_answer_keeps_to_a_schema_streamed_and_whole_and_scores_are_the_models_own(smol):
    request = COMMON | {"messages": QUESTION, "response_format": FORMAT, "seed": 5}
    with openai_client(smol) as client:
        (choice,) = client.chat.completions.create(**request, logprobs=True, top_logprobs=2).choices
        chunks = list(client.chat.completions.create(**request, stream=True))
    assert choice.finish_reason == "stop"
    assert keeps(json.loads(choice.message.content))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    # Asked like this the model would talk: what was drawn first is not what it finds likeliest.
    first = choice.logprobs.content[0]
    assert first.logprob < first.top_logprobs[0].logprob


def test_several_answers_each_keep_to_any_object_or_say_that_they_were_cut(smol):
    request = COMMON | {"messages": QUESTION, "response_format": {"type": "json_object"}, "n": 3, "seed": 6}
    with openai_client(smol) as client:
        choices = client.chat.completions.create(**request | {"max_tokens": 40}).choices
    for choice in choices:
        assert choice.message.content.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_a_schema_that_is_not_supported_is_refused_by_the_name_of_what_is_not(smol):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    with openai_client(smol) as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**COMMON, messages=QUESTION, response_format=schema)
    assert 'Unimplemented keys: ["uniqueItems"]' in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"
