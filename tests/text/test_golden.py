"""Prompts, as text and as ids: ours, transformers', and those stored."""

import json

import pytest

from text.witnesses import (
    FAMILIES,
    RENDERINGS,
    cases_of,
    golden_of,
    rendered,
    rendered_by_witness,
    template_of,
    tokenizer_of,
    witness_of,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_that_transformers_renders(family):
    template = template_of(family)
    for case in cases_of(family):
        assert rendered(template, case) == rendered_by_witness(template, case), case.name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "nemotron"])
def test_prompts_have_the_ids_that_transformers_gives(family):
    template, tokenizer, witness = template_of(family), tokenizer_of(family), witness_of(family)
    for case in cases_of(family):
        text = rendered(template, case)
        assert tokenizer.encode(text) == witness(text, add_special_tokens=False).input_ids, case.name


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_ids_are_the_stored_ones(family):
    template, tokenizer = template_of(family), tokenizer_of(family)
    golden = json.loads(RENDERINGS.read_text("utf-8"))[family]
    assert set(golden) == {case.name for case in cases_of(family)}
    for case in cases_of(family):
        text = rendered(template, case)
        assert golden_of(family, case, text, tokenizer and tokenizer.encode(text)) == golden[case.name], case.name


def test_the_bos_that_a_template_writes_is_not_doubled():
    template, tokenizer = template_of("llama"), tokenizer_of("llama")
    ids = tokenizer.encode(template.render([{"role": "user", "content": "hi"}]))
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
