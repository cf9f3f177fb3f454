"""The laws of the design that hold for any model, each checked on the model itself and reported with what it measured.

Belongs here: one function per law, and what runs a sequence in different ways. Not here: how a finding is shown, and
law 1, which needs another implementation as witness and is a test.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from freehold.models.block import Block
from freehold.models.decoder import Decoder
from freehold.models.layout import Capacity, Layout, PagedKV, Recurrent, State
from freehold.models.names import TensorNames
from freehold.models.spec import MoeSpec
from freehold.ops.attention import PAGE_TOKENS
from freehold.ops.native import native_report
from freehold.ops.weight import Packed, dense, is_quantized

# Relative distances between two ways to compute the same numbers, on the torch references; the native kernels give the
# same bits. A matrix product of torch may sum in another order when it has
# more rows: that is some units in the last place (6e-8 and 4e-3), grown over the depth of a model. The sixty blocks of
# SmolLM2 come to 5e-6 and 3e-2.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where two experts have almost the same score, a rounding to 16 bits decides which one is chosen, and the token is off
# by what the two say differently.
ROUTED_HALF_TOLERANCE = 0.25
# A block's native call against its ops one by one: sums in another order, and for bfloat16 fewer roundings.
TWIN_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 3e-2}
# Quantized weights meet activations rounded to 8 bits: a last bit before that rounding may be an eighth one after it.
QUANTIZED_TOLERANCE = 2e-2

LENGTH = 80  # tokens of the sequence that the laws look at: three pages
PAGE_SIZE = PAGE_TOKENS
NAMES_SHOWN = 3

Progress = Callable[[int, int, str], None]  # laws done, laws in all, the law that is next


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of checking one law.

    measured: the largest relative difference, where the law compares numbers. tolerance: how much it may be.
    """

    law: str
    claim: str
    holds: bool
    measured: float | None
    tolerance: float | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a model makes of one sequence: its hidden states [L, D], and the states that it leaves behind."""

    hidden_LD: Tensor
    states: tuple[Tensor, ...] = ()


def check_laws(
    decoder: Decoder, names: TensorNames, *, seed: int, progress: Progress = lambda done, total, law: None
) -> Iterator[Finding]:
    """Yield a finding for each law, in the order of their cost.

    names: the rules by which this decoder is saved.
    """
    laws: dict[str, Callable[[], Finding]] = {
        "finite weights": partial(finite_weights, decoder),
        "twin": partial(twin, decoder, seed=seed),
        "round trip": partial(round_trip, decoder, names),
        "prefill = decode": partial(prefill_equals_decode, decoder, seed=seed),
        "company": partial(company, decoder, seed=seed),
    }
    for done, (law, check) in enumerate(laws.items()):
        progress(done, len(laws), law)
        yield check()


def finite_weights(decoder: Decoder) -> Finding:
    """Return whether every weight is a finite number, naming the parameters where one is not."""
    weights = dict(decoder.named_parameters()) | decoder.weights()
    counts = {
        name: sum(int((~m.isfinite()).sum()) for m in (w.matrices() if isinstance(w, Packed) else (w,)))
        for name, w in weights.items()
    }
    wrong = {name: count for name, count in counts.items() if count}
    first = ", ".join(f"{name} ({count})" for name, count in list(wrong.items())[:NAMES_SHOWN])
    more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
    return Finding(
        law="finite weights",
        claim="no weight is NaN or infinite",
        holds=not wrong,
        measured=None,
        tolerance=None,
        detail=f"NaN or infinite: {first}{more}" if wrong else f"{len(weights)} parameters",
    )


def prefill_equals_decode(decoder: Decoder, *, seed: int) -> Finding:
    """Return whether tokens at once, one by one and in any parts give the same hidden values and the same states."""
    random = torch.Generator().manual_seed(seed)
    tokens_L = _random_tokens(decoder, LENGTH, random)
    whole = trace(decoder, tokens_L, parts=[LENGTH])
    stateless = Trace(hidden_LD=_hidden(decoder, [tokens_L])[0])
    ways = {"without state": _difference(Trace(hidden_LD=whole.hidden_LD), stateless)}
    splits = {"one by one": [1] * LENGTH} | {
        f"parts of {parts}": parts for parts in (_random_parts(LENGTH, random) for _ in range(3))
    }
    for way, parts in splits.items():
        ways[way] = _difference(trace(decoder, tokens_L, parts=parts), whole)
    return _compared("prefill = decode", "a sequence in any parts gives the same values and states", decoder, ways)


def company(decoder: Decoder, *, seed: int) -> Finding:
    """Return whether a sequence gives the same values alone, anywhere among others, and on any number of threads."""
    random = torch.Generator().manual_seed(seed)
    subject_L = _random_tokens(decoder, LENGTH, random)
    others = [_random_tokens(decoder, length, random) for length in (1, PAGE_SIZE + 1, 7)]
    alone = Trace(hidden_LD=_hidden(decoder, [subject_L])[0])
    places = {"packed first": 0, "packed in the middle": 2, "packed last": 3}
    ways = {
        way: _difference(Trace(hidden_LD=_hidden(decoder, [*others[:p], subject_L, *others[p:]])[p]), alone)
        for way, p in places.items()
    }
    parts = [LENGTH - 3, 1, 1, 1]
    stepped = trace(decoder, subject_L, parts=parts)
    ways["stepped in a batch"] = _difference(trace(decoder, subject_L, parts=parts, neighbours=others), stepped)
    for num_threads in (1, 2):
        with _Threads(num_threads):
            traced = trace(decoder, subject_L, parts=parts)
        ways[f"threads: {num_threads}"] = _difference(traced, stepped)
    return _compared("company", "a sequence gives the same values in any company", decoder, ways)


def round_trip(decoder: Decoder, names: TensorNames) -> Finding:
    """Return whether the tensors that would be saved give back the parameters, bit for bit; quantized ones are not."""
    parameters = decoder.weights()
    quantized = {name for name, weight in parameters.items() if is_quantized(weight)}
    rules = [rule for rule in names.rules if rule.parameter not in quantized]
    unnamed = sorted((parameters.keys() - quantized) ^ {rule.parameter for rule in rules})
    changed, num_stored = [], 0
    for rule in rules:
        parameter = dense(parameters[rule.parameter], decoder.dtype).detach()
        parts = rule.stored_parts(parameter)
        loaded = [rule.transform.load(stored) for _, stored in parts]
        pairs = zip(loaded, parameter.unbind() if rule.is_stack else [parameter], strict=True)
        num_stored += len(parts)
        if not all(_same_bits(back, part) for back, part in pairs):
            changed.append(rule.parameter)
    wrong = unnamed + changed
    return Finding(
        law="round trip",
        claim="saving and loading gives the same bits",
        holds=not wrong,
        measured=None,
        tolerance=None,
        detail=f"changed or without a rule: {', '.join(wrong[:NAMES_SHOWN])}"
        if wrong
        else _round_trip_detail(num_stored, len(quantized)),
    )


def _round_trip_detail(num_stored: int, num_quantized: int) -> str:
    return f"{num_stored} tensors" + (f", {num_quantized} quantized ones aside" if num_quantized else "")


@torch.inference_mode()
def twin(decoder: Decoder, *, seed: int) -> Finding:
    """Return whether each block's native call equals its ops one by one, on hidden states of random tokens."""
    form = native_report() if decoder.is_native() else "off"
    distances = _twin_distances(decoder, seed) if form != "off" else {}
    worst = _furthest(distances) if distances else ""
    tolerance = (
        QUANTIZED_TOLERANCE
        if any(map(is_quantized, decoder.packed_weights().values()))
        else TWIN_TOLERANCES[decoder.dtype]
    )
    return Finding(
        law="twin",
        claim="native kernels equal their references",
        holds=not distances or distances[worst] <= tolerance,
        measured=distances.get(worst),
        tolerance=tolerance if distances else None,
        detail=f"{form}, {len(distances)} blocks, worst {worst}" if distances else "the references run themselves",
    )


