"""What a request can cost is known before anything is computed for it, and what is too much is refused at once.

Guards against CVE-2026-34756 (vLLM: `n` without a bound, copied a billion times before any check) and its likes: lists
of prompts, of biases, of tools without an end; and against a limit that one of several APIs forgets.
"""

import tracemalloc
from datetime import UTC, datetime

import httpx
import pytest
from pydantic import ValidationError

from cli.folders import write_folder
from freehold.engine.engine import Engine
from freehold.engine.model import load
from freehold.engine.scheduler import Limits
from freehold.serve.keys import DayUsage
from freehold.serve.schema import ChatRequest, CompletionRequest
from freehold.serve.terms import Terms
from museum.asked import ANSWERED, ASK, MODEL
from serve.servers import MODEL_NAME, running_server, wait_for

LONG = "a" * 5000  # more tokens than the model's context of 4,096
SAID = [{"role": "user", "content": LONG}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
HUGE = 2**31 - 1
FEW_BYTES = 1 << 20

TOO_MUCH = {
    "a long prompt": ("/v1/completions", {"prompt": LONG}),
    "a long prompt after a short one": ("/v1/completions", {"prompt": ["a", LONG]}),
    "many ids": ("/v1/completions", {"prompt": [1] * 5000}),
    "a long chat": ("/v1/chat/completions", {"messages": SAID}),
    "a long message": ("/v1/messages", {"messages": SAID, "max_tokens": 4}),
    "a long input": ("/v1/responses", {"input": LONG}),
    "a long text to embed": ("/v1/embeddings", {"input": LONG}),
    "a long text to embed after a short one": ("/v1/embeddings", {"input": ["a", LONG]}),
    "a long answer": ("/v1/completions", {"prompt": "a", "max_tokens": HUGE}),
    "a long answer in a chat": ("/v1/chat/completions", {"messages": ASK, "max_tokens": HUGE}),
    "a long answer to a message": ("/v1/messages", {"messages": ASK, "max_tokens": HUGE}),
    "a long answer to an input": ("/v1/responses", {"input": "a", "max_output_tokens": HUGE}),
    "many choices": ("/v1/chat/completions", {"messages": ASK, "n": HUGE}),
    "many continuations": ("/v1/completions", {"prompt": "a", "n": HUGE}),
    "many prompts": ("/v1/completions", {"prompt": ["a"] * 129}),
    "many prompts and choices": ("/v1/completions", {"prompt": ["a"] * 100, "n": 2}),
    "many texts to embed": ("/v1/embeddings", {"input": ["a"] * 129}),
    "many messages": ("/v1/chat/completions", {"messages": ASK * 4097}),
    "many tools": ("/v1/chat/completions", {"messages": ASK, "tools": [TOOL] * 129}),
    "many stops": ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}),
    "many biases": ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}),
    "many scores": ("/v1/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": HUGE}),
}


def stats_of(witnessed) -> list[str]:
    wanted = ("freehold_steps_total", "freehold_prompt_tokens_total", "freehold_generated_tokens_total")
    return [line for line in witnessed.ask("/metrics").text.splitlines() if line.startswith(wanted)]


@pytest.mark.parametrize("what", TOO_MUCH)
def test_what_is_too_much_is_refused_before_a_step_is_made(witnessed, what):
    path, body = TOO_MUCH[what]
    before = stats_of(witnessed)
    answer = witnessed.ask(path, {"model": MODEL, **body})
    assert answer.status_code == 400, answer.text
    assert stats_of(witnessed) == before


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_request_whose_worst_case_is_beyond_its_keys_quota_computes_nothing(witnessed, path):
    key, token = witnessed.keys.add("small", Terms(tokens_per_day=100))
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    before = stats_of(witnessed)
    answer = witnessed.ask(path, {**ANSWERED[path], length: 100}, headers={"x-api-key": token})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert stats_of(witnessed) == before
    witnessed.keys.revoke(key.id)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 60}),
        ("/v1/completions", {"prompt": "a", "n": 2, "max_tokens": 60}),
        ("/v1/chat/completions", {"messages": ASK, "n": 2, "max_tokens": 40}),
        ("/v1/embeddings", {"input": ["a" * 60, "b" * 60]}),
    ],
    ids=["prompts", "continuations", "choices", "texts"],
)
def test_answers_that_a_quota_holds_singly_but_not_together_are_refused_together(witnessed, path, body):
    key, token = witnessed.keys.add("small", Terms(tokens_per_day=100))
    before = stats_of(witnessed)
    answer = witnessed.ask(path, {"model": MODEL, **body}, headers={"x-api-key": token})
    assert answer.status_code == 429
    assert stats_of(witnessed) == before
    assert witnessed.keys.usage_on(datetime.now(UTC).date())[key.id] == DayUsage()
    witnessed.keys.revoke(key.id)


@pytest.mark.parametrize("request_of", [CompletionRequest, ChatRequest])
def test_a_number_is_not_paid_for_before_it_is_refused(request_of):
    given = {"model": "m", "prompt": "a"} if request_of is CompletionRequest else {"model": "m", "messages": ASK}
    tracemalloc.start()
    with pytest.raises(ValidationError):
        request_of.model_validate({**given, "n": 10**9, "max_tokens": 10**30})
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < FEW_BYTES


def test_more_than_may_wait_is_refused_until_there_is_room(tmp_path):
    limits = Limits(num_slots=1, num_pages=4, page_size=32, budget_tokens=8, max_positions=64, max_waiting=2)
    engine = Engine(load(write_folder(tmp_path / "model")), limits)  # it does not run yet, so everybody waits
    body = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 2}
    with running_server(engine) as url, httpx.Client(base_url=url) as client:
        refused = client.post("/v1/completions", json={**body, "n": 3})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        engine.start()
        wait_for(lambda: engine.stats().num_waiting == 0)
        assert client.post("/v1/completions", json={**body, "n": 2}).status_code == 200
    engine.close()
