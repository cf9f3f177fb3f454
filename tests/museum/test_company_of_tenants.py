"""What one key has asked leaves no trace that another key could find.

Guards against CVE-2025-46570 (vLLM: how soon the first token comes says whether somebody has asked the same before).
Counted and not timed: whatever anybody else has asked, all tokens of a key's prompt are computed for it.
"""

import re

import pytest

from freehold.serve.terms import Terms
from museum.asked import MODEL

PROMPT = "the secret of the house is under the third stone from the left, and nobody else knows of it " * 4
BODIES = {
    "/v1/completions": {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 1},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/v1/embeddings": {"model": MODEL, "input": PROMPT},
}


def computed_of(witnessed) -> float:
    """Return how many tokens of prompts were computed."""
    return float(re.search(r"^freehold_prompt_tokens_total\{.*\} (.*)$", witnessed.ask("/metrics").text, re.M)[1])


@pytest.fixture
def tokens(witnessed):
    """Yield two keys of different tenants."""
    made = [witnessed.keys.add(name, Terms()) for name in ("one", "other")]
    yield [token for _, token in made]
    for key, _ in made:
        witnessed.keys.revoke(key.id)


def ask(witnessed, token, path, body) -> tuple[dict, float]:
    before = computed_of(witnessed)
    answer = witnessed.ask(path, body, headers={"x-api-key": token})
    assert answer.status_code == 200
    return answer.json(), computed_of(witnessed) - before


@pytest.mark.parametrize("path", BODIES)
def test_a_prompt_that_another_key_has_asked_is_computed_as_a_new_one(witnessed, tokens, path):
    first, others = ask(witnessed, tokens[0], path, BODIES[path])
    again, own = ask(witnessed, tokens[1], path, BODIES[path])
    assert own == others == first["usage"]["prompt_tokens"] > len(PROMPT) // 2
    assert again["usage"] == first["usage"]
    assert not (again["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")


def test_the_same_seed_gives_the_same_answer_whoever_asks_and_whatever_was_asked_before(witnessed, tokens):
    body = BODIES["/v1/completions"]
    texts = [ask(witnessed, token, "/v1/completions", body)[0]["choices"][0]["text"] for token in tokens * 2]
    assert len(set(texts)) == 1


def test_one_keys_quota_is_no_others(witnessed):
    spent, token = witnessed.keys.add("spent", Terms(tokens_per_day=1, requests_per_minute=2))
    other, free = witnessed.keys.add("free", Terms(tokens_per_day=100_000))
    body = BODIES["/v1/embeddings"]
    refused = [witnessed.ask("/v1/embeddings", body, headers={"x-api-key": token}) for _ in range(4)]
    assert {answer.status_code for answer in refused} == {429}
    assert ask(witnessed, free, "/v1/embeddings", body)[0]["usage"]["prompt_tokens"] > 100
    for key in (spent, other):
        witnessed.keys.revoke(key.id)
