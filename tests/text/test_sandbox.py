"""A template may be hostile: each budget holds, each breach is one clear error, and the next rendering works."""

import threading
import time

import pytest

from freehold.errors import BadRequest, BadTemplate
from freehold.text.sandbox import Sandbox, TemplateBudget

GROWING = "{% set text = namespace(s='ab') %}{% for _ in range(60) %}"
HOSTILE = {
    "endless loop": ("{% for _ in range(100000) %}{% for _ in range(100000) %}{% endfor %}{% endfor %}", "steps"),
    "doubling": (GROWING + "{% set text.s = text.s ~ text.s %}{% endfor %}", "memory|steps|more than 2 s"),
    "doubling a list": (
        GROWING + "{% set text.s = [text.s, text.s] %}{% endfor %}{{ text.s }}",
        "memory|steps|more than 2 s",
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
    started = time.monotonic()
    with pytest.raises(BadTemplate, match=message) as raised:
        sandbox.render(source, CONTEXT)
    assert time.monotonic() - started < sandbox.budget.time_s + 1
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 400
    assert sandbox.render("{{ messages[0].content }}", CONTEXT) == "hi"


def test_a_template_may_refuse_its_messages(sandbox):
    with pytest.raises(BadRequest, match="refuses these messages: roles must alternate, please"):
        sandbox.render("{{ raise_exception('roles must\n alternate, please') }}", CONTEXT)


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
