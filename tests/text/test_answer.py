"""Answers of the three dialects: however they are cut, the same text, reasoning and calls, and nothing lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.text.answer import AnswerParser, ReasoningPiece, TextPiece, join_pieces, parse_answer
from freehold.text.dialect import LLAMA, NEMOTRON, QWEN
from text.conversations import CLOCK, WEATHER

TOOLS = [WEATHER, CLOCK]
DIALECTS = {dialect.name: dialect for dialect in (NEMOTRON, QWEN, LLAMA)}
THINKING = "<|im_start|>assistant\n<think>\n"
XML = "<tool_call>\n<function=get_weather>\n<parameter=place>\nZürich\n</parameter>\n</function>\n</tool_call>"
XML_CLOCK = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Zürich"}}\n</tool_call>'
BARE = '{"name": "get_weather", "parameters": {"place": "Zürich"}}'


def _parse(dialect, text, *, prompt="", tools=TOOLS):
    return parse_answer(dialect, text, tools=tools, prompt=prompt)


def _parse_in_cuts(dialect, text, data, *, prompt="", tools=TOOLS):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    parser = AnswerParser(dialect, tools=tools, prompt=prompt)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += parser.feed(text[start:end])
    return join_pieces([*pieces, *parser.finish()])


def _calls(answer):
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


@pytest.mark.parametrize(("dialect", "text"), [(NEMOTRON, XML), (QWEN, JSON), (LLAMA, BARE)], ids=[*DIALECTS])
def test_a_call_is_read_and_leaves_no_text(dialect, text):
    answer = _parse(dialect, f"\n{text}\n")
    assert _calls(answer) == [("get_weather", {"place": "Zürich"})]
    assert (answer.text, answer.reasoning) == ("", "")
    assert answer.tool_calls[0].arguments == '{"place": "Zürich"}'


def test_reasoning_text_and_calls_come_apart():
    answer = _parse(NEMOTRON, f"Let me see.\n</think>\n\nOne moment.\n\n{XML}\n{XML_CLOCK}\n", prompt=THINKING)
    assert answer.reasoning == "Let me see."
    assert answer.text == "One moment."
    assert _calls(answer) == [("get_weather", {"place": "Zürich"}), ("clock", {})]
    assert [call.id for call in answer.tool_calls] == ["call_0", "call_1"]


def test_the_opening_tag_may_be_in_the_answer():
    answer = _parse(QWEN, "\n<think>\nhm\n</think>\n\nYes")
    assert (answer.reasoning, answer.text) == ("hm", "Yes")


def test_a_closed_thought_in_the_prompt_means_no_reasoning():
    answer = _parse(NEMOTRON, "Yes </think>", prompt="<|im_start|>assistant\n<think></think>")
    assert (answer.reasoning, answer.text) == ("", "Yes </think>")


def test_reasoning_without_an_end_stays_reasoning():
    answer = _parse(NEMOTRON, "and so on <tool", prompt=THINKING)
    assert (answer.reasoning, answer.text) == ("and so on <tool", "")


def test_a_tag_later_in_the_text_is_text():
    assert _parse(QWEN, "See <think>hm</think>.").text == "See <think>hm</think>."


def test_llama_does_not_reason():
    assert _parse(LLAMA, "<think>a</think>b").text == "<think>a</think>b"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=[*DIALECTS])
def test_without_tools_nothing_is_a_call(dialect):
    for text in (XML, JSON, BARE, "<|python_tag|>" + BARE):
        answer = _parse(dialect, text, tools=())
        assert (answer.text, answer.tool_calls) == (text, ())


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (NEMOTRON, "<tool_call>\n<function=clock>\n</tool_call>"),
        (NEMOTRON, "<tool_call>\nclock()\n</tool_call>"),
        (NEMOTRON, "<tool_call>\n<function=a b>\n</function>\n</tool_call>"),
        (NEMOTRON, "<tool_call><function=clock><parameter=a>1</function></tool_call>"),
        (QWEN, '<tool_call>\n{"name": "clock", "arguments": {}\n</tool_call>'),
        (QWEN, '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>'),
        (QWEN, '<tool_call>{"arguments": {}}</tool_call>'),
        (QWEN, '<tool_call>{"name": "clock", "arguments": {"a": NaN}}</tool_call>'),
        (QWEN, '<tool_call>{"name": "clock", "arguments": {"a": 1e999}}</tool_call>'),
        (QWEN, '<tool_call>{"name": "clock", "arguments": {"a": "\\ud800"}}</tool_call>'),
        (QWEN, "<tool_call>" + "[" * 100_000 + "</tool_call>"),
        (QWEN, "<tool_call>never ends"),
        (LLAMA, '{"name": "unknown", "parameters": {}}'),
        (LLAMA, '{"name": "clock", "parameters": {}'),
        (LLAMA, '{"name": "clock", "parameters": {}} and more'),
        (LLAMA, '{"answer": 42}'),
        (LLAMA, "<|python_tag|>print(1)"),
        (LLAMA, '<|python_tag|>clock.call(a="b"'),
    ],
)
def test_what_is_not_exactly_a_call_comes_out_as_text(dialect, text):
    answer = _parse(dialect, f"a\n\n{text}\nb" if dialect is not LLAMA else text)
    assert answer.tool_calls == ()
    assert answer.text == (f"a\n\n{text}\nb" if dialect is not LLAMA else text)


@pytest.mark.parametrize(("dialect", "text"), [(NEMOTRON, XML), (QWEN, JSON)], ids=["nemotron", "qwen"])
def test_a_call_that_only_lacks_its_closing_mark_is_a_call(dialect, text):
    assert len(_parse(dialect, text.removesuffix("</tool_call>")).tool_calls) == 1


def test_calls_after_a_broken_one_are_read():
    answer = _parse(NEMOTRON, f"<tool_call>x</tool_call>\n{XML_CLOCK}")
    assert (answer.text, _calls(answer)) == ("<tool_call>x</tool_call>", [("clock", {})])


MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "</tool_", "<|python_tag|>"]
HARD_TEXT = st.lists(st.sampled_from([*MARKS, '"', "\\", "\\u003c", "\n", "{", "}", "é"]) | st.text(max_size=3)).map(
    "".join
)


@given(place=HARD_TEXT, is_ascii=st.booleans(), data=st.data())
def test_marks_within_the_strings_of_a_call_end_nothing(place, is_ascii, data):
    call = {"name": "get_weather", "arguments": {place: [place, {"a": place}]}}
    text = f"One.\n<tool_call>\n{json.dumps(call, ensure_ascii=is_ascii)}\n</tool_call>\nTwo.</tool_call>"
    answer = _parse_in_cuts(QWEN, text, data)
    assert _calls(answer) == [(call["name"], call["arguments"])]
    assert (answer.text, answer.reasoning) == ("One.Two.</tool_call>", "")


@pytest.mark.parametrize(
    "broken", ['{"name": "clo', '{"name": "clock\\', '{"a": \\"', '{"name": "clock", "arguments": {"a": "\n"}}"']
)
def test_a_call_that_is_no_json_ends_at_its_first_closing_mark(broken):
    call = f"<tool_call>{broken}</tool_call>"
    answer = _parse(QWEN, f'a {call} b\n"\n{JSON}')
    assert (answer.text, len(answer.tool_calls)) == (f'a {call} b\n"', 1)
    assert _parse(QWEN, f"{call} b").text == f"{call} b"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("<parameter=place>\n12\n</parameter>", {"place": "12"}),
        ("<parameter=place>\n\n two \n\n</parameter>", {"place": "\n two \n"}),
        ("<parameter=place>\n</parameter>", {"place": ""}),
        ("<parameter=place>x</parameter><parameter=days>3</parameter>", {"place": "x", "days": 3}),
        ("<parameter=place>\na </parameter> b\n</parameter>", {"place": "a </parameter> b"}),
        ("<parameter=days>\n3\n</parameter>", {"days": 3}),
        ("<parameter=days>\nthree\n</parameter>", {"days": "three"}),
        ('<parameter=options>\n{"wind": true}\n</parameter>', {"options": {"wind": True}}),
        ("<parameter=options>\nNone\n</parameter>", {"options": None}),
        ("<parameter=unknown>\n3\n</parameter>", {"unknown": "3"}),
        ("<parameter=place>\n{}\n</parameter>", {"place": "{}"}),
    ],
)
def test_values_of_the_nemotron_dialect_have_the_types_of_the_schema(written, value):
    text = f"<tool_call>\n<function=get_weather>\n{written}\n</function>\n</tool_call>"
    assert _calls(_parse(NEMOTRON, text)) == [("get_weather", value)]


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "boolean"}, "True", True),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "7", "7"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "array"}, "[1, [2]]", [1, [2]]),
        (True, "1", "1"),
    ],
)
def test_values_follow_the_whole_schema(schema, written, value):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": schema}}}}
    text = f"<tool_call><function=f><parameter=p>{written}</parameter></function></tool_call>"
    assert _calls(_parse(NEMOTRON, text, tools=[tool])) == [("f", {"p": value})]


@pytest.mark.parametrize(
    "text",
    [
        "<|python_tag|>" + BARE,
        ' {"type": "function", "name": "get_weather", "parameters": {"place": "Zürich"}} ',
        '{"name":"get_weather","arguments":"{\\"place\\": \\"Zürich\\"}"}',
        '<|python_tag|>get_weather.call(place="Zürich")',
    ],
)
def test_other_forms_of_llama_calls(text):
    assert _calls(_parse(LLAMA, text)) == [("get_weather", {"place": "Zürich"})]


def test_an_ordinary_json_answer_of_llama_is_streamed():
    parser = AnswerParser(LLAMA, tools=TOOLS)
    assert parser.feed('{"na') == []
    assert parser.feed('mes": [') == [TextPiece(text='{"names": [')]


def test_text_streams_without_waiting():
    parser = AnswerParser(NEMOTRON, tools=TOOLS, prompt=THINKING)
    assert parser.feed("I think </th") == [ReasoningPiece(text="I think ")]
    assert parser.feed("ink>\nA <b>\n") == [TextPiece(text="A <b>")]
    assert parser.feed("c") == [TextPiece(text="\nc")]
    assert parser.finish() == []


PARTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=clock>", "</function>", "<parameter=days>"),
    *("</parameter>", "<|python_tag|>", '{"name": "clock", ', '"parameters": {}}', '"arguments": {}}', "clock.call()"),
    *("\n", "\n\n", " ", "a", "<", "</", "é", "3", "{", "}", '"', "\\", XML, JSON, BARE, XML_CLOCK),
]


@settings(max_examples=300, deadline=None)
@given(
    dialect=st.sampled_from([*DIALECTS.values()]),
    parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12),
    prompt=st.sampled_from(["", THINKING]),
    tools=st.sampled_from([(), TOOLS]),
    data=st.data(),
)
def test_any_cut_gives_the_same_answer_and_loses_nothing(dialect, parts, prompt, tools, data):
    text = "".join(parts)
    answer = _parse_in_cuts(dialect, text, data, tools=tools, prompt=prompt)
    assert answer == parse_answer(dialect, text, tools=tools, prompt=prompt)
    if not answer.tool_calls:
        kept = (answer.reasoning + answer.text).replace("\n", "")
        dropped = text.replace("\n", "")
        if answer.reasoning or "<think>" in text or prompt:
            for mark in ("<think>", "</think>"):
                kept, dropped = kept.replace(mark, ""), dropped.replace(mark, "")
            kept, dropped = kept.strip(), dropped.strip()
        assert kept == dropped


@pytest.mark.parametrize("opening", ["<tool_call>", '<tool_call>{"a": "'], ids=["letters", "a-string"])
def test_a_long_answer_takes_linear_time(opening):
    text = opening + "x" * 300_000 + "\n" * 1000
    parser = AnswerParser(QWEN, tools=TOOLS)
    pieces = [piece for character in text for piece in parser.feed(character)]
    assert join_pieces([*pieces, *parser.finish()]).text == text
