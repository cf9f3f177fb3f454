"""Small runs for tests: texts as a data set, settings that train in a second, and what a run left on the disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.folders import write_tokenizer
from freehold.checkpoint.text_side import text_side_of_folder
from freehold.recipes.pretrain import PretrainSettings
from freehold.recipes.settings import DataSettings
from freehold.train.build import build_dataset
from freehold.train.chat_examples import Supervision
from freehold.train.schedule import Schedule
from models.tiny import LLAMA, Config
from train.data import write_rows

BYTES = {"vocab_size": 256}
TEXTS = [{"text": f"{number} green bottles, hanging on the wall. " * 2} for number in range(8)]


def write_data(folder: Path, rows: Sequence[Any] = TEXTS, *, name: str = "data", tokenizer: Path | None = None) -> Path:
    """Build a data set in a folder, with its tokenizer of bytes or that of another folder."""
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        if not tokenizer.exists():
            tokenizer.mkdir(parents=True)
            write_tokenizer(tokenizer)
    text = text_side_of_folder(tokenizer, "llama")
    assert text.tokenizer is not None
    file = write_rows(folder / f"{name}.jsonl", rows)
    build_dataset([file], folder / name, tokenizer=text.tokenizer, template=text.template, supervision=Supervision())
    return folder / name


def small_data(folder: Path, **more: Any) -> DataSettings:
    """Return settings of the data set that `write_data` made there."""
    sizes = {"sequence_tokens": 64, "budget_tokens": 128, "tokens_per_step": 256}
    return DataSettings(**{"train": (folder / "data",), **sizes, **more})


def pretraining(folder: Path, config: Config = LLAMA, *, total: int = 4, **more: Any) -> PretrainSettings:
    """Return a run of a tiny model on the data set that `write_data` made there."""
    given = {
        "out": folder / "run",
        "tokenizer": folder / "tokenizer",
        "model": config | BYTES,
        "threads": 1,
        "data": small_data(folder),
        "schedule": Schedule(peak=1e-2, total=total),
    }
    return PretrainSettings(**(given | more))
