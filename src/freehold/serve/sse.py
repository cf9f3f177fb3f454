"""How answers reach a client, and what happens when it goes away: its request ends at once.

Belongs here: streams of server-sent events, and whole answers that are waited for. Not here: what is in them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from freehold.serve.configuration import ServeSettings
from freehold.serve.errors import error_body, failure_of, request_id_of

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
# Unicode's line ends, which JSON leaves as they are and which many clients take for the end of a line.
LINE_ENDS = {chr(code).encode(): f"\\u{code:04x}".encode() for code in (0x85, 0x2028, 0x2029)}

Result = TypeVar("Result")


def data_line(value: Any) -> bytes:
    """Return a value as an event without a name. What JSON has no number for is null."""
    written = to_json(value, inf_nan_mode="null")
    if not written.isascii():
        for line_end, escape in LINE_ENDS.items():
            written = written.replace(line_end, escape)
    return b"data: %b\n\n" % written


def event_line(name: str, value: Any) -> bytes:
    """Return a value as an event with a name."""
    return b"event: %b\n%b" % (name.encode(), data_line(value))


class EventStream(Response):
    """A response of events. They are closed as soon as they are sent, or the client is gone.

    It begins with the first event, so that an error before that is a response with its own status; or with a comment,
    where the first event is long in coming. What fails later ends the stream with an event that says so.

    events: whole events, as `data_line` makes them. Closing it has to end what it stands for.
    error_line: makes an event of the JSON of an error, in the shape of the API.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        settings: ServeSettings,
        error_line: Callable[[dict[str, Any]], bytes] = data_line,
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._settings, self._error_line = events, settings, error_line
        self._is_started = False
        self._sending = asyncio.Lock()
        self._last_sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(scope, send))
        watching = [asyncio.create_task(until_gone(receive)), asyncio.create_task(self._keep_alive(send))]
        try:
            await asyncio.wait([writing, *watching], return_when=asyncio.FIRST_COMPLETED)
            is_gone = not writing.done()
        finally:
            await _end([writing, *watching])
            await self._events.aclose()
        if not is_gone:
            writing.result()
        elif not self._is_started:
            raise ClientDisconnect

    async def _write(self, scope: Scope, send: Send) -> None:
        try:
            async for event in self._events:
                await self._send(send, event)
        except Exception as error:
            if not self._is_started:
                raise
            failure, request_id = failure_of(error), request_id_of(scope)
            scope["state"]["failure"] = failure  # for the log of requests
            if failure.status == 500:
                logger.exception("request %s failed in its stream", request_id)
            body = error_body(scope["path"], failure, request_id)
            await self._send(send, self._error_line(body))
        await self._send(send, b"", ends=True)

    async def _send(self, send: Send, event: bytes, *, ends: bool = False) -> None:
        async with self._sending:
            if not self._is_started:
                self._is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": not ends})
            self._last_sent_s = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Send comments while nothing else is sent."""
        while True:
            await asyncio.sleep(self._settings.keep_alive_s)
            is_idle = time.monotonic() - self._last_sent_s >= self._settings.keep_alive_s
            if is_idle and not self._sending.locked():
                await self._send(send, KEEP_ALIVE)


async def until_gone(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what some work returns; it is cancelled as soon as the client is gone.

    Raises: ClientDisconnect then.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end([working, gone])


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
