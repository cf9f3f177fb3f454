"""Small data sets for tests: rows on disk, a tokenizer of bytes, and shards that hold only a few documents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freehold.train.build import build_dataset
from freehold.train.chat_examples import Supervision
from freehold.train.dataset import Dataset
from train.tokenizers import template_of, tokenizer_of


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts(num: int) -> list[dict[str, str]]:
    """Return rows of texts that are all different, from one byte on."""
    return [{"text": f"{number}" + " word" * (number * 7 % 11)} for number in range(num)]


def chats(num: int) -> list[dict[str, Any]]:
    """Return rows of conversations of two or four turns, questions and answers of different lengths."""
    turns = [
        [
            {"role": "user", "content": f"{number}?" + " why" * (number * 5 % 13)},
            {"role": "assistant", "content": f"{number}." + " so" * (number * 3 % 7)},
        ]
        for number in range(num)
    ]
    return [{"messages": turn * (1 + number % 2)} for number, turn in enumerate(turns)]


def build(files: Sequence[Path], folder: Path, *, tokens_per_shard: int = 300, **options: Any) -> Dataset:
    """Build a data set with Nemotron's template and a tokenizer of bytes."""
    made = folder.parent / "tokenizer"
    made.mkdir(exist_ok=True)
    return build_dataset(
        files,
        folder,
        tokenizer=tokenizer_of("nemotron", made),
        template=template_of("nemotron"),
        supervision=options.pop("supervision", Supervision()),
        tokens_per_shard=tokens_per_shard,
        **options,
    )
