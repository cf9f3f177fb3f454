"""What requests may hold: everything that is not said to be supported is refused by its name. Without torch."""

import subprocess
import sys

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from freehold.serve.errors import Failure, error_body, failure_of
from freehold.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def refusal(kind: type, body: object) -> Failure:
    """Return how a body is refused, as the server does it."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return failure_of(RequestValidationError(errors, body=body))


def test_schema_does_not_import_torch():
    code = "import sys, freehold.serve.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("functions", [], "functions"),
        ("audio", {}, "audio"),
        ("modalities", ["text", "audio"], "modalities"),
        ("verbosity", "low", "verbosity"),
        ("prediction", {"type": "content", "content": "a"}, "prediction"),
        ("web_search_options", {}, "web_search_options"),
        ("ignore_eos", 1, "ignore_eos"),
        ("min_tokens", -1, "min_tokens"),
        ("temperature", "1", "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", True, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("top_p", -0.1, "top_p"),
        ("min_p", 1.1, "min_p"),
        ("top_k", -2, "top_k"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("presence_penalty", 2.5, "presence_penalty"),
        ("frequency_penalty", -2.5, "frequency_penalty"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 1.0, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("n", 0, "n"),
        ("n", 17, "n"),
        ("seed", 1 << 63, "seed"),
        ("stop", "", "stop"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", ["a", 1], "stop[1]"),
        ("stream", "true", "stream"),
        ("logprobs", 1, "logprobs"),
        ("top_logprobs", 21, "top_logprobs"),
        ("logit_bias", {"x": 1.0}, "logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias.5"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("response_format", {"type": "grammar"}, "response_format.type"),
        ("response_format", {"type": "json_schema"}, "response_format"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "f"}},
            "response_format.json_schema.schema",
        ),
        ("tool_choice", "any", "tool_choice"),
        ("tool_choice", {"type": "allowed_tools"}, "tool_choice"),
        ("tools", [{"type": "web_search"}], "tools[0].type"),
        ("tools", [{"type": "function", "function": {"name": "f g"}}], "tools[0].function.name"),
        ("tools", [{"type": "function", "function": {"name": "f", "strict": 1}}], "tools[0].function.strict"),
        ("reasoning_effort", "extreme", "reasoning_effort"),
        ("reasoning_budget", -1, "reasoning_budget"),
        ("store", True, "store"),
        ("service_tier", "priority", "service_tier"),
        ("metadata", {"a": 1}, "metadata.a"),
        ("stream_options", {"include_usage": True, "more": 1}, "stream_options.more"),
        ("messages", [], "messages"),
        ("messages", [{"role": "function", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ("messages", [{"role": "user", "content": "x", "audio": {"id": "a"}}], "messages[0].audio"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ],
)
def test_what_chat_does_not_take_is_refused_by_its_name(field, value, param):
    failure = refusal(ChatRequest, {**CHAT, field: value})
    assert (failure.status, failure.param) == (400, param)
    assert param in failure.message


@pytest.mark.parametrize(
    "more",
    [
        {"top_logprobs": 2},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"reasoning_effort": "low", "reasoning_budget": 5},
    ],
    ids=lambda more: next(iter(more)),
)
def test_fields_that_contradict_are_refused(more):
    assert next(iter(more)).split("_")[0] in refusal(ChatRequest, {**CHAT, **more}).message


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        (CompletionRequest, {"prompt": "a", "suffix": "b"}, "suffix"),
        (CompletionRequest, {"prompt": "a", "best_of": 2}, "best_of"),
        (CompletionRequest, {"prompt": "a", "logprobs": True}, "logprobs"),
        (CompletionRequest, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {"prompt": []}, "prompt"),
        (CompletionRequest, {"prompt": [1, "a"]}, "prompt"),
        (CompletionRequest, {"prompt": [[1], []]}, "prompt"),
        (CompletionRequest, {"prompt": [-1]}, "prompt"),
        (CompletionRequest, {"prompt": ["a"] * 64, "n": 3}, "prompts"),
        (EmbeddingRequest, {"input": "a", "dimensions": 8}, "dimensions"),
        (EmbeddingRequest, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (EmbeddingRequest, {"input": []}, "input"),
        (TokenizeRequest, {}, "prompt"),
    ],
)
def test_what_the_other_routes_do_not_take_is_refused_by_its_name(kind, body, named):
    failure = refusal(kind, {"model": "m", **body})
    assert failure.status == 400
    assert named in failure.message


# What clients send though nobody asked them to: each asks for what is done anyway.
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}),
        (
            ChatRequest,
            {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "response_format": {"type": "text"}},
        ),
        (
            ChatRequest,
            {"modalities": ["text"], "verbosity": "medium", "prompt_cache_key": "k", "safety_identifier": "s"},
        ),
        (ChatRequest, {"functions": None, "function_call": None, "audio": None, "prediction": None}),
        (ChatRequest, {"logprobs": False, "n": 1, "presence_penalty": 0, "logit_bias": {}, "stop": []}),
        (CompletionRequest, {"prompt": "a", "best_of": 1, "suffix": None, "logprobs": None, "repetition_penalty": 1.0}),
        (CompletionRequest, {"prompt": "a", "best_of": 2, "n": 2, "suffix": "", "stop": None}),
        (EmbeddingRequest, {"input": "a", "dimensions": None, "user": "u", "encoding_format": "base64"}),
    ],
)
def test_a_field_that_asks_for_nothing_is_taken(kind, body):
    kind.model_validate({**(CHAT if kind is ChatRequest else {"model": "m"}), **body})


def test_null_is_the_default_everywhere():
    fields = set(ChatRequest.model_fields) - {"model", "messages"}
    assert ChatRequest.model_validate({**CHAT, **dict.fromkeys(fields)}).stops == ()


def test_an_answer_can_be_sent_back_as_it_came():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
    message = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    request = ChatRequest.model_validate({**CHAT, "messages": [{**message, "tool_calls": [call]}]})
    sent = request.messages[0].for_template()
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert set(sent) == {"role", "tool_calls"}


def test_a_tool_keeps_its_keys_in_their_order():
    tool = {"function": {"parameters": {"z": 1, "a": 2}, "name": "f"}, "type": "function"}
    kept = ChatRequest.model_validate({**CHAT, "tools": [tool]}).tools[0].given
    assert str(kept) == str(tool)


@given(JSON)
def test_no_value_of_a_field_is_more_than_refused(value):
    for field in ("messages", "stop", "tools", "logit_bias", "chat_template_kwargs", "\ud800"):
        try:
            ChatRequest.model_validate({**CHAT, field: value})
        except ValidationError as error:
            errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            failure = failure_of(RequestValidationError(errors, body={**CHAT, field: value}))
            assert failure.status == 400
            str(error_body("/", failure, "r")).encode()


def test_a_refusal_does_not_repeat_what_was_sent():
    secret = "my password is swordfish"
    for body in ({**CHAT, "temperature": secret}, {**CHAT, "messages": [{"role": "user", "content": [secret]}]}):
        assert secret not in str(refusal(ChatRequest, body))
