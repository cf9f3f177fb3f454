"""What is counted while rows become tokens: what a person wants to know of data before training on it."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over rows.

    rows: read. documents: kept, of which a conversation may give several (split_rows: conversations that did).
    untrained_rows: left out, for nothing in them is trained on. tokens, trained_tokens: of what was kept.
    bos: BOS tokens. eos: tokens that end a text or a turn. answers: turns of the assistant that are trained on.
    joined_answers: those before which serving would give other ids. inner_ends: ends of a turn inside an answer.
    unwritten_reasoning: turns whose reasoning the template does not write.
    """

    rows: int = 0
    documents: int = 0
    split_rows: int = 0
    untrained_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    bos: int = 0
    eos: int = 0
    answers: int = 0
    joined_answers: int = 0
    inner_ends: int = 0
    unwritten_reasoning: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})
