"""Grammars of answers: which texts each form allows in each dialect, and that what a random model says is read back."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import BadRequest
from freehold.text.answer import parse_answer
from freehold.text.answer_grammar import Form, write_grammar
from freehold.text.dialect import LLAMA, NEMOTRON, QWEN
from freehold.text.grammar import Grammars
from text.spelling import END, byte_tokenizer, random_answer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 30},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "options": {
                    "type": "object",
                    "properties": {"wind": {"type": "boolean"}},
                    "additionalProperties": False,
                },
            },
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = (WEATHER, CLOCK)
ANSWER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}

ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Rome", "unit": "C"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
XML_TIME = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
XML_ROME = (
    "<tool_call>\n<function=get_weather>\n<parameter=place>\nRome\n</parameter>\n<parameter=unit>\nC\n</parameter>\n"
    '<parameter=options>\n{"wind": true}\n</parameter>\n</function>\n</tool_call>'
)
LLAMA_ROME = '{"name": "get_weather", "parameters": {"place": "Rome", "unit": "C"}}'
PLAIN_QWEN = replace(QWEN, reasons=False)

GRAMMARS = {has_marks: Grammars(byte_tokenizer(has_marks=has_marks)) for has_marks in (True, False)}
both_spellings = pytest.mark.parametrize("has_marks", [True, False], ids=["marks are tokens", "marks are spelled"])


def compiled(form, dialect, *, has_marks=True, tools=TOOLS, prompt=""):
    token_id = byte_tokenizer(has_marks=has_marks).token_id
    written = write_grammar(form, dialect, tools=tools, prompt=prompt, token_id=token_id)
    return GRAMMARS[has_marks].compile(written.text, written.schemas)


def allows(grammar, text, *, has_marks=True):
    """Return whether a text, and then an end, keeps to a grammar."""
    tokenizer, matcher = byte_tokenizer(has_marks=has_marks), grammar.start()
    for token in tokenizer.encode_rendered(text + END):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return True


ALLOWED = {
    "one call": (Form(calls="one"), PLAIN_QWEN, "", [ROME, TIME]),
    "some calls": (Form(calls="some"), PLAIN_QWEN, "", [ROME, f"{ROME}\n{TIME}"]),
    "a named call": (Form(calls="one", name="clock"), PLAIN_QWEN, "", [TIME]),
    "a call after reasoning": (Form(calls="one"), QWEN, "", [ROME, f"<think>a < b\n</think>\n\n{ROME}"]),
    "a call where the prompt reasons": (Form(calls="one"), QWEN, "<think>\n", [f"hm\n</think>\n\n{ROME}"]),
    "a call of Nemotron": (Form(calls="some"), NEMOTRON, "</think>", [XML_ROME, f"{XML_ROME}\n{XML_TIME}"]),
    "a call of Llama": (Form(calls="some"), LLAMA, "", [LLAMA_ROME]),
    "strict calls": (Form(holds_calls=True), PLAIN_QWEN, "", ["Hi <tool", f"So\n{ROME}\nand {TIME}.", ""]),
    "JSON": (Form(schema=ANSWER), PLAIN_QWEN, "", ['{"a": 1}', '{\n  "a": -20\n}', ROME]),
}
REFUSED = {
    "two where one is wanted": (Form(calls="one"), PLAIN_QWEN, "", [f"{ROME}\n{TIME}", "", "Hi"]),
    "another tool": (Form(calls="one", name="clock"), PLAIN_QWEN, "", [ROME]),
    "other arguments": (
        Form(calls="some"),
        PLAIN_QWEN,
        "",
        [TIME.replace("{}", '{"x": 1}'), ROME.replace('"C"', '"K"'), ROME.replace("Rome", "R" * 31)],
    ),
    "reasoning that does not end": (Form(calls="one"), QWEN, "<think>\n", ["hm", ROME]),
    "other values in Nemotron's": (
        Form(calls="some"),
        NEMOTRON,
        "</think>",
        [XML_ROME.replace("\nC\n", "\nK\n"), XML_ROME.replace("Rome", "R" * 31), XML_ROME.replace("true", "1")],
    ),
    "two calls of Llama": (Form(calls="some"), LLAMA, "", [LLAMA_ROME * 2]),
    "a strict call that is none": (
        Form(holds_calls=True),
        PLAIN_QWEN,
        "",
        ["So <tool_call>Hi", TIME.replace("{}", "1")],
    ),
    "other JSON": (Form(schema=ANSWER), PLAIN_QWEN, "", ['{"b": 1}', '{"a": 1', '{"a": 1} ', "Sure"]),
}


@both_spellings
@pytest.mark.parametrize(("form", "dialect", "prompt", "texts"), ALLOWED.values(), ids=ALLOWED)
def test_a_form_allows_what_the_dialect_writes(form, dialect, prompt, texts, has_marks):
    grammar = compiled(form, dialect, has_marks=has_marks, prompt=prompt)
    assert [text for text in texts if not allows(grammar, text, has_marks=has_marks)] == []


@both_spellings
@pytest.mark.parametrize(("form", "dialect", "prompt", "texts"), REFUSED.values(), ids=REFUSED)
def test_a_form_allows_nothing_else(form, dialect, prompt, texts, has_marks):
    grammar = compiled(form, dialect, has_marks=has_marks, prompt=prompt)
    assert [text for text in texts if allows(grammar, text, has_marks=has_marks)] == []


def test_what_is_complete_can_only_end():
    tokenizer, matcher = byte_tokenizer(has_marks=True), compiled(Form(calls="one"), PLAIN_QWEN).start()
    for token in tokenizer.encode_rendered(TIME):
        assert not matcher.is_complete
        matcher.accept(token)
    assert matcher.is_complete
    assert [token for token, may_come in enumerate(matcher.allowed()) if may_come] == [tokenizer.token_id(END)]


def test_special_tokens_are_no_text():
    grammar = compiled(Form(schema={"type": "string"}), PLAIN_QWEN, tools=())
    assert allows(grammar, '"</tool_cal>"')
    assert not allows(grammar, '"</tool_call>"')
    assert not allows(grammar, f'"{END}"')


VALUES = {
    "any text": ({"type": "string"}, lambda value: isinstance(value, str)),
    "short text": ({"type": "string", "maxLength": 5}, lambda value: isinstance(value, str) and len(value) <= 5),
    "one of": ({"type": "string", "enum": ["é", "b c", '"']}, lambda value: value in ("é", "b c", '"')),
    "integer": ({"type": "integer", "minimum": -7, "maximum": 3000}, lambda value: -7 <= value <= 3000),
    "flag": ({"type": "boolean"}, lambda value: isinstance(value, bool)),
    "list": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        lambda value: 1 <= len(value) <= 3 and all(isinstance(each, bool) for each in value),
    ),
    "object": (
        {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": False},
        lambda value: value == {"x": None},
    ),
}


def random_object(seed):
    """Return a schema of an object, and what tells whether a value keeps to it."""
    choose = random.Random(seed)
    kinds = {f"p{index}": choose.choice(sorted(VALUES)) for index in range(seed % 5)}
    required = {name for name in kinds if choose.random() < 0.5}
    schema = {
        "type": "object",
        "properties": {name: VALUES[kind][0] for name, kind in kinds.items()},
        "required": sorted(required),
        "additionalProperties": False,
    }

    def holds(value):
        return required <= value.keys() <= kinds.keys() and all(
            VALUES[kinds[key]][1](each) for key, each in value.items()
        )

    return schema, holds


# Few, for each is tried in a process of its own; what is said within them is not.
OBJECTS = [random_object(seed) for seed in range(6)]
DIALECTS = st.sampled_from([PLAIN_QWEN, NEMOTRON, LLAMA])


@given(st.sampled_from(range(len(OBJECTS))), DIALECTS, st.integers(0, 2**32))
def test_a_call_by_a_model_that_says_anything_is_read_back_and_keeps_to_its_schema(number, dialect, seed):
    schema, holds = OBJECTS[number]
    has_marks = number % 2 == 0
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    grammar = compiled(Form(calls="one"), dialect, has_marks=has_marks, tools=[tool], prompt="</think>")
    text = random_answer(grammar.start(), byte_tokenizer(has_marks=has_marks), seed=seed)
    answer = parse_answer(dialect, text, tools=[tool], prompt="</think>")
    (call,) = answer.tool_calls
    assert (call.name, answer.text) == ("f", "")
    assert holds(json.loads(call.arguments))


@given(st.sampled_from(OBJECTS), st.integers(0, 2**32))
def test_an_answer_by_a_model_that_says_anything_keeps_to_its_schema(drawn, seed):
    schema, holds = drawn
    grammar = compiled(Form(schema=schema), PLAIN_QWEN, tools=())
    text = random_answer(grammar.start(), byte_tokenizer(has_marks=True), seed=seed)
    assert holds(json.loads(text))


UNSUPPORTED = {
    "a keyword": (Form(schema={"type": "array", "uniqueItems": True}), PLAIN_QWEN, (), 'keys: ["uniqueItems"]'),
    "a format": (Form(schema={"type": "string", "format": "postcode"}), PLAIN_QWEN, (), "Unknown format: postcode"),
    "a pattern": (Form(schema={"type": "string", "pattern": "(?=a)b"}), PLAIN_QWEN, (), "look-around"),
    "no schema": (Form(schema={"type": "strin"}), PLAIN_QWEN, (), "Invalid type: strin"),
    "nothing fits": (Form(schema={"$ref": "#"}), PLAIN_QWEN, (), "no text fits it"),
    "the library's own settings": (Form(schema={"x-guidance": {"lenient": True}}), PLAIN_QWEN, (), "x-guidance"),
    "no tools": (Form(calls="some"), PLAIN_QWEN, (), "there are no tools"),
    "no such tool": (Form(calls="one", name="g"), PLAIN_QWEN, TOOLS, "there is no tool 'g'"),
    "strict without marks": (Form(holds_calls=True), LLAMA, TOOLS, "strict"),
}


@pytest.mark.parametrize(("form", "dialect", "tools", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_its_name(form, dialect, tools, words):
    with pytest.raises(BadRequest) as caught:
        compiled(form, dialect, tools=tools)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (
            {"type": "string", "pattern": "a+"},
            "tool f, p, is not supported: calls of this model cannot be held to 'pattern'",
        ),
        ({"$ref": "#/$defs/x"}, "cannot be held to '$ref'"),
        ({"enum": ["a", 1]}, "choose among texts alone"),
        ({"enum": 5}, "choose among texts alone"),
        ({"anyOf": 5}, "cannot be held to 'anyOf'"),
        ({"type": "string", "maxLength": 10**9}, "lengths from 0 to 10000"),
        ({"type": "array", "uniqueItems": True}, 'keys: ["uniqueItems"]'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_texts_in_calls_cannot_be_held_to_is_refused_by_its_name(parameter, words):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": parameter}}}}
    with pytest.raises(BadRequest) as caught:
        compiled(Form(calls="one"), NEMOTRON, tools=[tool])
    assert words in caught.value.message
