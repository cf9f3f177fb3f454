"""What steps of a model ask of the machine: the bytes they read, and the operations of their products.

Belongs here: counting, on the tokens of a real step. Not here: how long a step takes, and what the machine can do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from freehold.engine.plan import count_parts, part_of
from freehold.models.block import Block
from freehold.models.decoder import Decoder
from freehold.models.layout import Layout, State, kv_bytes_per_token, recurrent_bytes_per_sequence
from freehold.models.moe import Moe
from freehold.models.spec import BlockSpec, MoeSpec
from freehold.ops.moe import route, router_logits

HEADS = ("head", "embeddings and head")
NOT_READ = ("embeddings", "mtp")  # one row of the table for each token; drafts are not made


@dataclass(kw_only=True)
class Work:
    """What steps asked for.

    read_bytes: weights as they are held, once a step however many tokens share them, and of experts those that were
        chosen; keys and values; recurrent states. What is written does not count.
    operations: two for each weight that a token meets. Attention and the scan do not count.
    num_experts: distinct experts, for each step and block that has some.
    """

    num_steps: int = 0
    read_bytes: float = 0.0
    operations: float = 0.0
    num_experts: list[int] = field(default_factory=list)


class CountingDecoder:
    """A decoder that runs block by block and counts what that asks of the machine; its results are the decoder's."""

    def __init__(self, decoder: Decoder):
        self.work = Work()
        self._decoder = decoder
        spec = decoder.spec
        active = {part.name: part.num_active for part in count_parts(spec)}
        self._head_active = sum(count for name, count in active.items() if name in HEADS)
        self._body_active = sum(active.values()) - self._head_active
        self._head_bytes = self._body_bytes = 0
        self._expert_bytes = [0.0] * len(spec.blocks)
        for name, num_bytes in held_bytes(decoder):
            part = part_of(name, spec)
            if part == "head" or (part == "embeddings" and spec.tied_embeddings):
                self._head_bytes += num_bytes
            elif part == "routed experts":
                index = int(name.split(".")[1])
                self._expert_bytes[index] += num_bytes / _num_experts(spec.blocks[index])
            elif part not in NOT_READ:
                self._body_bytes += num_bytes
        self._token_bytes = kv_bytes_per_token(spec.blocks, decoder.dtype)
        self._sequence_bytes = recurrent_bytes_per_sequence(spec.blocks, decoder.dtype)

    def __call__(self, tokens_T: Tensor, layout: Layout, states: Sequence[State]) -> Tensor:
        """Return the hidden states after the final norm, [T, D]. Mutates: states, `work`."""
        hidden_TD = self._decoder.embeddings(tokens_T)
        for block, state, expert_bytes in zip(self._decoder.blocks, states, self._expert_bytes, strict=True):
            if expert_bytes:
                num_experts = count_experts(block, hidden_TD)
                self.work.num_experts.append(num_experts)
                self.work.read_bytes += num_experts * expert_bytes
            hidden_TD = block(hidden_TD, layout, state)
        self.work.num_steps += 1
        self.work.read_bytes += self._body_bytes
        self.work.read_bytes += sum(layout.ends) * self._token_bytes + layout.num_sequences * self._sequence_bytes
        self.work.operations += 2 * self._body_active * len(tokens_T)
        return self._decoder.norm(hidden_TD)

    def predict(self, tokens_T: Tensor, layout: Layout, states: Sequence[State]) -> Tensor:
        """Return float32 logits [B, V] of what follows each sequence's last token. Mutates: states, `work`."""
        hidden_TD = self(tokens_T, layout, states)
        self.work.read_bytes += self._head_bytes
        self.work.operations += 2 * self._head_active * layout.num_sequences
        return self._decoder.logits(hidden_TD[torch.tensor(layout.starts[1:]) - 1])


def count_experts(block: nn.Module, hidden_TD: Tensor) -> int:
    """Return how many distinct experts the tokens that enter a block of experts are given to."""
    assert isinstance(block, Block), f"{type(block)} is no block"
    assert isinstance(block.mixer, Moe), "only such a block has experts"
    mixer, spec = block.mixer, block.mixer.spec
    experts_TX, _ = route(
        router_logits(block.norm(hidden_TD), mixer.gate.weight),
        mixer.gate.e_score_correction_bias,
        num_chosen=spec.num_chosen,
        num_groups=spec.num_groups,
        num_chosen_groups=spec.num_chosen_groups,
        normalize_weights=spec.normalize_weights,
        scale=spec.scale,
    )
    return experts_TX.unique().numel()


def _num_experts(spec: BlockSpec) -> int:
    assert isinstance(spec, MoeSpec), "only such a block has experts"
    return spec.num_experts


def held_bytes(decoder: Decoder) -> Iterator[tuple[str, int]]:
    """Yield the name of each weight with the bytes that it takes in memory; one that is shared comes once."""
    for name, parameter in decoder.named_parameters():
        yield name, parameter.nbytes
    for name, packed in decoder.packed_weights().items():
        yield name, packed.nbytes


def held_formats(decoder: Decoder) -> dict[str, int]:
    """Return the bytes of weights by the format that they are held in, largest first."""
    counted: dict[str, int] = {}
    for parameter in decoder.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        counted[name] = counted.get(name, 0) + parameter.nbytes
    for packed in decoder.packed_weights().values():
        counted[packed.format] = counted.get(packed.format, 0) + packed.nbytes
    return dict(sorted(counted.items(), key=lambda item: -item[1]))
