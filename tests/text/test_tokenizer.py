"""Ids equal those of transformers; what is added, what is recognised, and what is saved."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from freehold.errors import BadFile, BadRequest, NotFound, UnsupportedModel
from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from inputs import llama3_tokenizer_dir, qwen_tokenizer_dir
from text.hard_strings import HARD_STRINGS
from text.witnesses import tokenizer_of, witness_of

REAL = ("smollm", "qwen", "llama")


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("name", HARD_STRINGS)
def test_ids_of_hard_strings_are_those_of_transformers(family, name):
    tokenizer, text = tokenizer_of(family), HARD_STRINGS[name]
    ids = tokenizer.encode(text)
    wanted = witness_of(family)(text, add_special_tokens=False).input_ids
    assert ids == [*[tokenizer.bos_id] * tokenizer.adds_bos, *wanted]


@pytest.mark.parametrize("family", REAL)
def test_ids_of_any_text_are_those_of_transformers(family):
    tokenizer, witness = tokenizer_of(family), witness_of(family)
    bos = tokenizer.token_text(tokenizer.bos_id) if tokenizer.adds_bos else ""

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=60) | st.text(alphabet=" \n\t0\u0661aZé'\u2019.<|>_/", max_size=60))
    def same(text):
        wanted = witness.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(f"{bos}{text}") == [*[tokenizer.bos_id] * bool(bos), *wanted]

    same()


@pytest.mark.parametrize("folder", [qwen_tokenizer_dir, llama3_tokenizer_dir], ids=["qwen", "llama"])
def test_tokenizer_files_give_the_ids_of_transformers(folder):
    tokenizer, witness = Tokenizer.from_files(folder()), AutoTokenizer.from_pretrained(folder())
    for text in HARD_STRINGS.values():
        assert tokenizer.encode(text) == witness(text).input_ids


@pytest.mark.parametrize("family", REAL)
def test_decoding_gives_the_text_back(family):
    tokenizer = tokenizer_of(family)
    for name, text in HARD_STRINGS.items():
        if name != "decomposed":  # Qwen composes it
            assert tokenizer.decode(tokenizer.encode_plain(text)) == text


@pytest.mark.parametrize("family", REAL)
def test_decoding_equals_transformers_for_any_ids(family):
    tokenizer, witness = tokenizer_of(family), witness_of(family)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 300), max_size=20))
    def same(ids):
        assert tokenizer.decode(ids) == witness.decode(ids, clean_up_tokenization_spaces=False)

    same()


def test_plain_encoding_recognises_no_special_token():
    tokenizer = tokenizer_of("qwen")
    text = HARD_STRINGS["special tokens"] + HARD_STRINGS["tool marks"]
    ids = tokenizer.encode_plain(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.token_id("<|endoftext|>")
    assert tokenizer.token_id("<|im_end|>") in tokenizer.encode(text)


def test_bos_is_added_once():
    tokenizer = tokenizer_of("llama")
    assert tokenizer.encode("hi")[0] == tokenizer.bos_id
    assert tokenizer.encode("<|begin_of_text|>hi") == tokenizer.encode("hi")
    assert tokenizer.bos_id not in tokenizer.encode_plain("hi")


def test_a_rendered_prompt_has_the_bos_of_its_template_alone():
    tokenizer = tokenizer_of("llama")
    assert tokenizer.encode_rendered("hi") == tokenizer.encode_plain("hi")
    assert tokenizer.encode_rendered("<|begin_of_text|>hi") == tokenizer.encode("hi")


def test_rendered_prompts_of_a_template_without_bos_have_the_ids_of_transformers(tmp_path):
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 3, "content": "<s>", **special}, {"id": 4, "content": "</s>", **special}]
    writes_bos = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
    }
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": template}
    _write(tmp_path, tokenizer=TINY | {"added_tokens": added, "post_processor": writes_bos}, tokenizer_config=config)
    messages = [{"role": "user", "content": "ab"}]
    witness = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True, return_dict=False)
    tokenizer = Tokenizer.from_files(tmp_path)
    assert tokenizer.encode_rendered(ChatTemplate(template).render(messages)) == witness == [2, 4]
    assert tokenizer.encode("ab")[0] == tokenizer.bos_id
    assert 4 in tokenizer.stop_ids


def test_stop_ids_are_eos_and_the_ends_of_turns():
    assert {tokenizer_of("smollm").token_text(stop) for stop in tokenizer_of("smollm").stop_ids} == {
        "<|im_end|>",
        "<|endoftext|>",
    }
    assert tokenizer_of("qwen").stop_ids == {151643, 151645}
    assert tokenizer_of("llama").stop_ids == {128001, 128009}


def test_ids_past_the_vocabulary_stand_for_nothing():
    assert tokenizer_of("llama").decode([10**6]) == ""


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(BadRequest, match="surrogate"):
        tokenizer_of("smollm").encode("\ud800")


@pytest.mark.parametrize("family", REAL)
def test_saved_files_load_in_transformers_and_here_with_the_same_ids(family, tmp_path):
    tokenizer = tokenizer_of(family)
    tokenizer.to_files(tmp_path, chat_template="{{ messages[0].content }}\n")
    again, witness = Tokenizer.from_files(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_STRINGS.values():
        assert again.encode(text) == tokenizer.encode(text)
        assert witness(text).input_ids == [*[tokenizer.bos_id] * tokenizer.adds_bos, *_without_bos(tokenizer, text)]
    assert witness.chat_template == "{{ messages[0].content }}\n"
    assert witness.eos_token_id == tokenizer.eos_id
    assert again.digest == tokenizer.digest


def _without_bos(tokenizer, text):
    """Return the ids without the BOS that we add; transformers doubles one that a text begins with."""
    ids = tokenizer.encode(text)
    return ids[1:] if tokenizer.adds_bos and not text.startswith("<|begin_of_text|>") else ids


def _write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


TINY = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


def test_generation_config_names_the_stop_ids(tmp_path):
    _write(tmp_path, tokenizer=TINY, generation_config={"eos_token_id": [1, 2]}, tokenizer_config={"eos_token": "a"})
    assert Tokenizer.from_files(tmp_path).stop_ids == {0, 1, 2}


def test_a_config_may_ask_for_a_bos(tmp_path):
    _write(tmp_path, tokenizer=TINY, tokenizer_config={"bos_token": {"content": "b"}, "add_bos_token": True})
    assert Tokenizer.from_files(tmp_path).encode("ab") == [1, 2]


def test_a_folder_without_tokenizer_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        Tokenizer.from_files(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"tokenizer": "{"}, BadFile, "cannot be read"),
        ({"tokenizer": {**TINY, "decoder": None}}, UnsupportedModel, "byte-level"),
        ({"tokenizer": TINY, "tokenizer_config": "[1]"}, BadFile, "an object is wanted"),
        ({"tokenizer": TINY, "tokenizer_config": {"eos_token": "zzz"}}, BadFile, "not in tokenizer.json"),
        ({"tokenizer": TINY, "generation_config": {"eos_token_id": ["x"]}}, BadFile, "eos_token_id"),
    ],
)
def test_damaged_files_are_refused(tmp_path, files, error, message):
    _write(tmp_path, **files)
    with pytest.raises(error, match=message):
        Tokenizer.from_files(tmp_path)
