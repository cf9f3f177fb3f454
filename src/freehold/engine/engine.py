"""The engine: many requests, one model. Its step loop has its own thread; everything else only leaves notes for it.

Belongs here: the thread, who is told what, and that one request's failure is no other's. Not here: order and memory
(scheduler.py), tensors (runner.py).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from freehold.engine.draw import scores
from freehold.engine.generate import check_prompt
from freehold.engine.model import Model
from freehold.engine.request import Event, Finish, Request, Score
from freehold.engine.runner import Outcome, Runner
from freehold.engine.scheduler import Limits, Plan, Run, Scheduler
from freehold.engine.sequence import Sequence
from freehold.errors import BadRequest, Draining, EngineFailed
from freehold.models.layout import Capacity

logger = logging.getLogger(__name__)

Listener = Callable[[Event], None]

CANCELLED = Finish(reason="cancelled")
STOPPED = Finish(reason="cancelled", message="the engine stopped")
FAILED = Finish(reason="failed", message="the engine failed at this request; its log says more")


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine has and has done. Units: step_s and busy_s are seconds since it started, inside the model's
    forward and in the step loop as a whole."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_slots: int
    num_free_slots: int
    num_preemptions: int
    num_steps: int
    prompt_tokens: int
    generated_tokens: int
    step_s: float
    busy_s: float


@dataclass(kw_only=True, eq=False)
class _Told:
    """Who listens to a sequence, and what is gathered until it can be told."""

    listener: Listener
    started_s: float | None = None  # of its first step
    prompt_scores: list[Score | None] = field(default_factory=list)
    has_prompt_scores: bool = False
    hidden_sum_D: Tensor | None = None


class Engine:
    """Runs requests for one model until it is closed; a context manager."""

    def __init__(self, model: Model, limits: Limits, *, kv_dtype: torch.dtype | None = None):
        self.model = model
        self.limits = limits
        capacity = Capacity(num_slots=limits.num_slots, num_pages=limits.num_pages, page_size=limits.page_size)
        num_ids = model.text.tokenizer.vocab_size if model.text.tokenizer else None
        self._runner = Runner(model.decoder, capacity, num_ids=num_ids, kv_dtype=kv_dtype)
        self._scheduler = Scheduler(limits)
        self._told: dict[Sequence, _Told] = {}
        self._cancelled: set[int] = set()
        self._changed = threading.Condition()  # guards the scheduler and all of the above
        self._is_draining = self._is_closed = self._has_failed = False
        self._num_steps = self._prompt_tokens = self._generated_tokens = 0
        self._step_s = self._busy_s = 0.0
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, name="freehold-engine", daemon=True)

    def start(self) -> None:
        """Begin to run requests."""
        self._thread.start()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, request: Request, listener: Listener) -> int:
        """Take a request in and return its number, as `submit_all` does."""
        return self.submit_all([(request, listener)])[0]

    def submit_all(self, asked: Iterable[tuple[Request, Listener]]) -> list[int]:
        """Take requests in, all or none, and return their numbers. Any thread may call this.

        Each listener is called with each event, on the engine's thread, which waits for it: it has to be quick.
        Raises: BadRequest, Overloaded, Draining, EngineFailed; then nothing has been taken in.
        """
        requests, listeners = zip(*asked, strict=True)
        for request in requests:
            check_prompt(self.model.decoder, request.prompt, room_tokens=0)
            if request.weight <= 0:
                raise BadRequest(f"a weight of {request.weight} is no share")
        with self._changed:
            if self._has_failed:
                raise EngineFailed("the engine broke and runs nothing more; its log says why")
            if self._is_draining or self._is_closed:
                raise Draining("the server is about to stop", hint="ask another one, or again in a minute")
            sequences = self._scheduler.add(requests, now_s=time.monotonic())
            self._told |= {
                sequence: _Told(listener=listener) for sequence, listener in zip(sequences, listeners, strict=True)
            }
            self._changed.notify_all()
        return [sequence.number for sequence in sequences]

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended: what it owns is free before the next step. Any thread may call this."""
        with self._changed:
            self._cancelled.add(number)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Take in nothing more and wait for what there is; return whether all of it ended in time."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._told, timeout_s)

    def close(self) -> None:
        """Stop. What has not ended is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_accepting(self) -> bool:
        """Whether a request would be taken in."""
        return self._thread.is_alive() and not (self._is_draining or self._is_closed)

    @property
    def has_failed(self) -> bool:
        """Whether the engine broke, so that nothing will run any more."""
        return self._has_failed

    def stats(self) -> EngineStats:
        """Return the counts of now. Any thread may call this."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_pages=scheduler.pages.size,
            num_free_pages=scheduler.pages.num_free,
            num_slots=scheduler.slots.size,
            num_free_slots=scheduler.slots.num_free,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            step_s=self._step_s,
            busy_s=self._busy_s,
        )

    def _loop(self) -> None:
        torch.set_num_threads(self._num_threads)  # a thread begins with torch's own number
        try:
            self._run_until_closed()
        except BaseException:
            logger.critical("the engine broke; nothing more will run", exc_info=True)
            self._has_failed = True
        with self._changed:
            self._is_closed = True
            for sequence in list(self._told):
                self._end(sequence, FAILED if self._has_failed else STOPPED)

    def _run_until_closed(self) -> None:
        while not self._is_closed:
            start_s = time.monotonic()
            with self._changed:
                plan = self._next_plan()
            if plan.runs:
                self._step(plan)
                self._busy_s += time.monotonic() - start_s
            else:
                self._rest()

    def _next_plan(self) -> Plan:
        for number in self._cancelled:
            if sequence := self._scheduler.find(number):
                self._end(sequence, CANCELLED)
        self._cancelled.clear()
        plan = self._scheduler.plan(now_s=time.monotonic())
        for sequence, finish in plan.ended:
            self._end(sequence, finish)
        for run in plan.runs:
            told = self._told[run.sequence]
            told.started_s = told.started_s or time.monotonic()
        return plan

    def _rest(self) -> None:
        """Wait for something to do. While nobody runs, every page and slot has to be accounted for."""
        with self._changed:
            if self._scheduler.num_running or self._scheduler.num_waiting or self._cancelled or self._is_closed:
                return
            if wrong := self._scheduler.check():
                raise AssertionError(wrong)
            self._changed.wait()

    def _step(self, plan: Plan) -> None:
        start_s = time.monotonic()
        try:
            outcomes = self._runner.run(plan.runs)
        except Exception:  # whatever it is, it may have to do with one request, and is no reason to lose the others
            requests = ", ".join(run.sequence.request.id or str(run.sequence.number) for run in plan.runs)
            logger.exception("a step failed, with %s", requests)
            with self._changed:
                for sequence in self._scheduler.suspect(plan):
                    self._end(sequence, FAILED)
            return
        self._step_s += time.monotonic() - start_s
        self._num_steps += 1
        with self._changed:
            self._take_in(plan, outcomes)

    def _take_in(self, plan: Plan, outcomes: list[Outcome]) -> None:
        pairs = list(zip(plan.runs, outcomes, strict=True))
        for run, outcome in pairs:
            self._prompt_tokens += min(run.num_tokens, max(0, run.sequence.prompt_length - run.sequence.num_computed))
            self._gather(run, outcome)
        drawn = {run.sequence: outcome.token for run, outcome in pairs if outcome.token is not None}
        gained = self._scheduler.commit(plan, drawn)
        self._generated_tokens += len(gained)
        for run, outcome in pairs:
            self._tell(run.sequence, outcome, gained)

    def _gather(self, run: Run, outcome: Outcome) -> None:
        """Keep what can be told only when the whole prompt has been read."""
        told, is_first = self._told[run.sequence], run.sequence.num_computed == 0
        if outcome.hidden_sum_D is not None:
            before = 0 if is_first or told.hidden_sum_D is None else told.hidden_sum_D
            told.hidden_sum_D = outcome.hidden_sum_D + before
        if run.sequence.request.scores_prompt and not told.has_prompt_scores:
            told.prompt_scores = [*([None] if is_first else told.prompt_scores), *outcome.prompt_scores]

    def _tell(self, sequence: Sequence, outcome: Outcome, gained: Mapping[Sequence, int]) -> None:
        told, request = self._told[sequence], sequence.request
        if outcome.error is not None:
            self._end(sequence, Finish(reason="failed", message=outcome.error.message))
            return
        finish = None
        if sequence.is_finished:
            reached = sequence.answer_length >= sequence.num_tokens and not sequence.has_stopped
            finish = Finish(reason="length" if reached else "stop")
        if sequence not in gained and finish is None:
            return
        token = gained.get(sequence)
        kept = (
            []
            if outcome.logits_V is None or token is None
            else scores(outcome.logits_V[None], [token], request.num_logprobs or 0)
        )
        is_first = sequence.answer_length == 1 or request.embeds
        event = Event(
            queue_s=told.started_s - sequence.submitted_s if is_first and told.started_s else None,
            prefill_s=time.monotonic() - told.started_s if is_first and told.started_s else None,
            tokens=() if token is None else (token,),
            scores=tuple(kept),
            prompt_scores=() if told.has_prompt_scores else tuple(told.prompt_scores),
            embedding=_normalised(told.hidden_sum_D) if request.embeds else (),
            finish=finish,
        )
        told.has_prompt_scores = True
        self._send(sequence, event)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        if sequence in self._told:
            self._send(sequence, Event(finish=finish))

    def _send(self, sequence: Sequence, event: Event) -> None:
        """Tell the listener, and let go of the sequence with its last event or where nobody can be told."""
        try:
            self._told[sequence].listener(event)
            is_over = event.finish is not None
        except Exception:  # the listener's own: it will not hear more, and nobody else shall suffer
            logger.exception("a listener failed")
            is_over = True
        if is_over:
            self._scheduler.end(sequence)
            del self._told[sequence]
            self._changed.notify_all()


def _normalised(sum_D: Tensor | None) -> tuple[float, ...]:
    """Return the direction of a sum of hidden states, which is that of their mean, with length 1."""
    assert sum_D is not None, "the whole prompt has been read"
    return tuple((sum_D / sum_D.norm().clamp_min(1e-30)).tolist())
