"""Answers that say what a test has written down, for a server that is real in all else (servers.py)."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

from freehold.serve.answers import AnswerUsage, Chat, Delta, Options, Prompt
from freehold.serve.caller import Caller
from freehold.text.answer import Piece, ReasoningPiece, TextPiece, ToolCallPiece
from freehold.text.messages import checked_messages, checked_tools

NUM_PROMPT_TOKENS = 7


class ScriptedAnswers:
    """Stands for serve.answers.Answers: checks conversations as templates do, and answers with the deltas it was given.

    An exception among them is raised in its turn; None stands for an answer that does not go on. chats, options: what
    was asked. begun, closed: set when an answer has begun, and when it has ended, in whatever way.
    """

    model_name = "scripted"
    engine = None

    def __init__(self, *script: Delta | Exception | None, reasons: bool = True):
        self.script, self.reasons = script, reasons
        self.chats: list[Chat] = []
        self.options: list[Options] = []
        self.begun, self.closed = threading.Event(), threading.Event()

    async def read_chat(self, chat: Chat) -> Prompt:
        checked_messages(chat.messages)
        checked_tools(chat.tools)
        self.chats.append(chat)
        return Prompt(ids=tuple(range(NUM_PROMPT_TOKENS)), text="", tools=chat.tools)

    async def stream(
        self, asked: Sequence[tuple[Prompt, Options]], caller: Caller
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        self.options += [options for _, options in asked]
        self.begun.set()
        try:
            for delta in self.script:
                if delta is None:
                    await asyncio.Event().wait()
                elif isinstance(delta, Exception):
                    raise delta
                else:
                    for place in range(len(asked)):
                        yield place, delta
        finally:
            self.closed.set()


def said(*pieces: Piece, **end: object) -> Delta:
    """Return a delta with some pieces."""
    return Delta(pieces=pieces, **end)


def text(words: str) -> TextPiece:
    return TextPiece(text=words)


def reasoning(words: str) -> ReasoningPiece:
    return ReasoningPiece(text=words)


def call(name: str, arguments: str, number: int = 0) -> ToolCallPiece:
    return ToolCallPiece(id=f"call_{number}", name=name, arguments=arguments)


def ended(*pieces: Piece, reason: str = "stop", num_reasoning: int = 0, stop_sequence: str | None = None) -> Delta:
    """Return a last delta, of an answer of 5 tokens."""
    usage = AnswerUsage(prompt_tokens=NUM_PROMPT_TOKENS, completion_tokens=5, reasoning_tokens=num_reasoning)
    return Delta(pieces=pieces, finish_reason=reason, stop_sequence=stop_sequence, usage=usage)


# What models do, by name.
SCRIPTS: dict[str, tuple[Delta, ...]] = {
    "text": (said(text("Hel")), said(text("lo"), text(" you")), ended()),
    "nothing": (ended(),),
    "all at once": (ended(text("Hello")),),
    "reasoning": (said(reasoning("Let me")), said(reasoning(" see."), text("42")), ended(text("!"), num_reasoning=3)),
    "reasoning alone": (said(reasoning("Let me")), ended(reason="length", num_reasoning=5)),
    "calls": (
        said(reasoning("Two.")),
        said(text("I ask.")),
        said(call("weather", '{"city": "Graz"}'), call("weather", "{}", 1)),
        ended(reason="tool_calls"),
    ),
    "text after a call": (said(call("clock", '{"é": [1, null]}')), ended(text("Now."), reason="tool_calls")),
    "cut": (said(text("Hel")), ended(text("lo"), reason="length")),
    "stop sequence": (said(text("one, ")), ended(text("two"), stop_sequence="three")),
}


class Stage:
    """Stands for the answers that a test wants just now, so that one server does for all tests of a file."""

    model_name = "scripted"
    engine = None

    def __init__(self) -> None:
        self.url = ""
        self.playing: ScriptedAnswers | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.playing, name)
