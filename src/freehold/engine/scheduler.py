"""Who runs in the next step, with how many tokens, and who waits. No torch, no clock, no threads.

Prefill, a chunk of it and decode are one thing: tokens computed catch up with tokens known, within a budget a step.
Belongs here: order, fairness, admission, preemption, deadlines. Not here: what a token is, and who is told.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from freehold.engine.pool import Pool
from freehold.engine.request import Finish, Request
from freehold.engine.sequence import Sequence
from freehold.errors import Overloaded, TooLong


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is to share.

    num_slots: sequences at once. num_pages, page_size: of keys and values, and tokens in one. budget_tokens: computed
    in a step. max_positions: the model's context. max_waiting: requests that may wait.
    """

    num_slots: int
    num_pages: int
    page_size: int
    budget_tokens: int
    max_positions: int
    max_waiting: int = 1024

    @property
    def longest(self) -> int:
        """Tokens that one sequence can have, in the model's context and in all pages."""
        return min(self.max_positions, self.num_pages * self.page_size)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A sequence's part of a step: the next `num_tokens` of its known tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def tokens(self) -> list[int]:
        begin = self.sequence.num_computed
        return self.sequence.known[begin : begin + self.num_tokens]

    @property
    def is_last(self) -> bool:
        """Whether all that is known is computed then, so that the next token can be drawn."""
        return self.num_tokens == self.sequence.num_uncomputed


@dataclass(kw_only=True)
class Plan:
    """A step: who runs, and who ended without running."""

    runs: list[Run] = field(default_factory=list)
    ended: list[tuple[Sequence, Finish]] = field(default_factory=list)


