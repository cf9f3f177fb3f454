"""What an answer may look like, as a grammar in llguidance's dialect of Lark, written from the dialect's own marks.

The same marks are read back by answer.py and calls.py, so an answer that keeps to its grammar is split as it was meant.
Reasoning comes first and is free. Compiling and following a grammar is for grammar.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from freehold.errors import BadRequest
from freehold.text.calls import JSON_TYPES, types_of
from freehold.text.dialect import Dialect

JsonSchema = Mapping[str, Any]
# Between the parts of JSON: enough to indent by, and an end to models that write nothing else.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
SETTINGS = "x-guidance"  # how llguidance is told so in a schema
# Keywords of a schema that say nothing of which values are valid.
ANNOTATIONS = frozenset("title description default examples deprecated readOnly writeOnly $schema $id $comment".split())
TEXT_KEYWORDS = ANNOTATIONS | {"type", "enum", "const", "minLength", "maxLength"}
OBJECT_KEYWORDS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
MAX_LENGTH = 10_000


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is wanted of an answer.

    calls: whether it may call, has to, or has to once. name: the one tool that it may call. holds_calls: whether calls
    that it may make are held to the tools' schemas. schema: of an answer that is JSON.
    """

    calls: Literal["free", "some", "one"] = "free"
    name: str | None = None
    holds_calls: bool = False
    schema: JsonSchema | None = None

    @property
    def is_free(self) -> bool:
        return self.calls == "free" and not self.holds_calls and self.schema is None


FREE = Form()


@dataclass(frozen=True, kw_only=True)
class AnswerGrammar:
    """A grammar, and the schemas in it by what errors call them."""

    text: str
    schemas: Mapping[str, JsonSchema]


def write_grammar(
    form: Form,
    dialect: Dialect,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    prompt: str = "",
    token_id: Callable[[str], int | None],
) -> AnswerGrammar:
    """Return the grammar of an answer.

    tools: have been through checked_tools. prompt: tells whether the answer begins inside the reasoning. token_id: of a
    mark, where it is one token.
    Raises: BadRequest for what the calls of this dialect cannot be held to.
    """
    writer = _Writer(dialect, token_id)
    functions = [tool["function"] for tool in tools if form.name in (None, tool["function"]["name"])]
    if form.calls != "free" and not functions:
        seen = "there are no tools" if form.name is None else f"there is no tool {form.name!r:.60}"
        raise BadRequest(f"tool_choice forces a call, but {seen}")
    answer = writer.answer(form, functions)
    writer.rule("start", f"{writer.reasoning(prompt)} {answer}")
    return AnswerGrammar(text="\n".join(writer.rules) + "\n", schemas=writer.schemas)


