"""Schemas that would take all time or memory to become a grammar are refused within a budget, and end nothing else.

CVE-2025-48942, CVE-2025-48943 and CVE-2025-48944: a schema, a pattern or a tool's schema ended a server. CVE-2026-55574
and PYSEC-2026-3933: a grammar was made without a limit of time. CVE-2025-29770: what was made was kept without a limit.
"""

import pytest

from freehold.errors import BadRequest
from freehold.text.answer_grammar import Form, write_grammar
from freehold.text.dialect import LLAMA
from freehold.text.grammar import MAX_KEPT, Grammars, SchemaBudget, try_schemas
from text.spelling import byte_tokenizer

DEEP: dict[str, object] = {"type": "string"}
for _ in range(20_000):
    DEEP = {"type": "array", "items": DEEP}

HOSTILE = {
    "multiples": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]},
    "patterns": {"allOf": [{"type": "string", "pattern": f"a.{{{length}}}b"} for length in range(10, 60)]},
    "choices of choices": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"k{index}": {"const": value}}} for value in (0, 1)]}
            for index in range(24)
        ]
    },
    "properties": {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(30_000)}},
    "choices": {"enum": [f"x{index}" for index in range(100_000)]},
    "itself": {"$ref": "#"},
    "elsewhere": {"$ref": "http://127.0.0.1:1/schema"},
    "a pattern that looks back": {"type": "string", "pattern": r"(a+)+\1"},
}
BOUNDED = {
    "repeated repetition": {"type": "string", "pattern": "^(.{0,10000}x){0,10000}$"},
    "nested repetition": {"type": "string", "pattern": "^(a+)+b(a|a)*c$"},
    "length": {"type": "string", "minLength": 10**9},
    "items": {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    "references": {
        "$defs": {
            "d40": {"type": "string"},
            **{
                f"d{depth}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{depth + 1}"}] * 2}
                for depth in range(40)
            },
        },
        "$ref": "#/$defs/d0",
    },
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_schema_that_takes_too_much_is_refused_and_the_next_one_is_tried(schema):
    budget = SchemaBudget(time_s=1, memory_bytes=256 << 20)
    with pytest.raises(BadRequest) as caught:
        try_schemas({"this schema": schema}, budget)
    assert caught.value.message.startswith("this schema")
    try_schemas({"this schema": {"type": "string"}}, budget)


def test_a_schema_that_is_too_long_or_too_deep_is_refused_before_it_is_tried():
    with pytest.raises(BadRequest, match="more than 1,000"):
        try_schemas({"this schema": {"description": "x" * 1000}}, SchemaBudget(chars=1000))
    with pytest.raises(BadRequest, match="nested too deep"):
        try_schemas({"this schema": DEEP}, SchemaBudget())


@pytest.mark.parametrize("schema", BOUNDED.values(), ids=BOUNDED)
def test_a_grammar_goes_on_or_ends_with_its_own_error_step_by_step(schema):
    tokenizer = byte_tokenizer(has_marks=True)
    grammars = Grammars(tokenizer)
    written = write_grammar(Form(schema=schema), LLAMA, token_id=tokenizer.token_id)
    matcher = grammars.compile(written.text, written.schemas).start()
    for _ in range(200):
        try:
            mask = matcher.allowed()
        except BadRequest:
            return
        preferred = [tokenizer.encode_plain(char)[0] for char in '"ax[']
        matcher.accept(next((token for token in preferred if mask[token]), mask.index(max(mask))))


def test_no_more_grammars_are_kept_than_were_decided():
    tokenizer = byte_tokenizer(has_marks=True)
    grammars = Grammars(tokenizer)
    first = None
    for number in range(MAX_KEPT + 1):
        written = write_grammar(Form(schema={"const": number}), LLAMA, token_id=tokenizer.token_id)
        first = first or (written, grammars.compile(written.text, written.schemas))
        assert grammars.compile(written.text, written.schemas) is grammars.compile(written.text, written.schemas)
    written, grammar = first
    assert grammars.compile(written.text, written.schemas) is not grammar
