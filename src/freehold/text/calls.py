"""Reading one tool call from the text between its marks, for each of the three formats.

A call is read whole or not at all: text that is not exactly a call gives None, and the reader of the answer shows it as
text. Finding the marks is for answer.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from freehold.text.dialect import CallFormat
from freehold.text.stream import held_length

# Types of JSON schema that are written as JSON in a call. A value of another type, or of no known type, is a text.
JSON_TYPES = frozenset(("integer", "number", "boolean", "object", "array", "null"))
# Python's words, which templates write for JSON's.
PYTHON_WORDS = {"True": True, "False": False, "None": None}
CALL_OPENINGS = ('{"name":"', '{"type":"function","name":"')
METHOD_CALL = re.compile(r"\s*([\w.-]+)\.call\(")
METHOD_ARGUMENT = re.compile(r"\s*(\w+)\s*=\s*")

Schemas = Mapping[str, Mapping[str, Any]]


def find_mark(text: str, mark: str) -> tuple[int, int]:
    """Return where a mark begins, or -1, and where what is undecided begins: half a mark, or the end of the text."""
    end = text.find(mark) if mark else -1
    return end, end if end >= 0 else len(text) - held_length(text, (mark,))


class JsonStrings:
    """Tells a mark that ends a JSON text from the same letters within one of its strings, while the text comes.

    A text with a string that has no end, or a control character in one, is no JSON, and its strings tell nothing.
    """

    def __init__(self, mark: str) -> None:
        self._signs = re.compile(rf'\\.|["\x00-\x1f]|{re.escape(mark)}', re.DOTALL)
        self._mark = mark
        self.is_inside = False

    def find(self, text: str) -> tuple[int, int] | None:
        """Return the same as `find_mark` for a mark outside of strings, None where what came is no JSON.

        What comes next begins where this text was undecided.
        """
        seen = 0
        for sign in self._signs.finditer(text):
            seen = sign.end()
            if sign[0] == self._mark:
                if not self.is_inside:
                    return sign.start(), sign.start()
            elif sign[0] == '"':
                self.is_inside = not self.is_inside
            elif sign[0].startswith("\\") != self.is_inside:  # an escape outside, or a control character inside
                return None
        rest = text[seen:]
        return -1, len(text) - max(rest.endswith("\\"), held_length(rest, (self._mark,)))


class Call(NamedTuple):
    """A function's name and its arguments, as one JSON object in a string."""

    name: str
    arguments: str


def schemas_by_name(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """Return the properties of each tool's parameters. The tools have been through checked_tools."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function.get("parameters", {}).get("properties", {}) for function in functions}


def read_call(body: str, call_format: CallFormat, schemas: Schemas) -> Call | None:
    """Return the call that a body is, or None where it is not exactly one."""
    if call_format == "xml":
        return _read_xml(body, schemas)
    if call_format == "json":
        return _read_json(body)
    return _read_bare(body, schemas)


def opens_call(head: str, schemas: Schemas) -> bool | None:
    """Return whether a text that begins so is a bare JSON call of one of the tools; None while it cannot be told."""
    verdicts = [_fits_opening(head, opening, schemas) for opening in CALL_OPENINGS]
    return True if True in verdicts else None if None in verdicts else False


def _fits_opening(head: str, opening: str, schemas: Schemas) -> bool | None:
    position = 0
    for wanted in opening:
        while position < len(head) and head[position].isspace():
            position += 1
        if position == len(head):
            return None
        if head[position] != wanted:
            return False
        position += 1
    name, quote, _ = head[position:].partition('"')
    if quote:
        return name in schemas
    return None if any(known.startswith(name) for known in schemas) else False


def _read_json(body: str) -> Call | None:
    content = _load(body)
    return _call_of(content, ("arguments",)) if isinstance(content, dict) else None


def _read_bare(body: str, schemas: Schemas) -> Call | None:
    content = _load(body)
    call = _call_of(content, ("parameters", "arguments")) if isinstance(content, dict) else _read_method(body)
    return call if call is not None and call.name in schemas else None


def _call_of(content: Mapping[str, Any], keys: tuple[str, ...]) -> Call | None:
    name = content.get("name")
    arguments: Any = next((content[key] for key in keys if key in content), {})
    if isinstance(arguments, str):
        arguments = _load(arguments)
    return _call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _read_method(body: str) -> Call | None:
    """Read `NAME.call(P="VALUE", ...)`, the form of Llama's built-in tools."""
    opening = METHOD_CALL.match(body)
    if opening is None:
        return None
    arguments: dict[str, Any] = {}
    position = opening.end()
    while argument := METHOD_ARGUMENT.match(body, position):
        try:
            arguments[argument[1]], position = json.JSONDecoder().raw_decode(body, argument.end())
        except (ValueError, RecursionError):
            return None
        position += body.startswith(",", position)
    return _call(opening[1], arguments) if body[position:].strip() == ")" else None


def _read_xml(body: str, schemas: Schemas) -> Call | None:
    body = body.strip()
    if not body.startswith("<function=") or not body.endswith("</function>"):
        return None
    name, bracket, inside = body[len("<function=") : -len("</function>")].partition(">")
    parameters = _read_parameters(inside)
    if not bracket or not name or any(char.isspace() for char in name) or parameters is None:
        return None
    types = schemas.get(name, {})
    return _call(name, {key: _typed(value, types.get(key)) for key, value in parameters.items()})


def _read_parameters(inside: str) -> dict[str, str] | None:
    """Read `<parameter=P>VALUE</parameter>` to the end. A value on lines of its own ends at a line of its own."""
    parameters: dict[str, str] = {}
    position = 0
    while rest := inside[position:].lstrip():
        name, bracket, _ = rest[len("<parameter=") :].partition(">")
        if not rest.startswith("<parameter=") or not bracket or not name:
            return None
        start = len(inside) - len(rest) + len("<parameter=") + len(name) + 1
        newline = "\n" if inside.startswith("\n", start) else ""
        end = inside.find(f"{newline}</parameter>", start)
        if end < 0:
            return None
        parameters[name] = inside[start + len(newline) : end] if end > start else ""
        position = end + len(newline) + len("</parameter>")
    return parameters


def _typed(value: str, schema: Any) -> Any:
    """Return a value as its schema types it: a text stays a text, the rest is JSON, or a text where it is not."""
    if not types_of(schema) <= JSON_TYPES:
        return value
    stripped = value.strip()
    if stripped in PYTHON_WORDS:
        return PYTHON_WORDS[stripped]
    try:
        return json.loads(stripped, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return value


def types_of(schema: Any) -> frozenset[str]:
    """Return the names of types that a schema allows; what cannot be told counts as a text."""
    schema = schema if isinstance(schema, Mapping) else {}
    branches = schema.get("anyOf") or schema.get("oneOf")
    branches = branches if isinstance(branches, list) else [schema]
    named = [branch.get("type", "string") if isinstance(branch, Mapping) else "string" for branch in branches]
    return frozenset(str(name) for entry in named for name in (entry if isinstance(entry, list) else [entry]))


def _load(text: str) -> Any:
    """Return what JSON says, or None where a text is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _call(name: str, arguments: Mapping[str, Any]) -> Call | None:
    """Return the call, or None where it has no JSON, or no UTF-8 to be sent as (half a surrogate pair)."""
    try:
        call = Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        "".join(call).encode()
    except (ValueError, RecursionError):
        return None
    return call
