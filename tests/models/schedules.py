"""Random schedules: sequences in random parts, orders, company, pages, slots, numbers of threads and forms."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

from freehold.models.decoder import Decoder
from freehold.models.layout import Capacity, Layout, PagedKV, Recurrent, State, States
from freehold.ops.attention import PAGE_TOKENS
from models.forms import FORMS, THREADS, on_threads, running, same_bits
from models.tiny import random_tokens

LONGEST = 3 * PAGE_TOKENS - 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """Which sequences take how many tokens, in this order, on how many threads."""

    takes: tuple[tuple[int, int], ...]
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sequences by their tokens, the steps that run them, and where their states lie."""

    sequences: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    page_size: int
    pages: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    form: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model makes of one sequence: hidden states, logits, and the states left behind."""

    hidden_LD: Tensor
    logits_LV: Tensor
    states: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.hidden_LD, self.logits_LV, *self.states)


@st.composite
def schedules(draw: st.DrawFn, *, longest: int = LONGEST) -> Schedule:
    """Draw a schedule."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    random = Random(draw(st.integers(0, 2**32)))
    steps, left = [], dict(enumerate(lengths))
    while left:
        together = random.sample(sorted(left), random.randint(1, len(left)))
        takes = tuple((i, _part(left[i], random)) for i in together)
        steps.append(Step(takes=takes, num_threads=random.choice((1, *THREADS))))
        left = {i: rest for i, count in left.items() if (rest := count - dict(takes).get(i, 0))}
    page_size = PAGE_TOKENS * random.randint(1, 2)
    counts = [-(-length // page_size) + random.randint(0, 1) for length in lengths]
    free = random.sample(range(sum(counts)), sum(counts))
    return Schedule(
        sequences=tuple(tuple(random_tokens(length, seed=length).tolist()) for length in lengths),
        steps=tuple(steps),
        page_size=page_size,
        pages=tuple(tuple(free.pop() for _ in range(count)) for count in counts),
        slots=tuple(random.sample(range(len(lengths)), len(lengths))),
        form=random.choice(FORMS),
    )


def _part(left: int, random: Random) -> int:
    """Return a token, some, or all that is left."""
    return random.choice((1, random.randint(1, left), left))


@torch.inference_mode()
def run(decoder: Decoder, schedule: Schedule, kv_dtype: torch.dtype | None = None) -> list[Result]:
    """Return what a model makes of each sequence of a schedule, its pages full of NaN where nothing was written."""
    num_pages = sum(map(len, schedule.pages))
    states = decoder.allocate_states(
        Capacity(num_slots=len(schedule.slots), num_pages=num_pages, page_size=schedule.page_size), kv_dtype=kv_dtype
    )
    for pool in (pool for state in states if isinstance(state, PagedKV) for pool in state.pools):
        pool.fill_(torch.nan if pool.is_floating_point() else 99)
    contexts = [0] * len(schedule.sequences)
    hidden: list[list[Tensor]] = [[] for _ in contexts]
    with running(schedule.form), on_threads(1):
        for step in schedule.steps:
            with on_threads(step.num_threads):
                _run_step(decoder, states, schedule, step, contexts, hidden)
        return [
            Result(
                hidden_LD=torch.cat([pair[0] for pair in hidden[i]]),
                logits_LV=torch.cat([pair[1] for pair in hidden[i]]),
                states=_kept(states, schedule.pages[i], contexts[i], schedule.slots[i]),
            )
            for i in range(len(contexts))
        ]


def _run_step(
    decoder: Decoder, states: States, schedule: Schedule, step: Step, contexts: list[int], found: list[list]
) -> None:
    """Run one step. Mutates: states, contexts, found."""
    lengths = [length for _, length in step.takes]
    tokens = [schedule.sequences[i][contexts[i] : contexts[i] + length] for i, length in step.takes]
    layout = Layout.step(
        lengths,
        [contexts[i] for i, _ in step.takes],
        slots=[schedule.slots[i] for i, _ in step.takes],
        pages=[schedule.pages[i] for i, _ in step.takes],
        page_size=schedule.page_size,
    )
    hidden_TD = decoder(torch.tensor([token for part in tokens for token in part]), layout, states)
    parts = zip(hidden_TD.split(lengths), decoder.logits(hidden_TD).split(lengths), strict=True)
    for (i, length), part in zip(step.takes, parts, strict=True):
        found[i].append(part)
        contexts[i] += length


def _kept(states: Sequence[State], pages: Sequence[int], length: int, slot: int) -> tuple[Tensor, ...]:
    kept: list[Tensor] = []
    for state in states:
        match state:
            case PagedKV():
                kept += [part[:length] for part in state.read(pages)]
            case Recurrent():
                kept += [state.conv_tail[slot], state.ssm[slot]]
    return tuple(kept)


def alone(tokens: tuple[int, ...]) -> Schedule:
    """Return the plainest schedule of one sequence: all at once on one thread."""
    num_pages = -(-len(tokens) // PAGE_TOKENS)
    return Schedule(
        sequences=(tokens,),
        steps=(Step(takes=((0, len(tokens)),), num_threads=1),),
        page_size=PAGE_TOKENS,
        pages=(tuple(range(num_pages)),),
        slots=(0,),
        form=FORMS[0],
    )


def same(found: Result, expected: Result) -> bool:
    """Return whether two results are equal bit for bit."""
    return all(same_bits(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))
