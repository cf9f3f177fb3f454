"""A decoder that says what a test wants, where no real model would."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freehold.models.layout import Capacity, Layout, State
from freehold.models.spec import DecoderSpec
from models.tiny import LLAMA, tiny_spec


class ScriptedDecoder:
    """Answers any prompt with fixed ids, the last of them for ever; its hidden state is the token's position.

    say: called with the logits [V] of each step, may change them in place.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(
        self,
        script: Sequence[int] = (0,),
        *,
        spec: DecoderSpec | None = None,
        say: Callable[[Tensor], object] = lambda logits_V: None,
    ):
        self.spec = spec or tiny_spec(LLAMA)
        self.num_read = 0
        self._script, self._say = list(script), say
        self._prompt_ends: dict[int, int] = {}  # by slot

    def allocate_states(self, capacity: Capacity, *, kv_dtype: torch.dtype | None = None) -> list[State]:
        return []

    def predict(self, tokens_T: Tensor, layout: Layout, states: Sequence[State] | None = None) -> Tensor:
        self.num_read += layout.num_tokens
        logits_BV = torch.zeros(layout.num_sequences, self.spec.vocab_size)
        for row_V, slot, context, end in zip(logits_BV, layout.slots, layout.contexts, layout.ends, strict=True):
            if context == 0 or end - context > 1:
                self._prompt_ends[slot] = end
            index = end - self._prompt_ends[slot]
            row_V[self._script[min(index, len(self._script) - 1)]] = 50.0
            self._say(row_V)
        return logits_BV
