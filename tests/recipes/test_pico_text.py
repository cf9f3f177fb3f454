"""The text that freehold-pico learns from: made by number, whole, in the format of its family."""

import json
import re
import sys
from itertools import chain
from pathlib import Path

import pytest

from freehold.checkpoint.text_side import text_side_of_folder
from freehold.train.chat_examples import ChatRenderer, Supervision

ROOM = Path(__file__).parents[2] / "examples" / "pico"
NUM_ROWS = 2000
# A choice or a word that was not filled in, an article before the wrong letter, two blanks, a small letter in front.
UNFINISHED = re.compile(r"[$|\[\]]|\ba [aio]\w|\ban [^aeiouAEIOU]|  |[.!?] [a-z]\w* [a-z]")


@pytest.fixture(scope="module")
def room():
    """Return the modules of the example, which is no part of the package."""
    sys.path.insert(0, str(ROOM))
    import conversations
    import grammar
    import tokenizer

    yield conversations, grammar, tokenizer
    sys.path.remove(str(ROOM))


def test_a_row_is_the_same_whenever_its_number_is_asked_for(room):
    conversations, *_ = room
    for row_of in (conversations.text_row, conversations.chat_row):
        assert [row_of(number) for number in range(20)] == [row_of(number) for number in range(20)]
        assert row_of(1) != row_of(2) != row_of(-1)


def test_no_sentence_is_left_unfinished(room):
    conversations, *_ = room
    answers = (row["messages"][1::2] for row in map(conversations.chat_row, range(NUM_ROWS)))
    said = [message["content"] for message in chain.from_iterable(answers)]
    said += [conversations.text_row(number)["text"] for number in range(NUM_ROWS)]
    assert [text for text in said if UNFINISHED.search(text) or not text.isascii()] == []
    assert {text[-1] for text in said} <= set('.!?"')


def test_every_story_names_its_hero_and_has_several_forms_for_each_sentence(room):
    _, grammar, _ = room
    assert len(grammar.plots()) > 30
    for plot in grammar.plots():
        (_, first), *rest = plot.lines
        assert all("$who" in form or "$kind" in form for form in first), plot.themes
        assert all("$name" in form for form in first), plot.themes
        assert sum(len(forms) >= 2 for _, forms in rest) >= len(rest) - 1, plot.themes


def test_a_conversation_is_turns_of_a_user_and_the_assistant(room):
    conversations, *_ = room
    for number in range(NUM_ROWS):
        messages = conversations.chat_row(number)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in messages[1::2])


@pytest.fixture(scope="module")
def text_side(room, tmp_path_factory):
    """Return the text side of a tokenizer that was trained on some rows."""
    conversations, _, tokenizer = room
    folder = tmp_path_factory.mktemp("pico")
    rows = (conversations.chat_row(number) for number in range(200))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(tokenizer.train([folder / "chats.jsonl"]), folder / "tokenizer")
    return text_side_of_folder(folder / "tokenizer", "nemotron")


def test_the_first_ids_are_nemotrons_special_tokens(text_side):
    wanted = {
        "<s>": 1,
        "</s>": 2,
        "<|im_start|>": 10,
        "<|im_end|>": 11,
        "<think>": 12,
        "</think>": 13,
        "<tool_call>": 14,
    }
    assert {text: text_side.tokenizer.token_id(text) for text in wanted} == wanted
    assert text_side.tokenizer.stop_ids == {2, 11}
    assert text_side.dialect.name == "nemotron"


def test_an_answer_begins_behind_empty_reasoning_and_is_what_is_trained_on(room, text_side):
    conversations, *_ = room
    renderer = ChatRenderer(text_side.template, text_side.tokenizer, Supervision())
    messages = conversations.chat_row(0)["messages"]
    (example,) = renderer.examples(messages, None)
    assert (example.num_answers, example.num_joined) == (len(messages) // 2, 0)
    learnt = text_side.tokenizer.decode(
        id for id, is_learnt in zip(example.ids, example.trained, strict=True) if is_learnt
    )
    assert learnt == "".join(f"{message['content']}<|im_end|>" for message in messages[1::2])
    prompt = text_side.template.render(messages[:1])
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n<think></think>")
    assert text_side.template.accepts_tools
