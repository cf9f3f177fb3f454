"""Anthropic's and OpenAI's other API over real models: what one says, the other says too."""

from contextlib import contextmanager
from pathlib import Path

import anthropic
import openai
import pytest

from inputs import qwen_coder_gguf, smollm2_gguf
from serve.servers import CONTEXT, MODEL_NAME, running_server

# Anthropic's client no longer has an argument for it.
GREEDY = {"extra_body": {"temperature": 0}}
QUESTION = "What is the capital of France?"


@contextmanager
def clients_of(path: Path):
    with (
        running_server(path) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as messages_client,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai_client,
    ):
        yield messages_client, openai_client


@pytest.fixture(scope="module")
def clients():
    with clients_of(smollm2_gguf()) as both:
        yield both


@pytest.fixture(scope="module")
def coders():
    with clients_of(qwen_coder_gguf()) as both:
        yield both


def message(client, question=QUESTION, *, max_tokens=12, **more):
    history = [{"role": "user", "content": question}]
    return client.messages.create(model=MODEL_NAME, max_tokens=max_tokens, messages=history, **GREEDY, **more)


def test_both_dialects_give_the_same_answer_whole_and_streamed(clients):
    messages_client, openai_client = clients
    whole = message(messages_client)
    with messages_client.messages.stream(
        model=MODEL_NAME, max_tokens=12, messages=[{"role": "user", "content": QUESTION}], **GREEDY
    ) as stream:
        streamed = stream.get_final_message()
    response = openai_client.responses.create(model=MODEL_NAME, input=QUESTION, temperature=0, max_output_tokens=12)
    with openai_client.responses.stream(
        model=MODEL_NAME, input=QUESTION, temperature=0, max_output_tokens=12
    ) as stream:
        parts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert whole.content[0].text
    assert len(parts) > 1
    assert whole.content[0].text == streamed.content[0].text
    assert whole.usage == streamed.usage
    assert response.output_text == whole.content[0].text == "".join(parts)
    assert response.usage.input_tokens == whole.usage.input_tokens


def test_counted_tokens_are_those_that_an_answer_reads(clients):
    messages_client, _ = clients
    history = [{"role": "user", "content": QUESTION}]
    counted = messages_client.messages.count_tokens(model=MODEL_NAME, messages=history, system="Be brief.")
    assert counted.input_tokens == message(messages_client, system="Be brief.").usage.input_tokens


def test_tools_are_refused_where_the_template_has_no_place_for_them(clients):
    messages_client, openai_client = clients
    with pytest.raises(anthropic.BadRequestError, match="no place for tools"):
        message(messages_client, tools=[{"name": "f", "input_schema": {"type": "object"}}])
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        openai_client.responses.create(
            model=MODEL_NAME, input=QUESTION, tools=[{"type": "function", "name": "f", "parameters": {}}]
        )


def test_too_long_an_answer_is_refused_with_the_numbers(clients):
    messages_client, _ = clients
    with pytest.raises(anthropic.BadRequestError, match=f"room for {CONTEXT} in all"):
        message(messages_client, max_tokens=4096)


def test_model_reads_what_a_tool_returned(coders):
    messages_client, openai_client = coders
    asked, returned = "How warm is it in Graz?", "31 degrees"
    messages = [
        {"role": "user", "content": asked},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t", "name": "warmth", "input": {"city": "Graz"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": returned}]},
    ]
    items = [
        {"role": "user", "content": asked},
        {"type": "function_call", "call_id": "t", "name": "warmth", "arguments": '{"city": "Graz"}'},
        {"type": "function_call_output", "call_id": "t", "output": returned},
    ]
    said = messages_client.messages.create(model=MODEL_NAME, max_tokens=24, messages=messages, **GREEDY)
    response = openai_client.responses.create(model=MODEL_NAME, input=items, max_output_tokens=24, temperature=0)
    assert "31" in said.content[0].text
    assert response.output_text == said.content[0].text


def test_model_reads_the_same_tools_in_both_dialects(coders):
    messages_client, openai_client = coders
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    history = [{"role": "user", "content": QUESTION}]
    counted = [
        messages_client.messages.count_tokens(model=MODEL_NAME, messages=history, tools=tools).input_tokens
        for tools in ([], [{"name": "warmth", "description": "Of a city.", "input_schema": schema}])
    ]
    tool = {"type": "function", "name": "warmth", "description": "Of a city.", "parameters": schema}
    response = openai_client.responses.create(model=MODEL_NAME, input=QUESTION, max_output_tokens=1, tools=[tool])
    assert counted[0] < counted[1] == response.usage.input_tokens
