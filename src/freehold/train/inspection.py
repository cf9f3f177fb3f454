"""A look at data before training on it: what of it is trained on, what is cut, and what was counted.

How it is shown is the command line's (cli/data.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf

from freehold.errors import BadInput
from freehold.ops.loss import IGNORED
from freehold.text.tokenizer import Tokenizer
from freehold.train.batch import Example
from freehold.train.build import NOTHING_TRAINED
from freehold.train.counts import Counts
from freehold.train.dataset import Dataset, Sequences
from freehold.train.documents import Row
from freehold.train.tokenized import Document, DocumentTokenizer

Run = tuple[str, bool]  # a piece of text, and whether it is trained on


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was seen. shown: the first documents, in runs. num_cut, num_left_out: of conversations, at some length."""

    counts: Counts
    shown: tuple[tuple[Run, ...], ...]
    num_cut: int = 0
    num_left_out: int = 0


def inspect_rows(
    rows: Iterable[Row],
    converter: DocumentTokenizer,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    num_shown: int,
) -> Inspection:
    """Return what rows would be as a data set. Raises: BadInput at the first row that cannot be used, or if all are
    without anything to train on.
    """
    counts, shown, num_cut, num_left_out = Counts(), list[Document](), 0, 0
    limit = inf if max_tokens is None else max_tokens
    for row in rows:
        documents, more = converter.documents(row)
        counts += more
        shown += documents[: num_shown - len(shown)]
        for document in documents:
            is_left_out = document.first_trained > limit
            num_left_out += is_left_out
            num_cut += not document.is_whole and not is_left_out and len(document.ids) - 1 > limit
    if not counts.documents:
        raise BadInput(NOTHING_TRAINED)
    runs = tuple(runs_of(tokenizer, document.ids, document.trained) for document in shown)
    return Inspection(counts=counts, shown=runs, num_cut=num_cut, num_left_out=num_left_out)


def inspect_dataset(dataset: Dataset, tokenizer: Tokenizer, *, max_tokens: int | None, num_shown: int) -> Inspection:
    """Return what a data set holds, each byte of it compared with its digest. Raises: BadFile, BadInput."""
    for shard in dataset.shards:
        shard.verify()
    sequences = Sequences(dataset, max_tokens or dataset.counts.tokens)
    examples = [sequences.example(number) for number in range(min(num_shown, len(sequences)))]
    return Inspection(
        counts=dataset.counts,
        shown=tuple(_runs_of_example(tokenizer, example) for example in examples),
        num_cut=sequences.num_cut,
        num_left_out=sequences.num_left_out,
    )


def runs_of(tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool]) -> tuple[Run, ...]:
    """Return tokens as text, in runs that are trained on and runs that are not."""
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return tuple((tokenizer.decode(token for token, _ in run), is_trained) for is_trained, run in runs)


def _runs_of_example(tokenizer: Tokenizer, example: Example) -> tuple[Run, ...]:
    """Return the runs of a sequence: its tokens, and its last label where that is trained on."""
    labels = example.labels_L.tolist()
    ids, trained = example.tokens_L.tolist(), [False, *(label != IGNORED for label in labels)]
    return runs_of(tokenizer, [*ids, labels[-1]] if trained[-1] else ids, trained if trained[-1] else trained[:-1])
