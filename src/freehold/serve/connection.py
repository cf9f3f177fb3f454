"""HTTP connections that do not wait for ever, and the options of uvicorn that go with them.

uvicorn gives a client all the time in the world for the head of a request, for the rest of a body that was refused
unread, and for taking its answer. Here all have a deadline, and what is not part of a body has a length that it cannot
exceed. Bodies that are read have their limits in limits.py.
"""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from freehold.engine.engine import Engine


class Connection(HttpToolsProtocol):
    """A connection that is cut when its client takes too long, or sends too much that is no body.

    head_s: from the connection, or the first byte of a further request, to the end of the headers. discard_s: from an
    answer that did not wait for the body to the end of that body. stalled_s: in which nothing is taken of an answer
    that has been written. unread_bytes: of a head, a chunk's extension, trailers. max_pipelined: requests that were
    sent before the answer to another one.
    """

    head_s: ClassVar[float] = 10.0
    discard_s: ClassVar[float] = 10.0
    stalled_s: ClassVar[float] = 60.0
    unread_bytes: ClassVar[int] = 32 * 2**10
    max_pipelined: ClassVar[int] = 8

    _reading: Literal["nothing", "head", "body"] = "nothing"
    _num_unread = 0  # bytes that came since the last end of a head, of a request, or of a piece of a body
    _deadline: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _answered: RequestResponseCycle | None = None  # the request that is answered now; uvicorn's `cycle` came last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        # asyncio does it only where the listening socket names its protocol; without it, small writes wait 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self._num_unread += len(data)
        super().data_received(data)
        if self._num_unread > self.unread_bytes:
            self.transport.abort()
        self._watch()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._reading = "head"

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Trailers are left out: by then the headers have been judged."""
        if self._reading == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Have the request answered. Raises: OverflowError, which the parser makes a 400, where too many wait."""
        self._reading, self._num_unread = "body", 0
        if len(self.pipeline) >= self.max_pipelined:
            raise OverflowError
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._num_unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._reading, self._num_unread = "nothing", 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on after an answer."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Wait for the client to take what has been written."""
        super().pause_writing()
        self._watch_taking()

    def resume_writing(self) -> None:
        """Write on."""
        super().resume_writing()
        self._stop_watch_taking()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_watch()
        self._stop_watch_taking()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Callable[..., Awaitable[None]]) -> None:
        self._answered = cycle

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def send_while_open(message: Any) -> None:
                # uvicorn hears of a lost connection once the loop is free; asyncio warns of each write until then.
                cycle.disconnected = cycle.disconnected or self.transport.is_closing()
                await send(message)

            await app(scope, receive, send_while_open)

        super()._start_asgi_task(cycle, answer)

    def _watch(self) -> None:
        """Keep a deadline while all waits for the client; more bytes do not move it."""
        limit_s = self._limit_s()
        if limit_s is None or self.transport.is_closing():
            self._stop_watch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(limit_s, self.transport.abort)

    def _limit_s(self) -> float | None:
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        if self._reading == "body":
            return self.discard_s
        return self.head_s if self.cycle is None or self._reading == "head" or self._num_unread else None

    def _stop_watch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_taking(self, before: int | None = None) -> None:
        """Look at what is left to be taken, again and again, and cut where that does not shrink from `before`."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._taking = self.loop.call_later(self.stalled_s, self._watch_taking, left)

    def _stop_watch_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None


# For uvicorn.Config. No websockets, nothing believed that a proxy's headers say.
UVICORN_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "http": Connection,
        "ws": "none",
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": 30,
        "limit_concurrency": 1024,
        "backlog": 1024,
    }
)


LAST_WORDS_S = 5  # for what is left to be sent when the engine has stopped; a client that does not take it is cut
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppableServer(uvicorn.Server):
    """A server that does something else first when SIGTERM or Ctrl-C tells it to stop."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]):
        super().__init__(config)
        self._stop = stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have signals call `stop` for as long as the server runs."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)


async def serve_until_stopped(app: ASGIApp, engine: Engine, listening: socket.socket, *, drain_s: float) -> None:
    """Serve until a signal comes; then take nothing new in, let what runs end within `drain_s`, and cut the rest.

    A second signal cuts at once.
    """
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Future[bool]] = []

    def end(_: object = None) -> None:
        engine.close()
        server.should_exit = True

    def begin_to_end() -> None:
        if ending:
            end()
        else:
            ending.append(loop.run_in_executor(None, engine.drain, drain_s))
            ending[0].add_done_callback(end)

    config = uvicorn.Config(
        app,
        log_config=None,  # uvicorn's lines go where all go
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=LAST_WORDS_S,
        **UVICORN_OPTIONS,
    )
    server = StoppableServer(config, stop=begin_to_end)
    await server.serve([listening])