class _Writer:
    """Writes one grammar: each method returns an expression, and adds the rules that it is made of."""

    def __init__(self, dialect: Dialect, token_id: Callable[[str], int | None]):
        self.schemas: dict[str, JsonSchema] = {}
        self.rules = ["ANY: /(?s:.*)/"]
        self._dialect = dialect
        self._token_id = token_id

    def rule(self, name: str, body: str) -> str:
        """Add a rule; return its name. Options such as [lazy] are no part of that."""
        self.rules.append(f"{name}: {body}")
        return name.partition("[")[0]

    def answer(self, form: Form, functions: Sequence[Mapping[str, Any]]) -> str:
        """Return what comes after the reasoning."""
        if functions:
            self.rule("call", " | ".join(self._call(index, function) for index, function in enumerate(functions)))
        calls = f"({self._calls(form)})" if functions else ""
        if form.calls != "free":
            return calls
        if form.schema is not None:
            value = self._json("json", "the schema of the answer", form.schema)
            return f"({calls} | {value})" if calls else value
        return self._text_with_calls()

    def reasoning(self, prompt: str) -> str:
        """Return what may come first."""
        dialect = self._dialect
        if not dialect.reasons or prompt.rstrip().endswith(dialect.think_close):
            return ""
        thought = f"{self._up_to('thought', dialect.think_close)} /\\n{{0,2}}/"
        return thought if dialect.is_reasoning_after(prompt) else f"({self._mark(dialect.think_open)} {thought})?"

    def _calls(self, form: Form) -> str:
        if self._dialect.call_close is None:  # what follows the first call would be taken for a part of it
            return "call"
        one = f"{self._mark(self._dialect.call_open)} call"
        return one if form.calls == "one" else f'{one} ("\\n" {one})*'

    def _text_with_calls(self) -> str:
        """Return a text that has a call wherever the mark of one comes."""
        mark = self._dialect.call_open
        if self._dialect.call_close is None:
            raise BadRequest(
                "strict: this model's calls begin like any other text, so where it may answer they cannot be held",
                hint="a tool_choice that forces a call holds it to its schema",
            )
        return f"({self._up_to('before', mark)} call)* {self.rule('REST', _without(mark))}"

    def _call(self, index: int, function: Mapping[str, Any]) -> str:
        """Return a call, without the mark that it begins with."""
        name, schema = function["name"], _parameters(function)
        if self._dialect.call_format == "xml":
            body = self._xml_body(f"call_{index}", name, schema)
        else:
            key = "arguments" if self._dialect.call_format == "json" else "parameters"
            arguments = self._json(f"arguments_{index}", f"the schema of the tool {name}", schema)
            opening = f'{{"name": {json.dumps(name)}, "{key}": '
            body = f"{_literal(opening)} {arguments} {_literal('}')}"
        close = self._dialect.call_close
        return self.rule(f"call_{index}", f'"\\n" {body} "\\n" {self._mark(close)}' if close else body)

    def _xml_body(self, rule: str, name: str, schema: JsonSchema) -> str:
        where = f"the schema of the tool {name}"
        _refuse_keywords(where, schema, OBJECT_KEYWORDS)
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
            raise BadRequest(f"{where} is not supported: properties are no object, or required is no list")
        parameters = ""
        for index, key in enumerate([*properties, *(key for key in required if key not in properties)]):
            if not isinstance(key, str) or ">" in key or "\n" in key:
                raise BadRequest(f"{where} is not supported: calls of this model cannot name a parameter {key!r:.60}")
            value = self._xml_value(f"{rule}_{index}", f"{where}, {key},", properties.get(key, {}), schema)
            opening, end = _literal(f"<parameter={key}>\n"), _literal("\n")
            parameters += f" ({opening} {value} {end})" + ("" if key in required else "?")
        opening = _literal(f"<function={name}>\n")
        return f"{opening}{parameters} {_literal('</function>')}"

    def _xml_value(self, rule: str, where: str, schema: Any, root: JsonSchema) -> str:
        """Return a parameter's value and the mark that closes it. What calls.py reads as JSON is JSON, else a text."""
        close = "\n</parameter>"
        schema = schema if isinstance(schema, Mapping) else {}
        if types_of(schema) <= JSON_TYPES:
            shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
            return f"{self._json(rule, where, {**schema, **shared})} {_literal(close)}"
        _refuse_keywords(where, schema, TEXT_KEYWORDS)
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if choices is not None:
            choices = choices if isinstance(choices, list) else []
            texts = [_literal(choice) for choice in choices if isinstance(choice, str) and close not in choice]
            if len(texts) != len(choices) or not texts:
                raise BadRequest(f"{where} is not supported: calls of this model can choose among texts alone")
            return f"({' | '.join(texts)}) {_literal(close)}"
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if not all(isinstance(length, int) and 0 <= length <= MAX_LENGTH for length in (least, most or 0)):
            raise BadRequest(f"{where} is not supported: lengths from 0 to {MAX_LENGTH} are")
        # The reader takes the first line that closes the value, be it the first of all, and the first end of a call.
        others = f"~({_literal(close.lstrip())} ANY) & {_without(self._dialect.call_close or '')}"
        text = self.rule(rule.upper(), f"/(?s:.{{{least},{most}}})/ & {others}")
        return self.rule(f"{rule}[lazy]", f"{text} {_literal(close)}")

    def _json(self, rule: str, where: str, schema: JsonSchema) -> str:
        if SETTINGS in schema:
            raise BadRequest(f"{where} is not supported: Unimplemented keys: [{SETTINGS!r}]")
        self.schemas[where] = {**schema, SETTINGS: {"whitespace_pattern": WHITESPACE}}
        return self.rule(rule, f"%json {json.dumps(self.schemas[where])}")

    def _up_to(self, rule: str, mark: str) -> str:
        """Return a text that ends with the first mark in it."""
        if self._token_id(mark) is None:
            return self.rule(f"{rule}[lazy]", f"ANY {_literal(mark)}")
        return f"{self.rule(rule.upper(), _without(mark))} {self._mark(mark)}"

    def _mark(self, mark: str) -> str:
        token = self._token_id(mark)
        return _literal(mark) if token is None else f"<[{token}]>"


def _parameters(function: Mapping[str, Any]) -> JsonSchema:
    """Return the schema of a call's arguments, which are an object; without parameters an empty one."""
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise BadRequest(f"the schema of the tool {function['name']} is not supported: its type is not object")
    return {"type": "object", **schema}


def _refuse_keywords(where: str, schema: JsonSchema, known: frozenset[str]) -> None:
    if unknown := sorted(set(schema) - known):
        raise BadRequest(f"{where} is not supported: calls of this model cannot be held to {unknown[0]!r:.60}")


def _without(mark: str) -> str:
    return f"ANY & ~(ANY {_literal(mark)} ANY)"


def _literal(text: str) -> str:
    return json.dumps(text)
