"""Prompts, as text and as ids: ours, transformers', and those stored."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer

from freehold.text.tokenizer import BYTE_OF, Tokenizer
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


# The first ids of Nemotron 3's vocabulary. Its own tokenizer cannot be had, so single bytes stand for the rest.
NEMOTRON_SPECIALS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "<|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
).split()


def test_prompts_of_nemotron_have_the_ids_that_transformers_gives_with_its_special_tokens(tmp_path):
    vocabulary = {token: index for index, token in enumerate([*NEMOTRON_SPECIALS, *BYTE_OF])}
    core = Core(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in NEMOTRON_SPECIALS])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template, tokenizer, witness = (
        template_of("nemotron"),
        Tokenizer.from_files(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert tokenizer.stop_ids == {2, 11}
    for case in cases_of("nemotron"):
        text = rendered(template, case)
        ids = tokenizer.encode_rendered(text)
        assert ids == witness(text, add_special_tokens=False).input_ids, case.name
        assert ids[0] == 10, case.name


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
