"""Without a key that is good for it, no route answers; and a key says nothing to whoever tries to guess it.

Guards against doors that were left open (Ray CVE-2023-48022 and CVE-2025-62593: no authentication unless asked for;
vLLM: a key that guarded some prefixes only; SGLang CVE-2026-7302) and against comparing keys letter by letter (vLLM
CVE-2025-59425). The server runs under `python -O`: CVE-2026-41523 was a check by `assert`, which is gone then.

Where keys are kept, and all ways of sending one: tests/serve/test_auth.py, test_keys.py, test_quota_survives_kill.py.
"""

import ast
import re
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sql

from freehold.serve.auth import OPEN_PATHS
from freehold.serve.database import api_keys
from freehold.serve.terms import Terms
from museum.asked import ANSWERED
from sources import nodes, where

SECRETS = re.compile(r"secret|token\b|sha256|digest\(")


def methods_of_paths(witnessed):
    """Yield every route that the server says it has, and some that it has not."""
    for path, methods in witnessed.ask("/openapi.json").json()["paths"].items():
        yield from ((method.upper(), path.replace("{name}", "tiny")) for method in methods)
    yield from (
        ("GET", path) for path in ("/metrics", "/openapi.json", "/docs", "/admin", "/admin/keys", "/v2/x", "/x")
    )
    yield from (("POST", path) for path in ("/health", "/", "/pause", "/update_weights", "/invocations"))


def with_key(token):
    return {"headers": {"x-api-key": token}}


def test_every_route_but_health_and_the_page_asks_for_a_key(witnessed):
    asked = {(method, path) for method, path in methods_of_paths(witnessed) if (method, path) != ("GET", "/health")}
    assert len(asked) > 15
    for token in ("", "fh-aaaaaaaaaaaa-" + "A" * 43, "none", "Bearer"):
        for method, path in asked:
            answer = witnessed.client.request(method, path, **with_key(token))
            assert answer.status_code == 401, (method, path, token)
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in OPEN_PATHS:
        assert witnessed.client.get(path, **with_key("")).status_code == 200, path


@pytest.mark.parametrize("way", ["revoked", "expired", "metrics alone", "another's secret"])
def test_a_key_that_is_not_good_for_it_opens_nothing_that_computes(witnessed, way):
    terms = Terms(scopes=frozenset({"metrics"})) if way == "metrics alone" else Terms()
    key, token = witnessed.keys.add(way, terms)
    _, other = witnessed.keys.add(f"beside {way}", Terms())
    if way == "revoked":
        witnessed.keys.revoke(key.id)
    if way == "expired":
        past = {"expires_at": datetime.now(UTC) - timedelta(seconds=1)}
        with witnessed.keys.database.begin() as connection:
            connection.execute(sql.update(api_keys).where(api_keys.c.id == key.id).values(past))
    if way == "another's secret":
        token = token[:16] + other[16:]
    steps = steps_of(witnessed)
    for path, body in ANSWERED.items():
        if body is not None:
            answer = witnessed.ask(path, body, **with_key(token))
            assert answer.status_code == (403 if way == "metrics alone" else 401), path
    assert steps_of(witnessed) == steps
    witnessed.keys.revoke(f"beside {way}")


def steps_of(witnessed) -> str:
    return re.search(r"^freehold_steps_total\{.*\} (.*)$", witnessed.ask("/metrics").text, re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        (Terms(requests_per_minute=1), "rate_limit_exceeded"),
        (Terms(tokens_per_day=20), "rate_limit_exceeded"),
    ],
    ids=["requests", "tokens"],
)
def test_a_key_gets_its_quota_and_no_more(witnessed, terms, code):
    _, token = witnessed.keys.add("quota", terms)
    body = {**ANSWERED["/v1/completions"], "max_tokens": 8}
    answers = [witnessed.ask("/v1/completions", body, **with_key(token)) for _ in range(3)]
    witnessed.keys.revoke("quota")
    assert answers[0].status_code == 200
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == code
        assert int(answer.headers["retry-after"]) >= 1


def test_denials_are_written_down_with_the_keys_id_and_never_its_secret(witnessed):
    key, token = witnessed.keys.add("denied", Terms(scopes=frozenset({"metrics"})))
    answer = witnessed.ask("/v1/completions", ANSWERED["/v1/completions"], **with_key(token))
    witnessed.keys.revoke(key.id)
    line = next(line for line in witnessed.notes.read_text().splitlines() if answer.headers["x-request-id"] in line)
    assert f"key {key.id}" in line
    assert "403" in line
    everything = witnessed.notes.read_text()
    for secret in (token[16:], witnessed.client.headers["x-api-key"][16:]):
        assert secret not in everything


def test_what_is_stored_opens_nothing(witnessed):
    stored = (witnessed.log.parent / "keys.db").read_bytes()
    secret = witnessed.client.headers["x-api-key"][16:]
    assert secret.encode() not in stored


def test_no_secret_is_compared_but_in_constant_time():
    compared = [
        f"{where(file, node)}: {ast.unparse(node)}"
        for file, node in nodes(ast.Compare)
        if file.startswith("serve/")
        and any(isinstance(operator, ast.Eq | ast.NotEq | ast.In) for operator in node.ops)
        and any(SECRETS.search(ast.unparse(side)) for side in (node.left, *node.comparators))
    ]
    assert compared == []
    constant = [ast.unparse(node) for file, node in nodes(ast.Call) if ast.unparse(node.func) == "hmac.compare_digest"]
    assert len(constant) == 1
