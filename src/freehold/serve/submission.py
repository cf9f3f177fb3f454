"""A request on its way through the engine, seen from the event loop."""

import asyncio
import threading
import time
from functools import partial

from freehold.engine.engine import Engine
from freehold.engine.request import Event, Finish, Request
from freehold.errors import Draining, EngineFailed, TimedOut
from freehold.serve.caller import Caller, Quotas, Reservation


class Mailbox:
    """Events on their way from the engine's thread to an event loop, which a step's events wake once, not each."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._lock = threading.Lock()
        self._posted: list[tuple[asyncio.Queue[Event], Event]] = []

    def post(self, queue: "asyncio.Queue[Event]", event: Event) -> None:
        """Have an event put into a queue of the loop; for other threads than the loop's."""
        with self._lock:
            self._posted.append((queue, event))
            is_first = len(self._posted) == 1
        if is_first:
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for queue, event in posted:
            queue.put_nowait(event)


class Submission:
    """A request in the engine, as an async context and an iterator of its events; leaving it ends the request.

    num_written: tokens of the answer that were taken note of, which is what a quota is charged with.
    Raises: EngineFailed, TimedOut, Draining while iterated, as the request's end says.
    """

    def __init__(self, engine: Engine, request: Request, caller: Caller, *, quotas: Quotas | None, mailbox: Mailbox):
        self._engine, self._request, self._caller, self._quotas = engine, request, caller, quotas
        self._mailbox = mailbox
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._number: int | None = None
        self._is_over = False
        self._reservation: Reservation = None
        self._first_s: float | None = None
        self.num_written = 0

    async def __aenter__(self) -> "Submission":
        if self._quotas:
            self._reservation = await self._quotas.reserve(self._caller, self._worst_case())
        try:
            self._number = self._engine.submit(self._request, partial(self._mailbox.post, self._events))
        except BaseException:
            await self._settle(0)
            raise
        self._caller.spent.prompt_tokens += len(self._request.prompt)
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._number is not None and not self._is_over:
            self._engine.cancel(self._number)
            self._caller.spent.finish = self._caller.spent.finish or "cancelled"
        await asyncio.shield(self._settle(len(self._request.prompt)))

    def _worst_case(self) -> int:
        """Return the tokens that the request can take."""
        prompt, longest = len(self._request.prompt), self._engine.limits.longest
        answer = 0 if self._request.embeds else self._request.sampling.max_tokens or longest
        return min(longest, prompt + answer)

    def _note(self, event: Event) -> None:
        """Add an event to what the caller's request has taken."""
        spent, now_s = self._caller.spent, time.monotonic()
        if event.queue_s is not None and event.prefill_s is not None:
            self._first_s = now_s
            spent.queue_s = max(spent.queue_s or 0.0, event.queue_s)
            spent.prefill_s = max(spent.prefill_s or 0.0, event.prefill_s)
        if self._first_s is not None:
            spent.decode_s = max(spent.decode_s or 0.0, now_s - self._first_s)
        spent.answer_tokens += len(event.tokens)
        if event.finish:
            spent.finish = event.finish.reason

    async def _settle(self, prompt_tokens: int) -> None:
        if self._quotas and self._reservation:
            await self._quotas.settle(self._reservation, prompt_tokens, self.num_written)

    def __aiter__(self) -> "Submission":
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_over = event.finish is not None
        self._note(event)
        if event.finish and event.finish.reason in ("failed", "deadline", "cancelled"):
            raise _failure(event.finish)
        return event


def _failure(finish: Finish) -> Exception:
    match finish.reason:
        case "deadline":
            return TimedOut(f"the request was {finish.message}")
        case "cancelled":
            return Draining("the server stopped before the answer was done", hint="ask again in a minute")
        case _:
            return EngineFailed(finish.message)
