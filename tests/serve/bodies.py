"""Bodies of requests, and what can be wrong in every place of them."""

import copy

# Requests with much in them, by their path.
BODIES = {
    "/v1/chat/completions": {
        "model": "scripted",
        "max_tokens": 20,
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "x"}], "name": "x"},
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "x",
                "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "t", "content": "x"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "x", "parameters": {}}}],
        "tool_choice": "auto",
        "stop": ["x"],
        "metadata": {"a": "b"},
        "chat_template_kwargs": {"a": "x"},
        "user": "x",
    },
    "/v1/messages": {
        "model": "scripted",
        "max_tokens": 2000,
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": ""},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]},
                    {"type": "text", "text": "x"},
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["x"],
    },
    "/v1/responses": {
        "model": "scripted",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "t", "output": "x"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "metadata": {"a": "b"},
    },
}
ODD = (None, True, -1, 1e400, "", "\ud800", "x" * 2000, [], {}, [[]], {"type": "text"}, {"type": []}, {"role": {}})


def places(value, above=()):
    """Yield the place of every value in a body."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*above, key)
        yield from places(each, (*above, key))


def changed(body, place, odd):
    """Return a body with something else in a place."""
    body = copy.deepcopy(body)
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = odd
    return body
