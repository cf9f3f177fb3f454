"""Chat completions with OpenAI's client over real sockets: of a real model, and of a script for what it never says."""

import json
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI

from freehold.engine.request import SamplingParams
from freehold.errors import Draining, EngineFailed, Overloaded, TimedOut
from freehold.text.answer import parse_answer
from inputs import smollm2_gguf
from serve.scripted import SCRIPTS, ScriptedAnswers, ended, said, text
from serve.servers import CONTEXT, MODEL_NAME, ask_and_leave, engine_of, openai_client, running_server, wait_for

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(smollm2_gguf(), aliases=("other",)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with openai_client(url) as made:
        yield made


def ask(client: OpenAI, messages=QUESTION, **options):
    return client.chat.completions.create(model=MODEL_NAME, messages=messages, **options)


def joined(chunks) -> dict[int, dict[str, object]]:
    """Return what a stream's chunks make, by choice."""
    choices: dict[int, dict[str, object]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            made = choices.setdefault(
                choice.index, {"content": "", "reasoning_content": "", "tool_calls": [], "scores": [], "reason": None}
            )
            delta = choice.delta.model_dump()
            assert made["reason"] is None, "nothing comes after the reason why an answer ended"
            made["content"] += delta["content"] or ""
            made["reasoning_content"] += delta.get("reasoning_content") or ""
            made["tool_calls"] += [(call["index"], call["function"]) for call in delta["tool_calls"] or []]
            made["scores"] += choice.logprobs.content if choice.logprobs else []
            made["reason"] = choice.finish_reason
    return choices


# A real model.


def test_an_answer_is_that_of_the_model_alone(client):
    model = engine_of(smollm2_gguf()).model
    alone = model.chat(QUESTION, sampling=SamplingParams(max_tokens=24, temperature=0.8, seed=5))
    answer = ask(client, max_tokens=24, temperature=0.8, seed=5)
    assert answer.choices[0].message.content == alone.text
    assert answer.usage.completion_tokens == alone.usage.completion_tokens
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["Paris"]},
        {"presence_penalty": 1, "frequency_penalty": 0.5, "extra_body": {"repetition_penalty": 1.2}},
        {"top_p": 0.5, "extra_body": {"top_k": 40, "min_p": 0.05}},
        {"logit_bias": {"0": -100.0}},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_stream_and_a_whole_answer_agree(client, options):
    options = {"max_tokens": 12, "temperature": 0.9, "seed": 11, **options}
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    streamed = joined(chunks)
    assert len(streamed) == options.get("n", 1)
    for choice in whole.choices:
        made = streamed[choice.index]
        assert made["content"] == choice.message.content
        assert made["reason"] == choice.finish_reason
        assert made["scores"] == (choice.logprobs.content if choice.logprobs else [])
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_each_choice_is_the_answer_of_its_own_seed(client):
    several = ask(client, max_tokens=10, temperature=1, seed=3, n=3)
    alone = [ask(client, max_tokens=10, temperature=1, seed=3 + index).choices[0].message for index in range(3)]
    assert [choice.message.content for choice in several.choices] == [message.content for message in alone]
    assert several.usage.prompt_tokens == ask(client, max_tokens=1).usage.prompt_tokens


def test_the_seed_that_was_drawn_is_told_and_draws_the_same(client):
    first = ask(client, max_tokens=10)
    again = ask(client, max_tokens=10, seed=first.model_extra["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content
    assert ask(client, max_tokens=1).model_extra["seed"] != first.model_extra["seed"]


def test_with_ignore_eos_an_answer_has_all_its_tokens(client):
    options = {"max_completion_tokens": 40, "temperature": 0, "stream": True}
    usages = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream_options=usages, extra_body={"ignore_eos": True, "min_tokens": 40}, **options))
    assert chunks[-1].usage.completion_tokens == 40
    assert joined(chunks)[0]["reason"] == "length"
    written = [chunk.usage.completion_tokens for chunk in chunks]
    assert written == sorted(written)
    assert written[0] == 1


def test_logprobs_are_of_the_text_and_begin_with_the_likeliest(client):
    answer = ask(client, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    scores = answer.logprobs.content
    assert b"".join(bytes(score.bytes) for score in scores).decode() == answer.message.content
    for score in scores:
        assert len(score.top_logprobs) == 3
        assert score.top_logprobs[0].token == score.token  # greedy
        logprobs = [top.logprob for top in score.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert max(logprobs) <= 0
    assert ask(client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, max_tokens=1).choices[0].logprobs is None
    ended = ask(client, max_tokens=9, logprobs=True, temperature=0, logit_bias={"2": 100})
    assert ended.choices[0].logprobs.content == []


def test_a_bias_decides_what_is_drawn(client, url):
    (token,) = httpx.post(f"{url}/tokenize", json={"prompt": " Rome"}).json()["tokens"]
    answer = ask(client, max_tokens=3, temperature=0, logit_bias={str(token): 100})
    assert answer.choices[0].message.content == " Rome Rome Rome"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, logit_bias={"999999": 1})
    assert refused.value.param == "logit_bias"


def test_max_completion_tokens_and_stop_end_an_answer(client):
    assert ask(client, max_completion_tokens=2).usage.completion_tokens == 2
    answer = ask(client, temperature=0, stop=" of").choices[0]
    assert (answer.message.content, answer.finish_reason) == ("The capital", "stop")


def test_texts_in_parts_and_developers_are_understood(client):
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    options = {"max_tokens": 8, "temperature": 0}
    as_parts = ask(
        client, [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}], **options
    )
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital\nof France?"}]
    assert as_parts.choices[0].message.content == ask(client, plain, **options).choices[0].message.content


def test_what_clients_send_along_changes_nothing(client):
    along = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "response_format": {"type": "text"},
    }
    with_it = ask(client, max_tokens=4, temperature=0, **along)
    assert with_it.choices[0].message.content == ask(client, max_tokens=4, temperature=0).choices[0].message.content