class Scheduler:
    """The requests that are waiting or running, and the pages and slots that they own."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.pages = Pool(limits.num_pages)
        self.slots = Pool(limits.num_slots)
        self.num_preemptions = 0
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._next_number = 0
        # Tokens that each tenant's requests have been given, by weight: who has had least is next.
        # Paper: Sheng et al., 2024, arXiv 2401.00588, section 4 (virtual token counter).
        self._served: dict[str, float] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, requests: Iterable[Request], *, now_s: float) -> list[Sequence]:
        """Take requests in, all or none; they wait.

        Raises: TooLong where one can never run, Overloaded where too many would wait.
        """
        lengths = [(request, self.longest_answer(request)) for request in requests]
        if len(self._waiting) + len(lengths) > self.limits.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting, too many for {len(lengths)} more", hint="try again later"
            )
        return [self._add(request, num_tokens, now_s) for request, num_tokens in lengths]

    def _add(self, request: Request, num_tokens: int, now_s: float) -> Sequence:
        sequence = Sequence(number=self._next_number, request=request, num_tokens=num_tokens, submitted_s=now_s)
        self._next_number += 1
        self._join(request.tenant)
        self._waiting[sequence.number] = sequence
        return sequence

    def longest_answer(self, request: Request) -> int:
        """Return the tokens that an answer may have, at most. Raises: TooLong where there is no room for one."""
        longest, prompt = self.limits.longest, len(request.prompt)
        least = 0 if request.embeds else request.sampling.max_tokens or 1
        if prompt + least > longest:
            answer = f" and an answer of up to {least}" if least else ""
            raise TooLong(
                f"the prompt has {prompt} tokens{answer}, there is room for {longest} in all",
                hint="shorten the prompt or max_tokens",
            )
        return request.sampling.max_tokens or longest - prompt

    def plan(self, *, now_s: float) -> Plan:
        """Return the next step. Mutates: gives pages and slots to those that run, takes them from preempted ones."""
        plan = Plan(ended=list(self._end_late(now_s)))
        if alone := [sequence for sequence in self._all() if sequence.runs_alone]:
            self._plan_alone(plan, min(alone, key=_rank))
            return plan
        self._admit_urgent()
        budget = self.limits.budget_tokens
        for sequence in sorted(self._running.values(), key=_decode_first):
            if sequence.is_running:  # and was not preempted for one before it
                budget -= self._run(plan, sequence, budget)
        while budget > 0 and (waiting := self._next_waiting()) and self._admit(waiting, instead_of=[]):
            budget -= self._run(plan, waiting, budget)
        return plan

    def commit(self, plan: Plan, drawn: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """Take in what a step computed; return the token that each answer gained.

        drawn: a token for each sequence whose run was its last but for those that want none. A finished sequence stays
        until `end` is called for it.
        """
        gained: dict[Sequence, int] = {}
        for run in plan.runs:
            sequence = run.sequence
            sequence.runs_alone = sequence.runs_alone and not run.is_last
            sequence.num_computed += run.num_tokens
            self._served[sequence.request.tenant] += run.num_tokens / sequence.request.weight
            if sequence in drawn:
                gained[sequence] = sequence.accept(drawn[sequence])
        return gained

    def end(self, sequence: Sequence) -> None:
        """Let a sequence go, with all that it owns."""
        self._release(sequence)
        self._waiting.pop(sequence.number, None)

    def find(self, number: int) -> Sequence | None:
        """Return a sequence that is waiting or running."""
        return self._waiting.get(number) or self._running.get(number)

    def suspect(self, plan: Plan) -> list[Sequence]:
        """Have the sequences of a step that failed each start over and run alone; return the one that failed alone."""
        if len(plan.runs) == 1 and plan.runs[0].sequence.runs_alone:
            return [plan.runs[0].sequence]
        for run in plan.runs:
            self._preempt(run.sequence)
            run.sequence.runs_alone = True
        return []

    def check(self) -> str | None:
        """Return what is wrong with who owns what, None where every page and slot is free or has one owner."""
        sequences = self._running.values()
        if pages := self.pages.lost(page for sequence in sequences for page in sequence.pages):
            return f"page {pages[0]} is lost or owned twice"
        if slots := self.slots.lost(s.slot for s in sequences if s.slot is not None):
            return f"slot {slots[0]} is lost or owned twice"
        if any(sequence.pages or sequence.is_running for sequence in self._waiting.values()):
            return "a waiting request owns something"
        return None

    def _all(self) -> Iterator[Sequence]:
        yield from self._running.values()
        yield from self._waiting.values()

    def _end_late(self, now_s: float) -> Iterator[tuple[Sequence, Finish]]:
        limited = [sequence for sequence in self._all() if sequence.request.deadline_s is not None]
        for sequence in limited:
            deadline_s = sequence.request.deadline_s
            if deadline_s is not None and now_s - sequence.submitted_s >= deadline_s:
                self.end(sequence)
                yield sequence, Finish(reason="deadline", message=f"not done after {deadline_s:g} s")

    def _plan_alone(self, plan: Plan, sequence: Sequence) -> None:
        """Let one sequence run. The others pause: they keep what they own and have computed, but for what it needs."""
        others = sorted((other for other in self._running.values() if other is not sequence), key=_rank)
        if sequence.is_running or self._admit(sequence, instead_of=others):
            self._run(plan, sequence, self.limits.budget_tokens)

    def _run(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """Give a running sequence its part of a step; return its tokens, 0 if it has to wait."""
        num_tokens = min(budget, sequence.num_uncomputed)
        if num_tokens <= 0 or not self._own_pages(plan, sequence):
            return 0
        plan.runs.append(Run(sequence=sequence, num_tokens=num_tokens))
        return num_tokens

    def _own_pages(self, plan: Plan, sequence: Sequence) -> bool:
        """Let a sequence own pages for all that is known, taken from who ranks last; False if that is itself.

        Only decode comes to want one here. Who is first in rank is planned first, so somebody always goes on.
        """
        missing = self._missing_pages(sequence)
        planned = {run.sequence for run in plan.runs} if missing else set()
        while missing > self.pages.num_free:
            last = max((other for other in self._running.values() if other not in planned), key=_rank)
            self._preempt(last)
            if last is sequence:
                return False
        sequence.pages += self.pages.take(missing)
        return True

    def _missing_pages(self, sequence: Sequence) -> int:
        return max(0, -(-len(sequence.known) // self.limits.page_size) - len(sequence.pages))

    def _next_waiting(self) -> Sequence | None:
        """Return who waits and is next: by priority, preempted ones first, then whose tenant has been served least."""

        def order(sequence: Sequence) -> tuple[int, float, int]:
            served = -1.0 if sequence.was_preempted else self._served[sequence.request.tenant]
            return (-sequence.request.priority, served, sequence.number)

        return min(self._waiting.values(), key=order, default=None)

    def _admit_urgent(self) -> None:
        """Let those run whose priority is above that of some who do, instead of them where there is no other room."""
        while (sequence := self._next_waiting()) and self._running:
            priority = sequence.request.priority
            lesser = [other for other in self._running.values() if other.request.priority < priority]
            if not lesser or not self._admit(sequence, instead_of=sorted(lesser, key=_rank)):
                return

    def _admit(self, sequence: Sequence, *, instead_of: list[Sequence]) -> bool:
        """Let a waiting sequence run if there are a slot and pages for all that is known of it, free or by preemption.

        instead_of: who may be preempted for it, from the last.
        """
        wanted = self._missing_pages(sequence)
        reachable = self.pages.num_free + sum(len(other.pages) for other in instead_of)
        if wanted > reachable or not (self.slots.num_free or instead_of):
            return False
        while wanted > self.pages.num_free or not self.slots.num_free:
            self._preempt(instead_of.pop())
        sequence.pages, sequence.slot = self.pages.take(wanted), self.slots.take(1)[0]
        del self._waiting[sequence.number]
        self._running[sequence.number] = sequence
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take all that a sequence owns; it waits, and computes anew what it has."""
        self._release(sequence)
        sequence.num_computed, sequence.was_preempted = 0, True
        self._waiting[sequence.number] = sequence
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._running.pop(sequence.number, None)
        self.pages.give_back(sequence.pages)
        sequence.pages = []
        if sequence.slot is not None:
            self.slots.give_back([sequence.slot])
            sequence.slot = None

    def _join(self, tenant: str) -> None:
        """Have a tenant without requests begin no earlier than those that have some, so that rest earns no credit."""
        active = {sequence.request.tenant for sequence in self._all()}
        if tenant not in active:
            least = min((self._served[other] for other in active), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), least)
            self._forget_all_but(active | {tenant}, least)

    def _forget_all_but(self, tenants: Iterable[str], least: float) -> None:
        """Drop the counts of tenants that are gone and could not come back behind the others."""
        kept = set(tenants)
        self._served = {name: count for name, count in self._served.items() if name in kept or count > least}


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Who is preempted last comes first: by priority, then by age."""
    return (-sequence.request.priority, sequence.number)


def _decode_first(sequence: Sequence) -> tuple[int, bool, int]:
    """Order of running sequences: by priority; those with one token to compute before those that read; by age."""
    return (-sequence.request.priority, sequence.num_uncomputed > 1, sequence.number)
