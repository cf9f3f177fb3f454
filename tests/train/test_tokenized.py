"""Rows in tokens: one BOS and one EOS where they belong, and rows that cannot be used by their place."""

import pytest

from freehold.errors import BadInput, UnsupportedModel
from freehold.train.chat_examples import Supervision
from freehold.train.documents import ChatRow, TextRow
from freehold.train.tokenized import DocumentTokenizer
from text.conversations import ANSWER, ASK
from train.tokenizers import template_of, tokenizer_of

PAGE = TextRow(where="a.jsonl, line 3", text="A page, no more.")
CHAT = ChatRow(where="a.jsonl, line 4", messages=[ASK, ANSWER, ASK, ANSWER])


def converter_of(family, folder) -> DocumentTokenizer:
    return DocumentTokenizer(tokenizer_of(family, folder), template_of(family), Supervision())


@pytest.mark.parametrize("row", [PAGE, CHAT], ids=["text", "conversation"])
def test_a_document_of_llama_has_one_bos_at_its_beginning(tmp_path, row):
    tokenizer = tokenizer_of("llama", tmp_path)
    (document,), counts = converter_of("llama", tmp_path).documents(row)
    assert counts.bos == document.ids.count(tokenizer.bos_id) == 1
    assert document.ids[0] == tokenizer.bos_id
    assert not document.trained[0]


def test_a_second_bos_is_refused(tmp_path):
    row = ChatRow(where="a.jsonl, line 9", messages=[{**ASK, "content": "<|begin_of_text|>Hello"}, ANSWER])
    with pytest.raises(BadInput, match=r"a.jsonl, line 9: 2 BOS tokens where one is wanted"):
        converter_of("llama", tmp_path).documents(row)


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_text_is_trained_on_to_its_eos(tmp_path, family):
    tokenizer = tokenizer_of(family, tmp_path)
    (document,), counts = converter_of(family, tmp_path).documents(PAGE)
    assert document.ids[-1] == tokenizer.eos_id
    assert counts.eos == 1
    assert document.is_whole
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    assert list(document.ids) == [*begin, *tokenizer.encode_plain(PAGE.text), tokenizer.eos_id]


def test_a_conversation_for_a_model_without_a_template_is_refused(tmp_path):
    converter = DocumentTokenizer(tokenizer_of("qwen", tmp_path), None, Supervision())
    assert converter.documents(PAGE)[1].documents == 1
    with pytest.raises(UnsupportedModel, match=r"a.jsonl, line 4: .* no chat template"):
        converter.documents(CHAT)
