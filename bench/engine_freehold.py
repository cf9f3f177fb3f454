"""Freehold as the benchmarks run it."""

import time
from pathlib import Path

import freehold  # first, for it has torch's threads sleep between its loops

# isort: split
import torch
from engine_process import Prompt
from torch import Tensor

from freehold.checkpoint.load import default_dtype, load_decoder, open_described
from freehold.engine.generate import Continuation
from freehold.models.decoder import Decoder
from freehold.models.layout import Capacity, Layout, States
from freehold.ops.sampling import Drawing, sample_rows

PAGE_SIZE = 256  # tokens


def open_engine(path: Path, *, weights: str, num_threads: int) -> "FreeholdEngine":
    """Return the engine."""
    torch.set_num_threads(num_threads)
    return FreeholdEngine(load_freehold(path, weights))


def load_freehold(path: Path, weights: str) -> Decoder:
    """Return the decoder of a checkpoint. weights: a dtype, or `stored` for what `freehold run` takes by itself."""
    source, described = open_described(path)
    device = torch.device("cpu")
    dtype = default_dtype(described, device) if weights == "stored" else getattr(torch, weights)
    with source:
        return load_decoder(source, described, dtype=dtype, device=device, keep_packed=weights == "stored")[0]


class FreeholdEngine:
    """One sequence through `Continuation`, several through the decoder and paged states, as a scheduler would."""

    version = freehold.__version__

    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds from ids to the logits after the last of them."""
        continuation = Continuation(self._decoder, room_tokens=_rounded_up(len(prompt)))
        start = time.perf_counter()
        continuation.read(prompt)
        return time.perf_counter() - start

    def decode(self, prompt: Prompt, num_steps: int) -> float:
        """Return the seconds of so many steps of one sequence."""
        continuation = Continuation(self._decoder, room_tokens=_rounded_up(len(prompt) + num_steps))
        (token,) = _likeliest(continuation.read(prompt)[None])
        start = time.perf_counter()
        for _ in range(num_steps):
            (token,) = _likeliest(continuation.read([token])[None])
        return time.perf_counter() - start

    @torch.inference_mode()
    def batch(self, prompts: list[Prompt], num_steps: int) -> float:
        """Return the seconds of so many steps of all sequences together."""
        pages_each = _rounded_up(len(prompts[0]) + num_steps) // PAGE_SIZE
        pages = [range(b * pages_each, (b + 1) * pages_each) for b in range(len(prompts))]
        capacity = Capacity(num_slots=len(prompts), num_pages=len(prompts) * pages_each, page_size=PAGE_SIZE)
        states = self._decoder.allocate_states(capacity)
        contexts = [0] * len(prompts)
        tokens = self._step(prompts, contexts, pages, states)
        start = time.perf_counter()
        for _ in range(num_steps):
            tokens = self._step([[token] for token in tokens], contexts, pages, states)
        return time.perf_counter() - start

    def _step(self, new: list[Prompt], contexts: list[int], pages: list[range], states: States) -> list[int]:
        """Return the likeliest next token of each sequence. Mutates: contexts and states."""
        lengths = [len(tokens) for tokens in new]
        layout = Layout.step(lengths, contexts, slots=range(len(new)), pages=pages, page_size=PAGE_SIZE)
        tokens_T = torch.tensor([token for tokens in new for token in tokens])
        contexts[:] = layout.ends
        return _likeliest(self._decoder.predict(tokens_T, layout, states))


def _likeliest(logits_BV: Tensor) -> list[int]:
    return sample_rows(list(logits_BV), [Drawing()] * len(logits_BV))


def _rounded_up(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE) * PAGE_SIZE
