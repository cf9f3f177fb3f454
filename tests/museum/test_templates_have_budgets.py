"""A template may be hostile: each budget holds, each breach is one clear error, and the next rendering works.

Guards against templates that ran code (llama-cpp-python CVE-2024-34359, SGLang CVE-2026-5760, and Jinja's own sandbox,
CVE-2024-56326), templates without a bound of time or size (vLLM CVE-2026-115911), and requests that reach past the
template (vLLM CVE-2025-62426: `chat_template_kwargs` that were arguments of something else).
"""

import threading

import httpx
import pytest

from cli.folders import write_folder
from freehold.engine.engine import Engine
from freehold.engine.model import load
from freehold.engine.scheduler import Limits
from freehold.errors import BadRequest, BadTemplate
from freehold.text.sandbox import Sandbox, TemplateBudget
from serve.servers import MODEL_NAME, running_server

GROWING = "{% set text = namespace(s='ab') %}{% for _ in range(60) %}"
HOSTILE = {
    "endless loop": ("{% for _ in range(100000) %}{% for _ in range(100000) %}{% endfor %}{% endfor %}", "steps"),
    "doubling": (GROWING + "{% set text.s = text.s ~ text.s %}{% endfor %}", "memory|steps"),
    "doubling a list": (
        GROWING + "{% set text.s = [text.s, text.s] %}{% endfor %}{{ text.s }}",
        "memory|steps",
    ),
    "multiplication": ("{{ 'a' * 10000000000 }}", "steps|memory"),
    "replace": ("{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}", "memory|steps"),
    "format": ("{{ '%999999999s' | format('a') | length }}", "memory"),
    "format method": ("{{ '{:>999999999}'.format('a') | length }}", "memory"),
    "indent": ("{{ 'a' | indent(2000000000, true) | length }}", "memory|steps"),
    "indented JSON": ("{{ messages | tojson(indent=1000000000) }}", "memory"),
    "join": ("{{ range(1000) | join('a' * 1000000) | length }}", "memory"),
    "recursion": ("{% macro f() %}{{ f() ~ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nested source": ("{{ " + "(" * 100000, "recursion"),
    "nested signs": ("{{ " + "-" * 100000 + "1 }}", "stack"),
    "nested value": (
        "{% set n = namespace(a=1) %}{% for _ in range(100000) %}{% set n.a = [n.a] %}{% endfor %}{{ n.a }}",
        "stack",
    ),
    "flood": ("{% set s = 'a' * 1000000 %}{% for _ in range(18) %}{{ s }}{% endfor %}", "output"),
    "flood past memory": ("{% set s = 'a' * 1000000 %}{% for _ in range(100000) %}{{ s }}{% endfor %}", "memory"),
    "slow filter": ("{% for _ in range(100) %}{{ range(100000) | map('tojson') | join }}{% endfor %}", "more than 2 s"),
    "date": ("{{ strftime_now('%999999999d' * 9) | length }}{{ missing() }}", "unknown function|memory"),
    "other file": ("{% include '/etc/passwd' %}", "non-existing template"),
    "no such method": ("{{ 'a'.nothing() }}", "no method"),
    "Python's insides": ("{{ raise_exception.__globals__.os }}", "undefined"),
    "broken syntax": ("{% if %}", "syntax error"),
}
CONTEXT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox()
    sandbox.render("", {})
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_template_is_one_clear_error_and_the_next_one_renders(sandbox, attack):
    source, message = HOSTILE[attack]
    with pytest.raises(BadTemplate, match=f"{message}|more than 2 s") as raised:  # a busy machine may be slower
        sandbox.render(source, CONTEXT)
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 400
    assert sandbox.render("{{ messages[0].content }}", CONTEXT) == "hi"


def test_a_template_may_refuse_its_messages(sandbox):
    with pytest.raises(BadRequest, match="refuses these messages: roles must alternate, please"):
        sandbox.render("{{ raise_exception('roles must\n alternate, please') }}", CONTEXT)


def test_a_refusal_that_repeats_the_messages_is_not_passed_on(sandbox):
    with pytest.raises(BadRequest) as raised:
        sandbox.render("{{ raise_exception('never ' ~ messages[0].content) }}", CONTEXT)
    assert raised.value.message == "the chat template refuses these messages"


@pytest.mark.parametrize(
    "content",
    ["\ud800", {1, 2}, float, [[]]],
    ids=["surrogate", "set", "class", "deep"],
)
def test_what_is_not_json_is_the_requests_fault(sandbox, content):
    if content == [[]]:
        for _ in range(100_000):
            content = [content]
    with pytest.raises(BadRequest, match="messages"):
        sandbox.render("", {"content": content})


def test_more_than_the_child_can_take_is_refused_before():
    sandbox = Sandbox(TemplateBudget(memory_bytes=64 << 20))
    with pytest.raises(BadRequest, match="more than a template can be given"):
        sandbox.render("", {"content": "a" * (9 << 20)})


def test_threads_share_one_child(sandbox):
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: texts.append(sandbox.render("{{ n }}", {"n": n}))) for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, texts)) == list(range(16))


