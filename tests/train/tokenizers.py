"""Tokenizers and templates of the three families for tests of data.

Nemotron's own tokenizer cannot be had; one with its marks is made.
"""

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from text import witnesses

FAMILIES = ("llama", "qwen", "nemotron")
MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")


def write_nemotron_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of bytes that knows the marks of Nemotron's format as single tokens, unless it is there."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return folder


def tokenizer_of(family: str, folder: Path) -> Tokenizer:
    if family == "nemotron":
        return Tokenizer.from_files(write_nemotron_tokenizer(folder))
    tokenizer = witnesses.tokenizer_of(family)
    assert tokenizer is not None
    return tokenizer


def template_of(family: str) -> ChatTemplate:
    return witnesses.template_of(family)