def _twin_distances(decoder: Decoder, seed: int) -> dict[str, float]:
    """Return, for each block, the difference of what it adds to the hidden states that reach it."""
    tokens_L = _random_tokens(decoder, LENGTH, torch.Generator().manual_seed(seed))
    layout, hidden_TD = Layout.packed([LENGTH]), decoder.embeddings(tokens_L).to(decoder.dtype)
    distances = {}
    for index, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        expected_TD = block.reference(hidden_TD.clone(), layout, None)
        found_TD = block(hidden_TD.clone(), layout, None)
        distances[f"block {index}"] = relative_difference(found_TD - hidden_TD, expected_TD - hidden_TD)
        hidden_TD = found_TD
    return distances


@torch.inference_mode()
def trace(
    decoder: Decoder,
    tokens_L: Tensor,
    *,
    parts: Sequence[int],
    neighbours: Sequence[Tensor] = (),
    page_size: int = PAGE_SIZE,
) -> Trace:
    """Return what the model makes of a sequence that comes in parts, its state carried from each to the next.

    neighbours: sequences that take all their tokens with the first part and then repeat their last one, a token a step.
    Its pages lie scattered among those of its neighbours, and its slot is the last.
    """
    assert sum(parts) == len(tokens_L), f"parts {parts} of {len(tokens_L)} tokens"
    sequences = [*neighbours, tokens_L]
    contexts = [0] * len(sequences)
    totals = [len(tokens) + len(parts) for tokens in sequences]
    pages = _scattered_pages([-(-total // page_size) for total in totals])
    states = decoder.allocate_states(
        Capacity(num_slots=len(sequences), num_pages=sum(map(len, pages)), page_size=page_size)
    )
    outputs = []
    for end, length in zip(accumulate(parts), parts, strict=True):
        repeated = [tokens[-1:] if contexts[i] else tokens for i, tokens in enumerate(neighbours)]
        step = [*repeated, tokens_L[end - length : end]]
        layout = Layout.step(
            [len(tokens) for tokens in step],
            contexts,
            slots=range(len(sequences)),
            pages=pages,
            page_size=page_size,
            device=decoder.device,
        )
        outputs.append(decoder(torch.cat(step), layout, states)[-length:])
        contexts = list(layout.ends)
    found = [part for state in states for part in _state_parts(state, pages[-1], len(tokens_L))]
    return Trace(hidden_LD=torch.cat(outputs), states=tuple(found))


def _scattered_pages(counts: Sequence[int]) -> list[list[int]]:
    """Return page numbers for each sequence, dealt out in turn from the last to the first: none are in order."""
    free = list(range(sum(counts)))
    pages: list[list[int]] = [[] for _ in counts]
    while free:
        for row, count in zip(pages, counts, strict=True):
            if len(row) < count:
                row.append(free.pop())
    return pages


def _state_parts(state: State, pages: Sequence[int], length: int) -> list[Tensor]:
    """Return what one block keeps of the last sequence."""
    match state:
        case PagedKV():
            return [part[:length] for part in state.read(pages)]
        case Recurrent():
            return [state.conv_tail[-1], state.ssm[-1]]
        case _:
            return []


@torch.inference_mode()
def _hidden(decoder: Decoder, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states of each of the packed sequences."""
    lengths = [len(tokens) for tokens in sequences]
    hidden_TD = decoder(torch.cat(list(sequences)), Layout.packed(lengths, decoder.device))
    return list(hidden_TD.split(lengths))


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """Return the length of the difference over the length of what was expected; NaN where either holds one."""
    distance = torch.linalg.vector_norm(value.double() - expected.double())
    return float(distance / torch.linalg.vector_norm(expected.double()).clamp(min=1e-30))


def _difference(found: Trace, expected: Trace) -> float:
    """Return the largest difference of hidden states and states, NaN where there is one."""
    pairs = zip((found.hidden_LD, *found.states), (expected.hidden_LD, *expected.states), strict=True)
    return float(torch.tensor([relative_difference(a, b) for a, b in pairs]).max())  # max keeps NaN


def _compared(law: str, claim: str, decoder: Decoder, ways: dict[str, float]) -> Finding:
    is_routed = any(isinstance(block, MoeSpec) for block in decoder.spec.blocks)
    rounds_choice = is_routed and decoder.dtype is not torch.float32
    tolerance = ROUTED_HALF_TOLERANCE if rounds_choice else TOLERANCES[decoder.dtype]
    if decoder.is_native():
        tolerance = 0.0
    worst = _furthest(ways)
    num_same = sum(distance == 0 for distance in ways.values())
    return Finding(
        law=law,
        claim=claim,
        holds=ways[worst] <= tolerance,
        measured=ways[worst],
        tolerance=tolerance,
        detail=f"{num_same} of {len(ways)} ways without any difference, worst: {worst}",
    )


def _furthest(distances: dict[str, float]) -> str:
    """Return the name of the largest distance; NaN is larger than any."""
    return max(distances, key=lambda name: (distances[name] != distances[name], distances[name]))


def _random_tokens(decoder: Decoder, length: int, random: torch.Generator) -> Tensor:
    return torch.randint(decoder.spec.vocab_size, (length,), generator=random).to(decoder.device)


def _random_parts(length: int, random: torch.Generator) -> list[int]:
    """Return lengths of one token or more that add up to `length`."""
    cuts = (torch.randperm(length - 1, generator=random)[:4] + 1).sort().values.tolist()
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]


def _same_bits(first: Tensor, second: Tensor) -> bool:
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


class _Threads:
    """A number of threads for torch while a `with` statement lasts."""

    def __init__(self, num_threads: int):
        self._num_threads = num_threads

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._before)