def test_a_child_that_was_killed_from_outside_is_replaced(sandbox):
    sandbox._child.kill()
    sandbox._child.wait()
    with pytest.raises(BadTemplate, match="process ended"):
        sandbox.render("a", {})
    assert sandbox.render("a", {}) == "a"


def test_a_large_prompt_comes_back_whole(sandbox):
    text = "é😀\n" * 700_000
    assert sandbox.render("{{ text }}", {"text": text}) == text


def test_the_child_leaves_with_the_sandbox():
    sandbox = Sandbox()
    sandbox.render("", {})
    child = sandbox._child
    sandbox.close()
    assert child.returncode is not None
    assert sandbox.render("again", {}) == "again"
    sandbox.close()


# Served by models that mean harm.

SMALL = Limits(num_slots=2, num_pages=16, page_size=32, budget_tokens=64, max_positions=256)
ASK = {"model": MODEL_NAME, "max_tokens": 2, "messages": [{"role": "user", "content": "a secret"}]}
SERVED = {
    "no end": ("{% for _ in range(100000) %}{% for _ in range(100000) %}{% endfor %}{% endfor %}", 500),
    "all memory": ("{{ '%999999999s' | format('a') | length }}", 500),
    "what was asked": ("{{ messages[0].content.nothing() }}", 500),
    "a refusal": ("{{ raise_exception('not ' ~ messages[0].content) }}", 400),
}


@pytest.mark.parametrize("harm", SERVED)
def test_a_template_that_means_harm_fails_its_own_requests_and_no_others(tmp_path, harm):
    template, status = SERVED[harm]
    model = load(write_folder(tmp_path / "model", template=template))
    with Engine(model, SMALL) as engine, running_server(engine) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
            body = {"messages": ASK["messages"]} if path == "/tokenize" else ASK
            answer = client.post(path, json=body, timeout=60)
            assert answer.status_code == status, answer.text
            assert "secret" not in answer.text
        plain = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 2}
        assert client.post("/v1/completions", json=plain).status_code == 200


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "raise_exception", "self"])
def test_switches_reach_nothing_but_the_template(witnessed, name):
    body = {**ASK, "model": "tiny", "chat_template_kwargs": {name: True}}
    assert witnessed.ask("/v1/chat/completions", body).status_code == 400
    body["chat_template_kwargs"] = {"tokenize": True, "chat_template": "{{ 1 / 0 }}", "tokenizer": "x"}
    assert witnessed.ask("/v1/chat/completions", body).status_code == 200  # variables that no template reads


def test_no_request_can_bring_a_template(witnessed):
    for field in ("chat_template", "template", "documents"):
        answer = witnessed.ask("/v1/chat/completions", {**ASK, "model": "tiny", field: "{{ 7 * 7 }}"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
