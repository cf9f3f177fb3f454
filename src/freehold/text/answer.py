"""What a model wrote, split into reasoning, text and tool calls, while it is being written.

One machine serves both uses: a whole answer is a stream of one piece, so streamed and whole cannot differ. How the
marks look is in dialect.py, how a call is read in calls.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freehold.text.calls import JsonStrings, find_mark, opens_call, read_call, schemas_by_name
from freehold.text.dialect import Dialect
from freehold.text.stream import held_length

# Text is taken in pieces of this many characters, so that long answers cost linear time.
CHUNK_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """Some of the text for the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ReasoningPiece:
    """Some of the model's reasoning."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ToolCallPiece:
    """One whole call; its arguments are a JSON object in a string."""

    id: str
    name: str
    arguments: str


Piece = TextPiece | ReasoningPiece | ToolCallPiece


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer, split."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCallPiece, ...]


class AnswerParser:
    """Splits an answer as it comes. The pieces, joined, do not depend on how the text was cut.

    Reasoning is what stands between the think marks at the beginning, or before the closing one where the prompt has
    opened it. Calls are looked for only if the request gave tools; what looks like a call but cannot be read as one is
    text, with its marks. Where calls are JSON, a closing mark within a string of theirs is a part of it. The line ends
    between reasoning, text and calls are dropped, nothing else is.
    """

    def __init__(self, dialect: Dialect, *, tools: Sequence[Mapping[str, Any]] = (), prompt: str = "") -> None:
        self._dialect = dialect
        self._schemas = schemas_by_name(tools)
        self._num_calls = 0
        self._mode = self._in_reasoning if dialect.is_reasoning_after(prompt) else self._at_start
        self._held = ""
        self._is_fresh = True  # in reasoning and text: no character yet, so line ends are dropped
        self._call_head = ""  # what to show before the body of a call that cannot be read
        self._call_parts: list[str] = []
        self._call_strings: JsonStrings | None = None  # of a call that may be JSON up to its closing mark

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._mode == self._in_reasoning

    def feed(self, text: str) -> list[Piece]:
        """Return what this text completes."""
        pieces: list[Piece] = []
        for start in range(0, len(text), CHUNK_CHARS):
            self._advance(self._held + text[start : start + CHUNK_CHARS], pieces, is_final=False)
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was kept back. A call whose closing mark is missing is a call if the rest can be read."""
        pieces: list[Piece] = []
        self._advance(self._held, pieces, is_final=True)
        return pieces

    def _advance(self, text: str, pieces: list[Piece], *, is_final: bool) -> None:
        mode: Callable[[str, list[Piece], bool], str] | None = None
        while mode != self._mode:
            mode = self._mode
            text = mode(text, pieces, is_final)
        self._held = text

    # Each mode takes the text not yet used, adds pieces, may choose the next mode, and returns what it leaves unused.

    def _at_start(self, text: str, pieces: list[Piece], is_final: bool) -> str:
        head = text.lstrip()
        think_open = self._dialect.think_open
        if self._dialect.reasons and head.startswith(think_open):
            self._mode = self._in_reasoning
            return head[len(think_open) :]
        is_call: bool | None = False
        if self._dialect.call_format == "bare json" and self._schemas:
            is_call = opens_call(head, self._schemas)
        may_reason = self._dialect.reasons and think_open.startswith(head)
        if is_call:
            self._open_call(text[: len(text) - len(head)])
            return head
        if is_final or not (may_reason or is_call is None):
            self._mode, self._is_fresh = self._in_text, False
        return text

    def _in_reasoning(self, text: str, pieces: list[Piece], is_final: bool) -> str:
        close = self._dialect.think_close
        body, found, rest = self._without_line_ends(text).partition(close)
        if found:
            self._mode, self._is_fresh = self._in_text, True
            self._show(ReasoningPiece, body.rstrip("\n"), pieces)
            return rest
        shown = body if is_final else _settled(body, close)
        self._show(ReasoningPiece, shown, pieces)
        return body[len(shown) :]

    def _in_text(self, text: str, pieces: list[Piece], is_final: bool) -> str:
        text = self._without_line_ends(text)
        body, found, rest = text.partition(self._dialect.call_open) if self._schemas else (text, "", "")
        if found:
            before = body.rstrip("\n")
            self._show(TextPiece, before, pieces)
            self._open_call(body[len(before) :] + found)
            return rest
        shown = body if is_final or not self._schemas else _settled(body, self._dialect.call_open)
        self._show(TextPiece, shown, pieces)
        return body[len(shown) :]

    def _in_call(self, text: str, pieces: list[Piece], is_final: bool) -> str:
        close, strings = self._dialect.call_close or "", self._call_strings
        found = strings.find(text) if strings else find_mark(text, close)
        if found is None or (is_final and strings and strings.is_inside):
            text = "".join(self._call_parts) + text
            self._call_parts, self._call_strings = [], None  # it is no JSON: its first closing mark ends it
            return self._in_call(text, pieces, is_final)
        end, decided = found
        if end < 0 and not is_final:
            self._call_parts.append(text[:decided])
            return text[decided:]
        body, mark, rest = (text[:end], close, text[end + len(close) :]) if end >= 0 else (text, "", "")
        self._call_parts.append(body)
        self._mode = self._in_text
        self._close_call(mark, pieces)
        return rest

    def _open_call(self, head: str) -> None:
        self._mode, self._call_head, self._call_parts = self._in_call, head, []
        close = self._dialect.call_close
        self._call_strings = JsonStrings(close) if close and self._dialect.call_format == "json" else None

    def _close_call(self, close: str, pieces: list[Piece]) -> None:
        body = "".join(self._call_parts)
        call = read_call(body, self._dialect.call_format, self._schemas)
        if call is None:
            self._show(TextPiece, self._call_head + body + close, pieces)
        else:
            call_id = f"call_{self._num_calls}"
            pieces.append(ToolCallPiece(id=call_id, name=call.name, arguments=call.arguments))
            self._num_calls += 1
        self._is_fresh = call is not None

    def _without_line_ends(self, text: str) -> str:
        """Return the text without line ends at its beginning, as long as nothing else has come."""
        text = text.lstrip("\n") if self._is_fresh else text
        self._is_fresh = self._is_fresh and not text
        return text

    def _show(self, kind: type[TextPiece] | type[ReasoningPiece], text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(kind(text=text))


def parse_answer(
    dialect: Dialect,
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    prompt: str = "",
) -> Answer:
    """Return a whole answer, split. The prompt tells whether the answer begins inside the reasoning."""
    parser = AnswerParser(dialect, tools=tools, prompt=prompt)
    return join_pieces([*parser.feed(text), *parser.finish()])


def join_pieces(pieces: Sequence[Piece]) -> Answer:
    """Return the answer that streamed pieces make."""
    return Answer(
        text="".join(piece.text for piece in pieces if isinstance(piece, TextPiece)),
        reasoning="".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)),
        tool_calls=tuple(piece for piece in pieces if isinstance(piece, ToolCallPiece)),
    )


def _settled(text: str, marker: str) -> str:
    """Return the text without the end that may belong to a marker: its beginning, and the line ends before it."""
    return text[: len(text) - held_length(text, (marker,))].rstrip("\n")
