"""Rows become documents in tokens: a text as it is, a conversation as the model's template writes it.

What a file of rows looks like is in documents.py; how a conversation is rendered and masked, in chat_examples.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from freehold.errors import BadInput, BadRequest, BadTemplate, UnsupportedModel
from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from freehold.train.chat_examples import ChatRenderer, Supervision
from freehold.train.counts import Counts
from freehold.train.documents import ChatRow, Row, TextRow


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document in tokens.

    ids: also the first token, which nothing foretells. trained: for each id, whether it is trained on.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @cached_property
    def is_whole(self) -> bool:
        """True where all is trained on that can be."""
        return all(self.trained[1:])

    @cached_property
    def first_trained(self) -> int:
        """The first token that is trained on."""
        return self.trained.index(True)


class DocumentTokenizer:
    """Turns rows into documents for one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, supervision: Supervision) -> None:
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(template, tokenizer, supervision) if template else None

    def documents(self, row: Row) -> tuple[list[Document], Counts]:
        """Return the documents of a row, none where nothing in it is trained on, and what was counted.

        Raises: BadInput, naming the row.
        """
        with _at(row.where):
            documents, counts = self._of_text(row) if isinstance(row, TextRow) else self._of_chat(row)
            for document in documents:
                self._check_bos(document)
        return documents, counts + self._counted(documents)

    def _of_text(self, row: TextRow) -> tuple[list[Document], Counts]:
        """Nothing in a text is a special token: a page about chat templates must not end a turn."""
        begin, end = self._tokenizer.bos_id if self._tokenizer.adds_bos else None, self._tokenizer.eos_id
        ids = tuple(self._tokenizer.encode_plain(row.text))
        ids = (*(() if begin is None else (begin,)), *ids, *(() if end is None or not ids else (end,)))
        if len(ids) < 2:
            return [], Counts()
        return [Document(ids=ids, trained=(False, *[True] * (len(ids) - 1)))], Counts()

    def _of_chat(self, row: ChatRow) -> tuple[list[Document], Counts]:
        if self._renderer is None:
            raise UnsupportedModel("a conversation, and the model has no chat template")
        examples = self._renderer.examples(row.messages, row.tools)
        counts = Counts(
            split_rows=int(len(examples) > 1),
            answers=sum(example.num_answers for example in examples),
            joined_answers=sum(example.num_joined for example in examples),
            inner_ends=sum(example.num_inner_ends for example in examples),
            unwritten_reasoning=sum(example.num_unwritten for example in examples),
        )
        return [Document(ids=example.ids, trained=example.trained) for example in examples], counts

    def _check_bos(self, document: Document) -> None:
        """Refuse a second BOS, which makes a model of this tokenizer answer worse. Some write one before each turn."""
        bos_id = self._tokenizer.bos_id
        count = document.ids.count(bos_id) if self._tokenizer.adds_bos and bos_id is not None else 0
        if count > 1:
            raise BadInput(f"{count} BOS tokens where one is wanted", hint="take the BOS out of the data's own text")

    def _counted(self, documents: list[Document]) -> Counts:
        stops, bos_id = self._tokenizer.stop_ids, self._tokenizer.bos_id
        return Counts(
            rows=1,
            documents=len(documents),
            untrained_rows=int(not documents),
            tokens=sum(len(document.ids) for document in documents),
            trained_tokens=sum(sum(document.trained) for document in documents),
            bos=sum(document.ids.count(bos_id) for document in documents if bos_id is not None),
            eos=sum(token in stops for document in documents for token in document.ids),
        )


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say of what cannot be used in which row it is."""
    try:
        yield
    except (BadRequest, BadTemplate) as error:
        raise BadInput(f"{where}: {error.message}", hint=error.hint) from None
    except BadInput as error:
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from None
