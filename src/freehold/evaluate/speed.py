"""How fast a model runs on this machine, and how much of what the machine can do that is. On a CPU.

Belongs here: what is measured (`Case`) and how. Not here: what a step asks of the machine (work.py), what the machine
can do (limits.py), and how results are shown.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean, median

import torch
from torch import Tensor

from freehold.engine.generate import PAGE_SIZE, PREFILL_TOKENS
from freehold.errors import BadRequest
from freehold.evaluate.limits import READ_BYTES, Arithmetic, product_rate, read_bandwidth
from freehold.evaluate.work import CountingDecoder, Work
from freehold.models.decoder import Decoder
from freehold.models.layout import (
    Capacity,
    Layout,
    PagedKV,
    Recurrent,
    kv_bytes_per_token,
    recurrent_bytes_per_sequence,
)
from freehold.ops.native import kernels
from freehold.ops.sampling import Drawing, sample_rows

DEFAULT_PROMPTS = (128, 512)
DEFAULT_DEPTHS = (0, 512, 2048)
DEFAULT_BATCHES = (1, 4, 8, 16)

# A round of decoding lasts so long, within these numbers of steps. One more before it is not timed: what ran before has
# left its own data in the caches.
ROUND_S = 0.5
MIN_STEPS, MAX_STEPS = 4, 32
DECODE_ROOM = 1 + MAX_STEPS

Progress = Callable[[int, int, str], None]  # turns done, turns in all, what is next


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: `batch` sequences with `depth` tokens each in the states, and what comes then.

    prompt: tokens that one sequence reads; 0 where each writes a token a step.
    """

    depth: int
    batch: int = 1
    prompt: int = 0

    @property
    def phase(self) -> str:
        return "prefill" if self.prompt else "decode"

    @property
    def num_tokens(self) -> int:
        """Tokens that are timed together: of the prompt, or of one step."""
        return self.prompt or self.batch

    @property
    def room(self) -> int:
        """Tokens that a sequence comes to have."""
        return self.depth + (self.prompt or DECODE_ROOM)

    @property
    def name(self) -> str:
        what = f"{self.prompt:,} tokens" if self.prompt else f"batch {self.batch}"
        return f"{self.phase}, {what}, depth {self.depth:,}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the machine can do at most, measured in the same rounds as the cases.

    arithmetic: what `operations_per_s` is the rate of, and what most of the model's weights are multiplied as.
    """

    read_bytes_per_s: float
    operations_per_s: float
    arithmetic: Arithmetic


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one case ran.

    step_s: seconds of one step: a token for each sequence, or up to 512 tokens of a prompt.
    read_bytes, operations: per token; see `Work`.
    num_experts: distinct experts that a step meets in a block, the mean over blocks; None where there are none.
    """

    case: Case
    tokens_per_s: float
    step_s: float
    read_bytes: float
    operations: float
    num_experts: float | None

    def bandwidth_share(self, limits: Limits) -> float:
        """Return how much of the memory bandwidth is used; above 1 where caches hold what is read."""
        return self.read_bytes * self.tokens_per_s / limits.read_bytes_per_s

    def compute_share(self, limits: Limits) -> float:
        """Return how much of the compute peak is used."""
        return self.operations * self.tokens_per_s / limits.operations_per_s


def plan_cases(
    decoder: Decoder,
    *,
    prompts: Sequence[int] | None,
    depths: Sequence[int] | None,
    batches: Sequence[int] | None,
    memory_bytes: int,
) -> list[Case]:
    """Return the cases to measure, by depth. None takes defaults, cut to the model's context and to the free memory.

    Raises: BadRequest for what was given and does not fit.
    """
    context = decoder.spec.max_positions
    if context < DECODE_ROOM:
        raise BadRequest(f"the model's context is {context} tokens, measuring takes {DECODE_ROOM}")
    prompts_here = _chosen("prompt", prompts, DEFAULT_PROMPTS, most=context)
    depths_here = _chosen("depth", depths, DEFAULT_DEPTHS, most=context - DECODE_ROOM)
    prefills = [Case(depth=depth, prompt=prompt) for depth in depths_here for prompt in prompts_here]
    if prompts and depths and prefills[-1].room > context:
        raise BadRequest(f"{prefills[-1].name}, is {prefills[-1].room:,} in all: the model's context is {context:,}")
    prefills = [case for case in prefills if case.room <= context]
    room = max(case.room for case in [*prefills, Case(depth=depths_here[-1])])
    most = (memory_bytes - READ_BYTES) // sequence_bytes(decoder, room)
    if most < 1:
        raise BadRequest(f"one sequence of {room:,} tokens does not fit the free memory", hint="ask for smaller depths")
    batches_here = _chosen("batch", batches, DEFAULT_BATCHES, most=most)
    decodes = [Case(depth=depth, batch=batch) for depth in depths_here for batch in batches_here]
    return sorted([*prefills, *decodes], key=lambda case: case.depth)


