"""Chat templates see what Hugging Face's see, and messages are checked before."""

import json
from datetime import datetime

import pytest

from freehold.errors import BadRequest, BadTemplate
from freehold.text.chat import ChatTemplate
from text.conversations import ASK, CALL, CLOCK, RICH_CALL, WEATHER
from text.witnesses import Case, rendered, rendered_by_witness

SNIPPETS = {
    "json keeps characters": "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ tools | tojson | safe }}",
    "json of numbers": "{{ [1, 2.5, 1e22, 1e-7, none, true] | tojson }}",
    "block trimming": "{% if true %}\n  a\n  {% if true %}\nb\n{% endif %}\n{% endif %}\n c \n",
    "namespace": "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
    "break and continue": "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
    "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation tags": "{% for m in messages %}{%- generation %}\n {{ m.content }}\n{%- endgeneration %}\n"
    "{% endfor %}x",
    "string methods": "{{ ' Ab '.strip().lower().upper() }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'.startswith('a') }}"
    "{{ 'aXb'.replace('X', '-').rstrip('b').lstrip('a') }}{{ 'a'.endswith('b') }}{{ 'abc'.find('c') }}",
    "mapping methods": "{% for k, v in tools[0].function.parameters.items() %}{{ k }}{% endfor %}"
    "{{ tools[0].get('none', 'x') }}{{ tools[0].keys() | list }}",
    "python's words": "{{ none }}{{ true }}{{ [1, 'a', none, 2.5] }}{{ tools[0].function.parameters.required }}",
    "tests": "{{ none is iterable }}{{ 'a' is iterable }}{{ {} is sequence }}{{ 'a' is sequence }}"
    "{{ tools is defined }}{{ documents is defined }}{{ nothing is defined }}{{ messages[0] is mapping }}"
    "{{ 'a' is string }}",
    "slices": "{{ messages[::-1] | length }}{{ messages[1:] }}{{ 'abc'[:-1] }}{{ messages[-1].role }}",
    "selection": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ messages | rejectattr('role', 'eq', 'user') | list }}",
    "macros": "{% macro f(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(2, b=3) }}",
    "special tokens": "{{ bos_token }}{{ eos_token + 'x' }}{{ pad_token }}",
    "undefined is empty": "{{ nothing }}{{ messages[0].nothing }}{{ nothing or 'y' }}{{ 'z' if nothing }}",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_render_as_in_transformers(name):
    source = SNIPPETS[name]
    template = ChatTemplate(source + "{# tools #}", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    for tools in [[WEATHER], *[None] * ("tools[" not in source)]:
        case = Case(name, [ASK], tools, {}, True)
        assert rendered(template, case) == rendered_by_witness(template, case)


def test_numbers_of_arguments_keep_their_form():
    arguments = {"whole": 2.0, "large": 1e22, "small": 1e-7, "long": 10**30, "count": 2}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    assert template.render([call]) == json.dumps(arguments)


def test_the_date_is_todays():
    shown = ChatTemplate("{{ strftime_now('%Y') }}").render([ASK])
    assert shown in (str(datetime.now().year), str(datetime.now().year - 1))


def test_a_missing_token_is_undefined_and_not_the_word_none():
    assert ChatTemplate("[{{ bos_token }}{{ bos_token is defined }}]").render([ASK]) == "[False]"


def test_the_digest_is_of_the_source():
    assert ChatTemplate("a").digest == ChatTemplate("a", bos_token="x").digest != ChatTemplate("b").digest


def test_tools_are_refused_by_a_template_without_a_place_for_them():
    with pytest.raises(BadRequest, match="no place for tools"):
        ChatTemplate("{{ messages[0].content }}").render([ASK], tools=[CLOCK])


def test_switches_reach_the_template_but_cannot_replace_its_names():
    template = ChatTemplate("{{ enable_thinking }}")
    assert template.render([ASK], switches={"enable_thinking": False}) == "False"
    with pytest.raises(BadRequest, match="'messages'"):
        template.render([ASK], switches={"messages": []})


def test_a_broken_template_is_named_when_it_is_used():
    with pytest.raises(BadTemplate, match="syntax error"):
        ChatTemplate("{% for %}").render([ASK])


def _seen(message):
    return json.loads(ChatTemplate("{{ messages[0] | tojson }}").render([message]))


def test_content_in_parts_becomes_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _seen({"role": "user", "content": parts})["content"] == "a\nb"


def test_arguments_given_as_json_become_a_mapping():
    as_text = {
        "id": "1",
        "function": {"name": "get_weather", "arguments": json.dumps(RICH_CALL["function"]["arguments"])},
    }
    seen = _seen({"role": "assistant", "content": None, "tool_calls": [as_text], "refusal": None, "audio": None})
    assert seen == {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **RICH_CALL}]}


def test_other_names_of_reasoning_are_made_one():
    assert _seen({"role": "assistant", "content": "a", "reasoning": "b"})["reasoning_content"] == "b"


def _with_call(**function):
    return [{"role": "assistant", "tool_calls": [{"function": function}]}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: "),
        ("hi", "messages: another text where a list"),
        ({"role": "user"}, "messages: "),
        (["hi"], r"messages\[0\]: another text where an object"),
        ([{"role": "root", "content": "a"}], r"messages\[0\]\.role: another text where one of system"),
        ([ASK, {"role": "user"}], r"messages\[1\]\.content: nothing where a text"),
        ([{"role": "user", "content": 3}], r"content: a number"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"content\[0\]: another text where a part of type",
        ),
        ([{"role": "user", "content": "a", "colour": "red"}], "unknown field 'colour'"),
        ([{"role": "user", "content": "a", "name": 3}], "name: a number"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"name": "x"}]}], r"function\.name"),
        (_with_call(name="f", arguments="{"), "a JSON object"),
        (_with_call(name="f", arguments="[1]"), "a JSON object"),
        (_with_call(name="f", arguments="[" * 100_000), "a JSON object"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_wrong_messages_are_named(messages, message):
    with pytest.raises(BadRequest, match=message) as raised:
        ChatTemplate("").render(messages)
    assert len(raised.value.message) < 300


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "tools: another text"),
        ([{"name": "f"}], r"tools\[0\]"),
        ([{"type": "web_search", "function": {"name": "f"}}], r"tools\[0\]"),
        ([{"function": {"name": "a b"}}], "function.name: another text where 1 to 128 letters"),
        ([{"function": {"name": "f", "parameters": []}}], "parameters"),
        ([CLOCK, CLOCK], "a second tool named 'clock'"),
    ],
)
def test_wrong_tools_are_named(tools, message):
    with pytest.raises(BadRequest, match=message):
        ChatTemplate("{{ tools }}").render([ASK], tools=tools)