def test_a_model_by_another_name_answers_and_an_unknown_one_is_not_found(client):
    assert client.chat.completions.create(model="other", messages=QUESTION, max_tokens=1).model == "other"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(client, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, [{"role": "user", "content": "word " * 2000}], stream=stream)
    assert refused.value.code == "context_length_exceeded"
    assert str(CONTEXT) in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, max_tokens=CONTEXT, stream=stream)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"reasoning_budget": 5}}, "reasoning_budget"),
        ({"tools": [WEATHER]}, None),  # this model's template has no place for them
        ({"tool_choice": "required"}, None),
        ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, None),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
        ({"extra_body": {"chat_template_kwargs": {"messages": "x"}}}, None),
    ],
)
def test_what_this_model_cannot_do_is_refused(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id.startswith("req_")


def test_no_reasoning_is_what_a_model_that_does_not_reason_does(client):
    assert ask(client, max_tokens=1, reasoning_effort="none").choices[0].message.content


def test_tools_that_may_not_be_called_are_not_shown(client):
    assert ask(client, max_tokens=1, tools=[WEATHER], tool_choice="none").choices[0].message.content


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "small"}',
        b"\xff",
        b'{"model": "small", "messages": [{"role": "\\ud800"}]}',
    ],
)
def test_a_body_that_is_no_request_is_refused(url, body):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_is_gone_frees_all_it_had(url, stream):
    engine = engine_of(smollm2_gguf())
    body = {"model": MODEL_NAME, "messages": QUESTION, "stream": stream, "n": 2, "temperature": 0}
    body |= {"logit_bias": {"2": -100}}  # no end but the context's
    before = engine.stats()
    if stream:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        ask_and_leave(
            f"{url}/v1/chat/completions",
            body,
            has_begun=lambda: engine.stats().generated_tokens > before.generated_tokens,
        )
    wait_for(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    after = engine.stats()
    assert (after.num_free_pages, after.num_free_slots) == (before.num_free_pages, before.num_free_slots)
    assert after.generated_tokens - before.generated_tokens < 2 * CONTEXT // 2, "it was not written to its end"


def test_many_answers_at_once_are_each_as_alone(url):
    options = {"max_tokens": 8, "temperature": 1}
    with openai_client(url) as client:
        alone = {seed: ask(client, seed=seed, **options).choices[0].message.content for seed in range(12)}
        found: dict[int, str] = {}

        def run(seed: int) -> None:
            found[seed] = joined(ask(client, seed=seed, stream=True, **options))[0]["content"]

        threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == alone


# Scripted answers: reasoning, calls, failures.


def scripted(*script, **options):
    return running_server(ScriptedAnswers(*script, **options))


def ask_scripted(client: OpenAI, **options):
    return client.chat.completions.create(model="scripted", messages=QUESTION, **options)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripted_streams_and_whole_answers_agree(name):
    with scripted(*SCRIPTS[name]) as url, openai_client(url) as client:
        whole = ask_scripted(client, tools=[WEATHER])
        streamed = joined(ask_scripted(client, tools=[WEATHER], stream=True))[0]
    message = whole.choices[0].message
    assert streamed["content"] == (message.content or "")
    assert streamed["reasoning_content"] == getattr(message, "reasoning_content", "")
    calls = [(index, call.function.model_dump()) for index, call in enumerate(message.tool_calls or [])]
    assert streamed["tool_calls"] == calls
    assert streamed["reason"] == whole.choices[0].finish_reason


def test_calls_come_whole_with_ids_of_their_own():
    with scripted(*SCRIPTS["calls"]) as url, openai_client(url) as client:
        answers = [ask_scripted(client, tools=[WEATHER]).choices[0] for _ in range(2)]
    assert answers[0].finish_reason == "tool_calls"
    assert answers[0].message.content == "I ask."
    assert json.loads(answers[0].message.tool_calls[0].function.arguments) == {"city": "Graz"}
    assert len({call.id for answer in answers for call in answer.message.tool_calls}) == 4


def test_an_answer_that_only_calls_has_no_content():
    with scripted(SCRIPTS["calls"][2], ended(reason="tool_calls")) as url, openai_client(url) as client:
        assert ask_scripted(client, tools=[WEATHER]).choices[0].message.content is None


def test_reasoning_is_beside_the_content_and_counted():
    with scripted(*SCRIPTS["reasoning"]) as url, openai_client(url) as client:
        answer = ask_scripted(client)
    assert answer.choices[0].message.content == "42!"
    assert answer.choices[0].message.reasoning_content == "Let me see."
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3


@pytest.mark.parametrize(
    ("asked", "budget", "switches"),
    [
        ({}, None, {}),
        ({"reasoning_effort": "none"}, None, {"enable_thinking": False}),
        ({"reasoning_effort": "low"}, 1024, {}),
        ({"reasoning_effort": "medium"}, 4096, {}),
        ({"reasoning_effort": "high"}, 16384, {}),
        ({"extra_body": {"reasoning_budget": 0}}, 0, {}),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, None, {"enable_thinking": False}),
    ],
)
def test_effort_and_budget_reach_the_engine_and_switches_the_template(asked, budget, switches):
    answers = ScriptedAnswers(*SCRIPTS["text"])
    with running_server(answers) as url, openai_client(url) as client:
        ask_scripted(client, **asked)
    assert answers.options[0].reasoning_tokens == budget
    assert answers.chats[0].switches == switches


