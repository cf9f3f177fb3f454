"""Conversations that the tests of templates render, and the tokenizers that templates come with."""

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "  The weather of a place, now & for <days>. ",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Zürich, 東京 …", "minLength": 1},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "options": {"type": ["object", "null"], "properties": {"wind": {"type": "boolean"}}},
            },
            "required": ["place"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "What time it is", "parameters": {}}}

SYSTEM = {"role": "system", "content": "Answer in one word."}
ASK = {"role": "user", "content": " Größe? 'quoted' <b>&amp;</b> 😀\n"}
ANSWER = {"role": "assistant", "content": "Tall."}
THOUGHT = {"role": "assistant", "content": "Tall.", "reasoning_content": "It is\nlarge."}
THINK_TAGS = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTall."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 3}}}
RICH_CALL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "arguments": {"place": "a\n'b'", "days": 2.5, "unit": None, "options": {"wind": True, "é": [1, "x"]}},
    },
}
CLOCK_CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SAY_AND_CALL = {"role": "assistant", "content": "Wait.", "reasoning_content": "ask", "tool_calls": [RICH_CALL]}
TWO_CALLS = {"role": "assistant", "content": "", "tool_calls": [RICH_CALL, CLOCK_CALL]}
RESULT = {"role": "tool", "content": '{"temperature": 21.5}'}
RESULT_TWO = {"role": "tool", "content": "12:00"}

PLAIN: dict[str, list[dict[str, Any]]] = {
    "one question": [ASK],
    "system": [SYSTEM, ASK],
    "several turns": [SYSTEM, ASK, ANSWER, ASK, ANSWER, ASK],
    "ends with the assistant": [ASK, ANSWER],
    "empty texts": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
}
REASONED: dict[str, list[dict[str, Any]]] = {
    "reasoning in the past": [ASK, THOUGHT, ASK],
    "reasoning at the end": [ASK, ANSWER, ASK, THOUGHT],
    "reasoning in tags": [ASK, THINK_TAGS, ASK, THINK_TAGS],
}
CALLED: dict[str, list[dict[str, Any]]] = {
    "a call": [ASK, CALLS],
    "a call with its result": [SYSTEM, ASK, CALLS, RESULT],
    "calls in the past": [ASK, CALLS, RESULT, ANSWER, ASK, SAY_AND_CALL, RESULT, ASK],
}
PARALLEL: dict[str, list[dict[str, Any]]] = {
    "two calls": [ASK, TWO_CALLS, RESULT, RESULT_TWO, ANSWER],
    "two calls going on": [SYSTEM, ASK, TWO_CALLS, RESULT, RESULT_TWO],
}