def _chosen(what: str, given: Sequence[int] | None, defaults: Sequence[int], *, most: int) -> list[int]:
    """Return what was given, or the defaults, none of them beyond what there is room for."""
    if given and max(given) > most:
        raise BadRequest(f"a {what} of {max(given):,} is too large: there is room for {most:,} with this model here")
    return sorted({*(given or (min(value, most) for value in defaults))})


def sequence_bytes(decoder: Decoder, room: int) -> int:
    """Return the bytes of states and logits of one sequence of so many tokens."""
    blocks, dtype = decoder.spec.blocks, decoder.dtype
    logits = decoder.spec.vocab_size * torch.float32.itemsize
    pages = _num_pages(room) * PAGE_SIZE * kv_bytes_per_token(blocks, dtype)
    return pages + recurrent_bytes_per_sequence(blocks, dtype) + logits


@torch.inference_mode()
def measure_speed(
    decoder: Decoder,
    cases: Sequence[Case],
    *,
    num_rounds: int,
    progress: Progress = lambda done, total, turn: None,
) -> tuple[Limits, list[Speed]]:
    """Return the limits of the machine and the speed of each case, medians over rounds, on torch's threads.

    cases: by depth. A round measures the limits and then each case of one depth, so that whatever else the machine does
    meets all alike.
    """
    num_threads, arithmetic = torch.get_num_threads(), arithmetic_of(decoder)
    sequences = Sequences(decoder, num=max(case.batch for case in cases), room=max(case.room for case in cases))
    num_turns, total = 0, len(cases) * (1 + num_rounds)
    bandwidths, rates, speeds = [], [], []
    for depth, group in groupby(cases, key=lambda case: case.depth):
        progress(num_turns, total, f"reading up to depth {depth:,}")
        sequences.deepen(depth)
        works: dict[Case, Work] = {}
        for case in group:
            progress(num_turns, total, case.name)
            works[case] = sequences.count_steps(case)
            num_turns += 1
        seconds: dict[Case, list[float]] = {case: [] for case in works}
        for _ in range(num_rounds):
            bandwidths.append(read_bandwidth(num_threads))
            rates.append(product_rate(arithmetic, num_threads))
            for case, measured in seconds.items():
                progress(num_turns, total, case.name)
                measured.append(sequences.time_steps(case))
                num_turns += 1
        speeds += [_speed(case, work, median(seconds[case])) for case, work in works.items()]
    limits = Limits(
        read_bytes_per_s=median(bandwidths),
        operations_per_s=median(rates),
        arithmetic=arithmetic,
    )
    return limits, speeds


def arithmetic_of(decoder: Decoder) -> Arithmetic:
    """Return what most of a decoder's weights are multiplied as."""
    num_bytes: dict[str, int] = {}
    for packed in decoder.packed_weights().values():
        num_bytes[packed.format] = num_bytes.get(packed.format, 0) + packed.nbytes
    if not num_bytes or kernels() is None:
        return "float32"
    most = max(num_bytes, key=num_bytes.__getitem__)
    return "float32" if most == "BF16" else "eight_bits" if most == "Q8_0" else "up_to_six_bits"


def _speed(case: Case, work: Work, seconds: float) -> Speed:
    return Speed(
        case=case,
        tokens_per_s=case.num_tokens / seconds,
        step_s=seconds / work.num_steps,
        read_bytes=work.read_bytes / case.num_tokens,
        operations=work.operations / case.num_tokens,
        num_experts=mean(work.num_experts) if work.num_experts else None,
    )


