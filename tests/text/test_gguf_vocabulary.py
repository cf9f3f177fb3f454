"""GGUF metadata is not trusted: wrong types, lengths and ids are named."""

import pytest

from freehold.errors import BadFile, UnsupportedModel
from freehold.text.gguf_vocabulary import RULES
from freehold.text.tokenizer import BYTE_OF, Tokenizer

TOKENS = [*BYTE_OF, "ab", "<|im_end|>", "<tag>", "[PAD]"]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [*[1] * 257, 3, 4, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 257,
    "tokenizer.ggml.bos_token_id": 0,
}


def _changed(**changes):
    return {**METADATA, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}


def test_control_and_user_tokens_are_recognised_and_unused_ones_are_not():
    tokenizer = Tokenizer.from_gguf(METADATA)
    assert tokenizer.encode("ab<|im_end|><tag>") == [256, 257, 258]
    assert tokenizer.decode(tokenizer.encode("ab[PAD]<tag>")) == "ab[PAD]<tag>"
    assert 259 not in tokenizer.encode("[PAD]")
    assert tokenizer.stop_ids == {257}


def test_decoding_restores_every_byte():
    tokenizer = Tokenizer.from_gguf(METADATA)
    assert b"".join(map(tokenizer.token_bytes, range(256))) == bytes(BYTE_OF.values())


@pytest.mark.parametrize(("pre", "adds"), [("qwen2", False), ("smollm", False), ("llama-bpe", True), ("pixtral", True)])
def test_bos_follows_the_rule_unless_the_file_says(pre, adds):
    assert Tokenizer.from_gguf(_changed(pre=pre)).adds_bos == adds
    assert Tokenizer.from_gguf(_changed(pre=pre, add_bos_token=not adds)).adds_bos != adds


def test_without_pre_the_rule_is_that_of_gpt2():
    without = {key: value for key, value in METADATA.items() if key != "tokenizer.ggml.pre"}
    text = "ab 123  ab"
    assert Tokenizer.from_gguf(without).encode(text) == Tokenizer.from_gguf(_changed(pre="gpt-2")).encode(text)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 1234", " ", " helloWorld", ".\n"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", " ", " helloWorld", ".\n"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", " ", " helloWorld", ".\n"]),
        ("llama-bpe", ["I", "'m", " ", "123", "4", " ", " helloWorld", ".\n"]),
        ("pixtral", ["I", "'m", " ", "123", "4", " ", " helloWorld", ".\n"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", " ", " hello", "World", ".\n"]),
    ],
)
def test_each_pre_splits_text_its_own_way(pre, pieces):
    text = "I'm 1234  helloWorld.\n"
    core = Tokenizer.from_gguf(_changed(pre=pre))._core
    spans = [span for _, span in core.pre_tokenizer.pre_tokenize_str(text)]
    if pre in ("gpt-2", "smollm"):  # these keep line ends apart from signs
        pieces = [*pieces[:-1], ".", "\n"]
    assert [text[start:end] for start, end in spans] == pieces


def test_an_unknown_pre_names_the_known_ones():
    with pytest.raises(UnsupportedModel, match=r"'new'; known are gpt-2, .*tekken"):
        Tokenizer.from_gguf(_changed(pre="new"))
    assert "qwen2" in RULES


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "llama"}, UnsupportedModel, "model is 'llama'"),
        ({"pre": ["qwen2"]}, UnsupportedModel, "pre is"),
        ({"add_eos_token": True}, UnsupportedModel, "add_eos_token"),
        ({"tokens": None}, BadFile, "tokens is not a list"),
        ({"tokens": []}, BadFile, "0 entries"),
        ({"tokens": [1, 2]}, BadFile, "tokens is not a list"),
        ({"tokens": [*TOKENS[:-1], "a"]}, BadFile, "twice"),
        ({"token_type": [1]}, BadFile, "1 entries for 260"),
        ({"token_type": [True] * 260}, BadFile, "kinds"),
        ({"token_type": [7] * 260}, BadFile, "kinds"),
        ({"merges": ["ab"]}, BadFile, "'ab'"),
        ({"merges": ["a b c"]}, BadFile, "'a b c'"),
        ({"merges": ["a zz"]}, BadFile, "do not fit"),
        ({"eos_token_id": 260}, BadFile, "eos_token_id is 260"),
        ({"eos_token_id": -1}, BadFile, "eos_token_id is -1"),
        ({"bos_token_id": True}, BadFile, "bos_token_id"),
        ({"add_bos_token": "yes"}, BadFile, "add_bos_token"),
    ],
)
def test_wrong_metadata_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(_changed(**changes))
