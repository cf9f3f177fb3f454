"""A request on its way through the engine, with all the answers that it wants, seen from the event loop."""

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial

from freehold.engine.engine import Engine
from freehold.engine.request import Event, Finish, Request
from freehold.errors import Draining, EngineFailed, TimedOut
from freehold.serve.caller import Caller, Quotas, Reservation

Events = asyncio.Queue[tuple[int, Event]]  # each with the place of its answer


class Mailbox:
    """Events on their way from the engine's thread to an event loop, which a step's events wake once, not each."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._lock = threading.Lock()
        self._posted: list[tuple[Events, tuple[int, Event]]] = []

    def post(self, events: "Events", place: int, event: Event) -> None:
        """Have an event put into a queue of the loop; for other threads than the loop's."""
        with self._lock:
            self._posted.append((events, (place, event)))
            is_first = len(self._posted) == 1
        if is_first:
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for events, event in posted:
            events.put_nowait(event)


class Submission:
    """A request in the engine, as an async context and an iterator of its events; leaving it ends what still runs.

    Its answers are taken in and paid for together, or none is. num_written: tokens of the answers that were taken note
    of, which is what a quota is charged with.
    Raises: EngineFailed, TimedOut, Draining while iterated, as the end of an answer says.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], caller: Caller, *, quotas: Quotas | None, mailbox: Mailbox
    ):
        self._engine, self._requests, self._caller, self._quotas = engine, requests, caller, quotas
        self._mailbox = mailbox
        self._events: Events = asyncio.Queue()
        self._running: dict[int, int] = {}  # numbers in the engine, by the places of answers that have not ended
        self._reservation: Reservation = None
        self._first_s: dict[int, float] = {}
        self.num_written = 0

    async def __aenter__(self) -> "Submission":
        if self._quotas:
            self._reservation = await self._quotas.reserve(self._caller, sum(map(self._worst_case, self._requests)))
        try:
            listeners = (partial(self._mailbox.post, self._events, place) for place in range(len(self._requests)))
            numbers = self._engine.submit_all(zip(self._requests, listeners, strict=True))
        except BaseException:
            await self._settle(0)
            raise
        self._running = dict(enumerate(numbers))
        self._caller.spent.prompt_tokens += self._prompt_tokens
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._running:
            self._caller.spent.finish = self._caller.spent.finish or "cancelled"
        for place in list(self._running):
            self.end(place)
        await asyncio.shield(self._settle(self._prompt_tokens))

    def end(self, place: int) -> None:
        """End one answer, if it has not ended."""
        if place in self._running:
            self._engine.cancel(self._running.pop(place))

    @property
    def _prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self._requests)

    def _worst_case(self, request: Request) -> int:
        """Return the tokens that one answer can take, with its prompt."""
        prompt, longest = len(request.prompt), self._engine.limits.longest
        answer = 0 if request.embeds else request.sampling.max_tokens or longest
        return min(longest, prompt + answer)

    def _note(self, place: int, event: Event) -> None:
        """Add an event to what the caller's request has taken."""
        spent, now_s = self._caller.spent, time.monotonic()
        if event.queue_s is not None and event.prefill_s is not None:
            self._first_s[place] = now_s
            spent.queue_s = max(spent.queue_s or 0.0, event.queue_s)
            spent.prefill_s = max(spent.prefill_s or 0.0, event.prefill_s)
        if place in self._first_s:
            spent.decode_s = max(spent.decode_s or 0.0, now_s - self._first_s[place])
        spent.answer_tokens += len(event.tokens)
        if event.finish:
            spent.finish = event.finish.reason

    async def _settle(self, prompt_tokens: int) -> None:
        if self._quotas and self._reservation:
            await self._quotas.settle(self._reservation, prompt_tokens, self.num_written)

    def __aiter__(self) -> "Submission":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        while self._running:
            place, event = await self._events.get()
            if place not in self._running:
                continue  # what came before the engine heard that it is over
            if event.finish:
                del self._running[place]
            self._note(place, event)
            if event.finish and event.finish.reason in ("failed", "deadline", "cancelled"):
                raise _failure(event.finish)
            return place, event
        raise StopAsyncIteration


def _failure(finish: Finish) -> Exception:
    match finish.reason:
        case "deadline":
            return TimedOut(f"the request was {finish.message}")
        case "cancelled":
            return Draining("the server stopped before the answer was done", hint="ask again in a minute")
        case _:
            return EngineFailed(finish.message)