class Sequences:
    """Sequences that begin with the same tokens, each with a slot and pages of its own.

        sequence 0   t0 t1 ... | what a case adds, and the next one overwrites
        sequence 1   t0 t1 ... |
                               depth

    The first is read by the model, the others are copies of its states. Tokens are random: what a model happens to say
    shall not decide how many experts a batch meets.
    """

    def __init__(self, decoder: Decoder, *, num: int, room: int):
        self._decoder = decoder
        self._random = torch.Generator().manual_seed(0)
        num_pages = _num_pages(room)
        self._pages = [range(first, first + num_pages) for first in range(0, num * num_pages, num_pages)]
        self._states = decoder.allocate_states(Capacity(num_slots=num, num_pages=num * num_pages, page_size=PAGE_SIZE))
        for pool in self._pools():
            pool.zero_()  # so that no timed step waits for the system to hand out memory
        self._depth = 0
        self._keep_recurrent()

    def deepen(self, depth: int) -> None:
        """Have every sequence read on up to a depth."""
        assert depth >= self._depth, "a recurrent state cannot go back"
        self._rewind()
        while self._depth < depth:
            tokens_T = self._draw(min(PREFILL_TOKENS, depth - self._depth))
            self._decoder(tokens_T, self._layout([len(tokens_T)], self._depth), self._states)
            self._depth += len(tokens_T)
        for pool in self._pools():
            for pages in self._pages[1:]:
                pool[pages.start : pages.start + _num_pages(depth)] = pool[: _num_pages(depth)]
        self._keep_recurrent()

    def count_steps(self, case: Case) -> Work:
        """Return what the steps that `time_steps` times ask of the machine, counted while they run, which warms up."""
        self._rewind()
        counting = CountingDecoder(self._decoder)
        self._run(counting, case, self._draw(case.num_tokens), self._depth)
        return counting.work

    def time_steps(self, case: Case) -> float:
        """Return the seconds of reading a prompt and choosing what follows, or of one step of writing."""
        self._rewind()
        if case.prompt:
            tokens_T = self._draw(case.prompt)
            start = time.perf_counter()
            self._run(self._decoder, case, tokens_T, self._depth)
            return time.perf_counter() - start
        tokens_SB = self._draw(DECODE_ROOM, case.batch)
        self._run(self._decoder, case, tokens_SB[0], self._depth)
        start = time.perf_counter()
        for step in range(1, DECODE_ROOM):
            self._run(self._decoder, case, tokens_SB[step], self._depth + step)
            seconds = time.perf_counter() - start
            if step >= MIN_STEPS and seconds >= ROUND_S:
                break
        return seconds / step

    def _run(self, decoder: Decoder | CountingDecoder, case: Case, tokens_T: Tensor, context: int) -> list[int]:
        """Return the likeliest next token of each sequence, after a prompt in parts or one token each."""
        for part_T in tokens_T.split(PREFILL_TOKENS if case.prompt else case.batch):
            lengths = [len(part_T)] if case.prompt else [1] * case.batch
            logits_BV = decoder.predict(part_T, self._layout(lengths, context), self._states)
            context += len(part_T)
        found = sample_rows(list(logits_BV), [Drawing()] * len(logits_BV))
        return found

    def _layout(self, lengths: Sequence[int], context: int) -> Layout:
        num = len(lengths)
        return Layout.step(lengths, [context] * num, slots=range(num), pages=self._pages[:num], page_size=PAGE_SIZE)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randint(self._decoder.spec.vocab_size, shape, generator=self._random)

    def _pools(self) -> list[Tensor]:
        states = [state for state in self._states if isinstance(state, PagedKV)]
        return [pool for state in states for pool in state.pools]

    def _keep_recurrent(self) -> None:
        """Remember the first sequence's recurrent states as those of its depth."""
        states = [state for state in self._states if isinstance(state, Recurrent)]
        self._kept = [(state, state.conv_tail[0].clone(), state.ssm[0].clone()) for state in states]

    def _rewind(self) -> None:
        """Put every sequence back to its depth; keys and values beyond it are never read."""
        for state, conv_tail, ssm in self._kept:
            state.conv_tail[:] = conv_tail
            state.ssm[:] = ssm


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)
