"""What Prometheus reads, over a real socket."""

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from freehold.errors import EngineFailed
from freehold.serve.metrics import Meters, metered
from inputs import smollm2_gguf
from serve.scripted import ScriptedAnswers, said, text
from serve.servers import MODEL_NAME, engine_of, openai_client, running_server, wait_for

QUESTION = [{"role": "user", "content": "Hello"}]
NAMES = {
    "freehold_requests_running",
    "freehold_requests_waiting",
    "freehold_time_to_first_token_seconds_count",
    "freehold_answers_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:request_success_total",
}


@pytest.fixture
def url() -> Iterator[str]:
    with running_server(smollm2_gguf()) as address:
        yield address


def samples(url: str) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and the values of its labels, in the order of their names."""
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def ask(url: str, **options) -> None:
    with openai_client(url) as client:
        answer = client.chat.completions.create(messages=QUESTION, **{"model": MODEL_NAME, "max_tokens": 3, **options})
        list(answer)


def test_answers_are_counted_under_both_names(url):
    ask(url)
    before, answered = samples(url), ("freehold_http_requests_total", "/v1/chat/completions", "200")
    ask(url, stream=True, n=2)
    wait_for(lambda: samples(url)[answered] > before[answered])  # a request is counted when its answer has gone out
    after = samples(url)
    assert {name for name, *_ in after} >= NAMES

    def gained(*key: str) -> float:
        return after[key] - before[key]

    assert gained("vllm:generation_tokens_total", MODEL_NAME) == 6
    assert gained("freehold_generated_tokens_total", MODEL_NAME) == 6
    assert gained("vllm:prompt_tokens_total", MODEL_NAME) == gained("freehold_prompt_tokens_total", MODEL_NAME) > 0
    assert gained("vllm:request_success_total", "length", MODEL_NAME) == 2
    assert gained("vllm:time_to_first_token_seconds_count", MODEL_NAME) == 2
    assert gained(*answered) == 1


def test_labels_hold_nothing_that_a_client_sent(url):
    with pytest.raises(openai.NotFoundError):
        ask(url, model="swordfish")
    httpx.get(f"{url}/swordfish")
    httpx.get(f"{url}/v1/models/swordfish")
    found = samples(url)
    assert not any("swordfish" in part for key in found for part in key)
    assert found["freehold_http_requests_total", "/v1/models/{name:path}", "404"] == 1


def test_an_answer_that_is_left_counts_as_cancelled_and_no_success(url):
    body = {"model": MODEL_NAME, "messages": QUESTION, "stream": True, "logit_bias": {"2": -100}}
    with httpx.Client() as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_for(lambda: ("freehold_answers_total", "cancelled", MODEL_NAME) in samples(url))
    assert not any(name == "vllm:request_success_total" for name, *_ in samples(url))


async def _read(deltas) -> None:
    async for _ in deltas:
        pass


def test_an_answer_that_fails_counts_as_failed():
    meters = Meters(engine_of(smollm2_gguf()), "m")
    answers = metered(ScriptedAnswers(said(text("a")), EngineFailed("it failed")), meters)
    with pytest.raises(EngineFailed):
        asyncio.run(_read(answers.stream([(None, None)], None)))
    assert (
        meters.registry.get_sample_value("freehold_answers_total", {"model_name": "m", "finished_reason": "failed"})
        == 1
    )
