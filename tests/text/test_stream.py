"""Streams of tokens and stop strings: in pieces or at once, the same text."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import BadRequest
from freehold.text.stream import Detokenizer, StopStrings, held_length
from freehold.text.tokenizer import Tokenizer
from text.hard_strings import HARD_STRINGS
from text.test_gguf_vocabulary import METADATA
from text.witnesses import tokenizer_of

TINY = Tokenizer.from_gguf(METADATA)


def _streamed(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    pieces = [*map(stream.add, ids), stream.finish()]
    return pieces


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=30))
def test_joined_pieces_equal_the_whole_for_any_ids(ids):
    assert "".join(_streamed(TINY, ids)) == TINY.decode(ids)


@pytest.mark.parametrize("family", ["smollm", "qwen", "llama"])
def test_no_piece_of_valid_text_is_half_a_character(family):
    tokenizer = tokenizer_of(family)
    for text in HARD_STRINGS.values():
        pieces = _streamed(tokenizer, tokenizer.encode_plain(text))
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode_plain(text))


def test_text_that_ends_inside_a_character_says_so_at_the_end():
    ids = TINY.encode_plain("é")[:-1]
    assert _streamed(TINY, ids) == ["", "\ufffd"]


def _stopped(text, stops, cuts=()):
    found = StopStrings(stops)
    shown = [found.feed(text[start:end]) for start, end in pairwise([0, *sorted(cuts), len(text)])]
    return "".join([*shown, found.finish()]), found.matched


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole, matched = _stopped(text, stops)
    assert _stopped(text, stops, cuts) == (whole, matched)
    assert text.startswith(whole + (matched or ""))
    assert not any(stop in whole for stop in stops)
    assert matched or whole == text


def test_the_stop_that_is_complete_first_wins_and_then_the_longest():
    assert _stopped("xabcd", ["abcd", "bc"]) == ("xa", "bc")
    assert _stopped("xabc", ["bc", "abc"]) == ("x", "abc")


def test_nothing_is_held_back_that_cannot_become_a_stop():
    found = StopStrings(["</end>"])
    assert found.feed("a < b </en") == "a < b "
    assert found.feed("x") == "</enx"
    assert found.feed("</end>later") == ""
    assert found.feed("more") == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(BadRequest, match="empty"):
        StopStrings(["", "x"])


def test_held_length_is_the_longest_begun_marker():
    assert held_length("ab<th", ("<think>", "<tool>")) == 3
    assert held_length("ab<think>", ("<think>",)) == 0
    assert held_length("", ("<think>",)) == 0
