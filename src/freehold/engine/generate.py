"""Plain generation for one sequence: prefill, then one token at a time. Many at once are the engine's work."""

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor

from freehold.engine.draw import Place, draw
from freehold.engine.request import SamplingParams
from freehold.errors import BadInput, BadRequest, TooLong
from freehold.models.decoder import Decoder
from freehold.models.layout import Capacity, Layout, PagedKV, States

PREFILL_TOKENS = 512  # at once: bounds the memory of a step, and how long Ctrl-C waits
PAGE_SIZE = 256  # tokens; a sequence has twice as many pages whenever it has filled them


class Continuation:
    """One sequence and its state: it reads tokens and says what may come next."""

    def __init__(self, decoder: Decoder, room_tokens: int):
        self._decoder = decoder
        self._num_tokens = 0
        self._num_pages = -(-room_tokens // PAGE_SIZE)
        with torch.inference_mode():
            self._states = decoder.allocate_states(
                Capacity(num_slots=1, num_pages=self._num_pages, page_size=PAGE_SIZE)
            )

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Return float32 logits [V] for what follows after these further tokens. Mutates: this sequence's state."""
        assert tokens, "there is nothing to read"
        for begin in range(0, len(tokens), PREFILL_TOKENS):
            logits_V = self._step(tokens[begin : begin + PREFILL_TOKENS])
        return logits_V

    def _step(self, tokens: Sequence[int]) -> Tensor:
        """Return logits [V]."""
        while self._num_tokens + len(tokens) > self._num_pages * PAGE_SIZE:
            self._num_pages *= 2
            self._states = States(
                state.grown(self._num_pages) if isinstance(state, PagedKV) else state for state in self._states
            )
        device = self._decoder.device
        layout = Layout.step(
            [len(tokens)],
            [self._num_tokens],
            slots=[0],
            pages=[range(self._num_pages)],
            page_size=PAGE_SIZE,
            device=device,
        )
        logits_BV = self._decoder.predict(torch.tensor(tokens, device=device), layout, self._states)
        self._num_tokens += len(tokens)
        return logits_BV[0]


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    stop_ids: Set[int] = frozenset(),
    num_ids: int | None = None,
) -> Iterator[int]:
    """Yield the ids that follow the prompt, up to a stop id (yielded as the last), `max_tokens` or the context's end.

    num_ids: how many ids the tokenizer has; a vocabulary padded beyond them is not drawn from.
    Raises: BadRequest for a prompt that is empty, holds unknown ids, or leaves no room in the context; BadInput where
        the weights are broken, so that logits are no numbers.
    """
    check_prompt(decoder, prompt, room_tokens=1)
    stops = sampling.end_ids(stop_ids)
    room = decoder.spec.max_positions - len(prompt)
    num_tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    continuation = Continuation(decoder, room_tokens=len(prompt) + PAGE_SIZE)
    logits_V = continuation.read(prompt)
    answer: list[int] = []
    while True:
        banned = stops if len(answer) < sampling.min_tokens else ()
        place = Place(logits_V=logits_V[:num_ids], prompt=prompt, answer=answer, sampling=sampling, banned=banned)
        (token,) = draw([place])
        if isinstance(token, BadInput):
            raise token
        answer.append(token)
        yield answer[-1]
        if answer[-1] in stops or len(answer) == num_tokens:
            return
        logits_V = continuation.read(answer[-1:])


def check_prompt(decoder: Decoder, prompt: Sequence[int], *, room_tokens: int) -> None:
    """Refuse a prompt that cannot be read, or that leaves too little room for an answer.

    Raises: BadRequest.
    """
    limit, vocab_size = decoder.spec.max_positions, decoder.spec.vocab_size
    if len(prompt) == 0:
        raise BadRequest("the prompt is empty")
    if len(prompt) + room_tokens > limit:
        raise TooLong(
            f"the prompt has {len(prompt)} tokens, the model's context is {limit} with room for an answer",
            hint="shorten the prompt, or start a new conversation",
        )
    for token in prompt:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadRequest(f"the prompt has the id {token!r:.60}, wanted are integers from 0 to {vocab_size - 1}")
