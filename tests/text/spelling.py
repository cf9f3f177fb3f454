"""Tokenizers of single bytes, with an end of turn, where marks are tokens or are spelled; and random answers."""

import random
from functools import cache

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from freehold.text.tokenizer import Tokenizer

END = "<|im_end|>"
VALUE_END = "\n</parameter>"
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


@cache
def byte_tokenizer(*, has_marks: bool) -> Tokenizer:
    """Return a tokenizer whose ids below 256 are the places of the bytes in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    core.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS] if has_marks else [])
    end = core.token_to_id(END)
    size = core.get_vocab_size(with_added_tokens=True)
    return Tokenizer(core, vocab_size=size, bos_id=None, eos_id=end, stop_ids=frozenset({end}), adds_bos=False)


def random_answer(matcher, tokenizer: Tokenizer, *, seed: int, eager_after: int = 60) -> str:
    """Return what a model says that draws any id that may come.

    After eager_after tokens it is drawn to what ends things: an end, a mark, the end of a value.
    """
    choose, ids = random.Random(seed), []
    while len(ids) < 4000:
        mask = matcher.allowed()
        allowed = [token for token, may_come in enumerate(mask) if may_come]
        assert allowed, "something may always come"
        if len(ids) >= eager_after and choose.random() < 0.9:
            ends = [token for token in allowed if token >= 256]
            ends += [token for token in _closing(tokenizer, tokenizer.decode(ids[-20:])) if token in allowed]
            allowed = ends[:1] or allowed
        token = choose.choice(allowed)
        if token in tokenizer.stop_ids:
            return tokenizer.decode(ids)
        ids.append(token)
        matcher.accept(token)
    raise AssertionError("it came to no end")


def _closing(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return what goes on with the mark that the text has begun, and what ends JSON."""
    begun = max(length for length in range(len(VALUE_END)) if text.endswith(VALUE_END[:length]))
    return tokenizer.encode_plain(VALUE_END[begun]) + [tokenizer.encode_plain(char)[0] for char in '"}]<']
