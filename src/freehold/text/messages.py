"""What a conversation may look like: messages and tools in the form of OpenAI's chat API, checked and made uniform.

Templates differ in what they look up, so each gets the same shapes: content as one string, arguments as a mapping. How
they are turned into text is in chat.py; what an HTTP request may hold besides is for the server's schema.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from freehold.errors import BadRequest

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
# Other names of reasoning_content, which clients send back as a server gave them.
REASONING_NAMES = ("thinking", "reasoning", "reasoning_content")
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as templates expect them. Raises: BadRequest, naming the message and the field."""
    if not _is_list(messages) or not messages:
        _refuse("messages", messages, "a list with at least one message")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools unchanged, in their own key order. Raises: BadRequest where one is not a function with a name."""
    if not _is_list(tools):
        _refuse("tools", tools, "a list of functions")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name = _checked_tool(tool, f"tools[{index}]")
        if name in seen:
            raise BadRequest(f"tools[{index}]: a second tool named {name!r}")
        seen.add(name)
    return [dict(tool) for tool in tools]


def _checked_tool(tool: Any, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        _refuse(where, tool, 'an object with type "function" and the field function')
    name, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        _refuse(f"{where}.function.name", name, "1 to 128 letters, digits, dots, dashes or underscores")
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties", {}), Mapping):
        _refuse(f"{where}.function.parameters", parameters, "a JSON schema of an object")
    return name


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        _refuse(where, message, "an object with role and content")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    for name in REASONING_NAMES:
        if name in given:
            given["reasoning_content"] = given.pop(name)
    if given.get("role") not in ROLES:
        _refuse(f"{where}.role", given.get("role"), f"one of {', '.join(ROLES)}")
    if unknown := [key for key in given if key not in KEYS]:
        raise BadRequest(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(KEYS)}")
    if "content" not in given and "tool_calls" not in given:
        _refuse(f"{where}.content", None, "a text")
    for key in ("name", "reasoning_content", "tool_call_id"):
        if not isinstance(given.get(key, ""), str):
            _refuse(f"{where}.{key}", given[key], "a text")
    checked = {**given, "content": _joined(given.get("content", ""), f"{where}.content")}
    if "tool_calls" in given:
        checked["tool_calls"] = _checked_calls(given, where)
    return checked


def _joined(content: Any, where: str) -> str:
    """Return the text of a content; parts of text are joined by a newline, as other servers do."""
    if isinstance(content, str):
        return content
    if not _is_list(content) or not all(isinstance(part, Mapping) for part in content):
        _refuse(where, content, "a text or a list of text parts")
    for index, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            _refuse(f"{where}[{index}]", part.get("type"), 'a part of type "text"; these models read only text')
    return "\n".join(part["text"] for part in content)


def _checked_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = message["tool_calls"]
    if message["role"] != "assistant" or not _is_list(calls):
        _refuse(f"{where}.tool_calls", calls, "a list, and on an assistant's message")
    return [_checked_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call with its arguments as a mapping: JSON in a string, which the API sends back, is read."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _refuse(where, call, "an object with function.name and function.arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            _refuse(f"{where}.function.arguments", arguments, "a JSON object")
    if not isinstance(arguments, Mapping):
        _refuse(f"{where}.function.arguments", arguments, "a JSON object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _refuse(where: str, seen: Any, wanted: str) -> NoReturn:
    """Say what kind of value was seen, and never the value: errors travel further than conversations should."""
    raise BadRequest(f"{where}: {_kind(seen)} where {wanted} is wanted")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case str():
            return "another text"
        case int() | float():
            return "a number"
        case Mapping():
            return "another object"
        case list() | tuple():
            return "another list"
    return f"a {type(value).__name__}"
