"""The one decoder of all families: embeddings, residual blocks, a final norm, an output head."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from freehold.models.block import Block, RmsNorm
from freehold.models.layout import Capacity, Layout, State, States, allocate_states
from freehold.models.linear import Embedding, Head, set_weight
from freehold.models.mtp import Mtp
from freehold.models.spec import DecoderSpec
from freehold.ops.mixers import Program, can_run
from freehold.ops.weight import Adapted, Packed


class Decoder(nn.Module):
    """A language model as its spec describes it, uninitialised; build it on the meta device to measure it for free."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.spec = spec
        self.embeddings = Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleList(
            Block(block, spec.width, norm_eps=spec.norm_eps, norm_order=spec.norm_order) for block in spec.blocks
        )
        self.norm = RmsNorm(spec.width, spec.norm_eps, spec.norm_order)
        self.lm_head = Head(spec.width, spec.vocab_size)
        self.tie_embeddings()
        self.mtp = Mtp(spec.mtp, spec) if spec.mtp else None

    def tie_embeddings(self) -> None:
        """Make the output head share the embeddings' weight, where the spec says so."""
        if self.spec.tied_embeddings and self.lm_head.weight is not self.embeddings.weight:
            set_weight(self.lm_head, "weight", self.embeddings.weight)

    def forward(self, tokens_T: Tensor, layout: Layout, states: Sequence[State] | None = None) -> Tensor:
        """Return the hidden states after the final norm, [T, D].

        Mutates: `states`, one entry per block; without them every sequence starts anew and nothing is kept.
        """
        if program := self._program(states):
            return program.read(tokens_T, layout.batch, self.dtype)
        hidden_TD = self.embeddings(tokens_T).to(self.dtype)  # rows of a packed table come in float32
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            hidden_TD = block(hidden_TD, layout, state)
        return self.norm(hidden_TD)

    def predict(self, tokens_T: Tensor, layout: Layout, states: Sequence[State] | None = None) -> Tensor:
        """Return float32 logits [B, V] of what follows each sequence's last token.

        Mutates: `states`, as `forward` does.
        """
        if program := self._program(states):
            return program.predict(tokens_T, layout.batch, self.dtype).float()
        last_B = torch.tensor(layout.starts[1:], device=tokens_T.device) - 1
        return self.logits(self(tokens_T, layout, states)[last_B])

    def is_native(self) -> bool:
        """Return whether the kernels can take every block: then results are the same bits in any company."""
        blocks = cast(Iterable[Block], self.blocks)
        ends = (self.embeddings.weight, self.norm.weight, self.lm_head.weight)
        return can_run(ends) and all(block.is_native() for block in blocks)

    def _program(self, states: Sequence[State] | None) -> Program | None:
        """Return this decoder as one call over these states, None where the kernels cannot take it or a gradient may be
        wanted."""
        if not isinstance(states, States) or torch.is_grad_enabled():
            return None
        if states.program and not states.program.is_current:
            states.program = None
        if states.program is None and self.is_native():
            program = Program()
            program.set_ends(embeddings=self.embeddings.weight, norm=self.norm.for_kernels, head=self.lm_head.weight)
            for block, state in zip(cast(Iterable[Block], self.blocks), states, strict=True):
                block.add_to(program, state)
            states.program = program
        return states.program

    def packed_weights(self) -> dict[str, Packed]:
        """Return the weights that are packed, by the names that their parameters would have; a tied head once."""
        return {name: weight for name, weight in self.weights().items() if isinstance(weight, Packed)}

    def weights(self) -> dict[str, Tensor | Packed]:
        """Return every weight by the name that it has as a parameter, adapters left out; a tied head once."""
        aside = {
            f"{path}.{name}": value
            for path, module in self.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Packed | Adapted) and not (path == "lm_head" and self.spec.tied_embeddings)
        }
        bases = {name: value.base if isinstance(value, Adapted) else value for name, value in aside.items()}
        added = {id(part) for value in aside.values() if isinstance(value, Adapted) for part in (value.a, value.b)}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) not in added} | bases

    @property
    def has_adapter(self) -> bool:
        """Whether any weight has an adapter beside it."""
        return any(isinstance(value, Adapted) for module in self.modules() for value in vars(module).values())

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return float32 logits [T, V] of hidden states after the final norm."""
        return self.lm_head(hidden_TD).float()

    def allocate_states(self, capacity: Capacity, *, kv_dtype: torch.dtype | None = None) -> States:
        """Return fresh states for this model, on its device and in its dtype; keys and values in another where said."""
        return allocate_states(self.spec.blocks, capacity, dtype=self.dtype, device=self.device, kv_dtype=kv_dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device


def build_decoder(spec: DecoderSpec, *, dtype: torch.dtype) -> Decoder:
    """Return a decoder on the meta device, in `dtype` but for `float32_parameter`s."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not hasattr(parameter, "stays_float32"):
                setattr(module, name, nn.Parameter(parameter.to(dtype)))
    decoder.tie_embeddings()
    return decoder
