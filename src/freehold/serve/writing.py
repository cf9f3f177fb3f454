"""An answer on its way out, for the dialects whose streams are events that tell how an answer grows.

Streamed and whole are made by the same object from the same deltas, so they agree. Not here: what the events are.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request

from freehold.serve.answers import Delta
from freehold.serve.configuration import ServeSettings
from freehold.serve.sse import EventStream, event_line, while_connected

Event = dict[str, Any]  # its type is its name, too
Deltas = AsyncGenerator[tuple[int, Delta], None]  # of one answer: their place is always 0


class Writing(Protocol):
    """An answer while it is written."""

    def start(self) -> list[Event]:
        """Return the events that come before all others."""

    def take(self, delta: Delta) -> list[Event]:
        """Return the events that a delta makes."""

    def answer(self) -> dict[str, Any]:
        """Return the answer as it stands; whole after the last delta."""

    def fail(self, body: dict[str, Any]) -> list[Event]:
        """Return the events that end an answer which failed under way; body is the error as a response has it."""


def streamed(writing: Writing, deltas: Deltas, settings: ServeSettings) -> EventStream:
    """Return an answer as a response of events."""

    def error_line(body: dict[str, Any]) -> bytes:
        return b"".join(_line(event) for event in writing.fail(body))

    return EventStream(_lines(writing, deltas), settings=settings, error_line=error_line)


async def whole(writing: Writing, deltas: Deltas, request: Request) -> dict[str, Any]:
    """Return an answer when it is done. Raises: ClientDisconnect where nobody waits for it any more."""

    async def write() -> dict[str, Any]:
        async with aclosing(deltas):
            async for _, delta in deltas:
                writing.take(delta)
        return writing.answer()

    return await while_connected(request, write())


async def _lines(writing: Writing, deltas: Deltas) -> AsyncGenerator[bytes, None]:
    """Yield an answer as events. The first comes with the first delta: what fails before has a status of its own."""
    is_started = False
    async with aclosing(deltas):
        async for _, delta in deltas:
            events = ([] if is_started else writing.start()) + writing.take(delta)
            is_started = True
            for event in events:
                yield _line(event)


def _line(event: Event) -> bytes:
    return event_line(event["type"], event)
