"""A request while it runs: what is known of it, what of that is computed, and what it owns. No torch."""

from collections import deque
from dataclasses import dataclass, field

from freehold.engine.request import Request


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A request that the scheduler has.

        known      prompt | answer          grows by a token when all that is known has been computed
        computed   ------------>            what the states hold; back to 0 when the sequence is preempted

    number: unique, and in order of submission. runs_alone: something it was computed with failed, so that now it is
        computed by itself, and fails alone.
    """

    number: int
    request: Request
    num_tokens: int  # of the answer, at most
    submitted_s: float
    known: list[int] = field(init=False)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    runs_alone: bool = False
    was_preempted: bool = False

    def __post_init__(self) -> None:
        self.known = list(self.request.prompt)
        self.reasoning = Reasoning(self) if self.request.reasoning else None
        self.matcher = self.request.grammar.start() if self.request.grammar else None

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def answer_length(self) -> int:
        return len(self.known) - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        return len(self.known) - self.num_computed

    @property
    def is_running(self) -> bool:
        return self.slot is not None

    def accept(self, drawn: int) -> int:
        """Add the next token of the answer, the drawn one unless the reasoning's budget wants another; return it."""
        token = self.reasoning.next_token(drawn) if self.reasoning else drawn
        self.known.append(token)
        if self.matcher:
            self.matcher.accept(token)
        return token

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing more to compute."""
        if self.request.embeds:
            return self.num_uncomputed == 0
        return self.has_stopped or self.answer_length >= self.num_tokens

    @property
    def has_stopped(self) -> bool:
        """Whether the answer's last token is a stop id."""
        return self.answer_length > 0 and self.known[-1] in self.request.end_ids

    @property
    def must_go_on(self) -> bool:
        """Whether the next token may not be a stop id: a longer answer is wanted, or there would be none at all."""
        if self.matcher and self.matcher.is_complete:
            return False
        is_short = self.answer_length < self.request.sampling.min_tokens
        return is_short or (self.reasoning is not None and self.reasoning.has_just_closed)


class Reasoning:
    """The budget of one answer's reasoning, and the tokens that it forces."""

    def __init__(self, sequence: Sequence):
        assert sequence.request.reasoning is not None, "a budget was given"
        self._budget = sequence.request.reasoning
        self._sequence = sequence
        self._is_open = self._budget.is_open
        self._num_tokens = 0
        self._forced: deque[int] = deque()
        self.has_just_closed = False

    def next_token(self, drawn: int) -> int:
        """Return what comes next in the answer where this token was drawn."""
        if not self._is_open:
            self.has_just_closed = self.has_just_closed and drawn in self._budget.newline_ids
            self._open_after(drawn)
            return drawn
        if not self._forced and self._is_at_the_end(drawn):
            self._forced.extend(self._budget.close_ids)
        token = self._forced.popleft() if self._forced else drawn
        self._num_tokens += 1
        if self._ends_with(self._budget.close_ids, token):
            self._is_open, self.has_just_closed = False, True
        elif not self._forced and self._num_tokens >= self._budget.num_tokens and token in self._budget.newline_ids:
            self._forced.extend(self._budget.close_ids)
        return token

    def _is_at_the_end(self, drawn: int) -> bool:
        budget, sequence = self._budget, self._sequence
        left = sequence.num_tokens - sequence.answer_length - len(budget.close_ids)
        is_late = self._num_tokens >= budget.num_tokens + budget.grace_tokens or left <= budget.answer_tokens
        return is_late or drawn in sequence.request.end_ids

    def _open_after(self, token: int) -> None:
        if self._sequence.answer_length + 1 == len(self._budget.open_ids):
            self._is_open = self._ends_with(self._budget.open_ids, token)

    def _ends_with(self, ids: tuple[int, ...], token: int) -> bool:
        """Return whether the answer with this token added ends with some ids."""
        num_before = len(ids) - 1
        if self._sequence.answer_length < num_before:
            return False
        known = self._sequence.known
        return (*known[len(known) - num_before :], token) == ids