def test_what_is_asked_of_calls_reaches_the_template_and_the_answer():
    answers = ScriptedAnswers(*SCRIPTS["text"])
    with running_server(answers) as url, openai_client(url) as client:
        ask_scripted(client, tools=[WEATHER], parallel_tool_calls=False)
        ask_scripted(client, tools=[WEATHER], tool_choice="none")
    assert answers.chats[0].tools == [WEATHER]
    assert answers.options[0].parallel_tool_calls is False
    assert answers.chats[1].tools == []


FAILURES = [
    (Overloaded("8 requests are waiting"), openai.RateLimitError, 429),
    (Draining("the server is about to stop"), openai.InternalServerError, 503),
    (TimedOut("the request was late"), openai.InternalServerError, 504),
    (EngineFailed("the engine failed at this request"), openai.InternalServerError, 500),
    (ZeroDivisionError("/home/secret/path"), openai.InternalServerError, 500),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("error", "kind", "status"), FAILURES, ids=lambda value: type(value).__name__)
def test_a_failure_before_the_first_word_has_a_status_of_its_own(error, kind, status, stream):
    with scripted(error) as url, openai_client(url) as client, pytest.raises(kind) as raised:
        ask_scripted(client, stream=stream)
    assert raised.value.status_code == status
    assert raised.value.request_id.startswith("req_")
    assert "secret" not in str(raised.value.body)
    assert ("retry-after" in raised.value.response.headers) == (status in (429, 503))


@pytest.mark.parametrize(("error", "kind", "status"), FAILURES, ids=lambda value: type(value).__name__)
def test_a_failure_within_a_stream_is_an_error_in_it(error, kind, status):
    with scripted(said(text("Hel")), error) as url, openai_client(url) as client:
        chunks = ask_scripted(client, stream=True)
        assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "Hel"]
        with pytest.raises(openai.APIError) as raised:
            next(chunks)
    assert "secret" not in str(raised.value.body)
    assert raised.value.body["type"] == ("rate_limit_error" if status == 429 else "server_error")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_while_nothing_comes_ends_the_answer(stream):
    answers = ScriptedAnswers(None)
    with running_server(answers) as url:
        body = {"model": "scripted", "messages": QUESTION, "stream": stream}
        ask_and_leave(f"{url}/v1/chat/completions", body, has_begun=answers.begun.is_set)
        assert answers.closed.wait(60)


def test_parts_of_an_answer_are_as_the_parser_gives_them(client):
    dialect = engine_of(smollm2_gguf()).model.text.dialect
    answer = ask(client, max_tokens=16, temperature=0).choices[0].message
    assert parse_answer(dialect, answer.content).text == answer.content
