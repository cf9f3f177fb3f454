"""Context parallelism: every process has some consecutive tokens of a batch, and whole weights.

    whole      a0 a1 a2 a3 a4 | b0 b1 b2      two documents, packed
    process 0  a0 a1 a2 a3
    process 1  a4 | b0 b1 b2                  the first document goes on: 4 of its tokens are elsewhere

Attention fetches the keys and values of those tokens, the convolution of Mamba-2 their last rows, its scan the state
behind them. A scan is linear in the state that it begins with, so all processes scan at once, from zero; what they
lack is added when the states have come:

    S_before = sum over earlier parts p of (decay of all parts between) * S_p
    y_l += c_l · (decay up to l) S_before

Where a document ends is where it ends in one process; positions count from where it began.
Attention is causal, so later parts have more to compute; with many short documents they do not.

Belongs here: parts of layouts, and the mixers that look beyond them. Not here: labels (train/batch.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from freehold.errors import BadInput
from freehold.models.attention import Attention
from freehold.models.block import Block
from freehold.models.layout import Layout, PagedKV, Recurrent
from freehold.models.mamba2 import Mamba2
from freehold.models.moe import Moe
from freehold.ops.attention import attention_over
from freehold.ops.conv import causal_conv
from freehold.ops.moe import count_chosen
from freehold.ops.ssm import scan
from freehold.parallel.exchange import exchanged, total


@dataclass(frozen=True, kw_only=True, eq=False)
class Part(Layout):
    """One process's consecutive tokens of a layout.

    starts, contexts: of the tokens that are here; `contexts[0]` tokens of the first sequence are in earlier parts.
    cuts: where in the whole each part begins, and the end of the last. group: the processes, in the order of parts.
    first: which sequence of the whole the first one here is.
    """

    cuts: tuple[int, ...]
    group: dist.ProcessGroup
    first: int
    whole: Layout

    @property
    def index(self) -> int:
        """Which part this is."""
        return self.group.rank()

    @property
    def slice(self) -> slice:
        """The tokens of the whole that are here."""
        return slice(self.cuts[self.index], self.cuts[self.index + 1])

    def fetch_before(self, rows_T: Tensor, *, at_most: int | None = None) -> Tensor:
        """Return the rows of the first sequence's last tokens before this part: all of them, or at_most so many."""
        wanted = []
        for begin in self.cuts[:-1]:
            num_before = begin - self._start_of_sequence(begin)
            wanted.append((begin - (num_before if at_most is None else min(num_before, at_most)), begin))
        return self._fetch(rows_T, wanted, self.cuts)

    def fetch_parts_before(self, row: Tensor) -> Tensor:
        """Return a row of each earlier part that has tokens of this part's first sequence, in their order."""
        wanted = []
        for part, begin in enumerate(self.cuts[:-1]):
            start = self._start_of_sequence(begin)
            wanted.append((next(p for p in range(part + 1) if self.cuts[p + 1] > start), part))
        return self._fetch(row[None], wanted, range(len(self.cuts)))

    def _start_of_sequence(self, begin: int) -> int:
        return max(start for start in self.whole.starts[:-1] if start <= begin)

    def _fetch(self, rows: Tensor, wanted: Sequence[tuple[int, int]], cuts: Sequence[int]) -> Tensor:
        """Return rows of the whole in the interval that this part wants; wanted: that of each part, before it."""

        def overlap(owner: int, receiver: int) -> slice:
            start = max(cuts[owner], wanted[receiver][0])
            stop = max(start, min(cuts[owner + 1], wanted[receiver][1]))
            return slice(start - cuts[owner], stop - cuts[owner])

        mine, parts = self.index, range(len(cuts) - 1)
        pieces = [rows[overlap(mine, other)] for other in parts]
        received = [overlap(other, mine) for other in parts]
        return exchanged(
            torch.cat(pieces),
            sent=[len(piece) for piece in pieces],
            received=[come.stop - come.start for come in received],
            group=self.group,
        )


def part_of(layout: Layout, group: dist.ProcessGroup) -> Part:
    """Return this process's part of a layout without state, as many tokens as others have, or one fewer.

    Raises: BadInput where there are fewer tokens than processes.
    """
    assert not any(layout.contexts), "what is divided is whole"
    num_tokens, count, index = layout.num_tokens, group.size(), group.rank()
    if num_tokens < count:
        raise BadInput(f"{num_tokens} tokens cannot be divided over {count} processes", hint="lower `context`")
    cuts = tuple(num_tokens * part // count for part in range(count + 1))
    begin, end = cuts[index : index + 2]
    here = [(b, start) for b, (start, stop) in enumerate(layout.spans) if start < end and stop > begin]
    (first, start), starts = here[0], [start for _, start in here[1:]]
    return Part(
        starts=(0, *(start - begin for start in starts), end - begin),
        contexts=(begin - start, *(0 for _ in starts)),
        device=layout.device,
        cuts=cuts,
        group=group,
        first=first,
        whole=layout,
    )


def divide_context(block: Block) -> None:
    """Have a block's mixer look beyond the part of a layout that it is given from now on. Mutates: block."""
    match block.mixer:  # the same parameters and hooks: a mixer that asks others for what came before
        case Attention():
            block.mixer.__class__ = PartialAttention
        case Mamba2():
            block.mixer.__class__ = PartialMamba2
        case Moe():
            block.mixer.__class__ = PartialMoe


class PartialAttention(Attention):
    """Attention whose first sequence has keys and values in other processes."""

    sees_all = False

    def _attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, layout: Layout, state: PagedKV | None) -> Tensor:
        assert isinstance(layout, Part), "tokens come as a part"
        assert state is None, "a part keeps no state"
        kv_T2JK = torch.stack((k_TJK, v_TJK), dim=1)
        (_, stop), *others = layout.spans
        owned_M2JK = [torch.cat((layout.fetch_before(kv_T2JK), kv_T2JK[:stop])), *(kv_T2JK[i:j] for i, j in others)]
        owned = [(kv[:, 0], kv[:, 1]) for kv in owned_M2JK]
        return attention_over(q_THK, owned, spans=layout.spans, ends=layout.ends)


class PartialMamba2(Mamba2):
    """A Mamba-2 mixer whose first sequence has its tail and its state in other processes."""

    sees_all = False

    def _mix_rows(self, projected_TP: Tensor, layout: Layout, state: Recurrent | None) -> Tensor:
        return self._mix(projected_TP, layout, state)  # with others, never token by token

    def _mix_spans(self, xbc_TC: Tensor, dt_TH: Tensor, layout: Layout, state: Recurrent | None) -> Tensor:
        assert isinstance(layout, Part), "tokens come as a part"
        assert state is None, "a part keeps no state"
        spec = self.spec
        outputs, before_YC = [], layout.fetch_before(xbc_TC, at_most=spec.conv_kernel - 1)
        for sequence, (start, stop) in enumerate(layout.spans):
            tail_YC = xbc_TC.new_zeros(spec.conv_kernel - 1, spec.conv_width)
            ssm_HPN = dt_TH.new_zeros(spec.num_heads, spec.head_dim, spec.state_size)
            if sequence == 0:
                tail_YC = torch.cat((tail_YC[len(before_YC) :], before_YC))
            xbc_LC, _ = causal_conv(xbc_TC[start:stop], tail_YC, self.conv1d.weight, self.conv1d.bias)
            x_LHP, b_LGN, c_LGN = self._split(xbc_LC)
            y_LHP, ssm_HPN = scan(x_LHP, dt_TH[start:stop], self._a_H(), b_LGN, c_LGN, self.D, ssm_HPN)
            outputs.append(y_LHP)
            if sequence == 0:
                first_c_LGN = c_LGN
        last_dt_LH = dt_TH[layout.spans[-1][0] :]
        outputs[0] = outputs[0] + self._from_before(first_c_LGN, dt_TH, last_dt_LH, ssm_HPN, layout)
        return torch.cat(outputs)

    def _from_before(self, c_LGN: Tensor, dt_TH: Tensor, last_dt_LH: Tensor, ssm_HPN: Tensor, layout: Part) -> Tensor:
        """Return what the first sequence's tokens elsewhere add to y [L, H, P] of those that are here.

        c_LGN: of the first sequence. last_dt_LH, ssm_HPN: steps of the last sequence, and the state that they end with.
        """
        a_H, (num_heads, head_dim, state_size) = self._a_H(), ssm_HPN.shape
        own = torch.cat((ssm_HPN.flatten(), (last_dt_LH * a_H).sum(dim=0)))
        ssm, log_decay_SH = layout.fetch_parts_before(own).split((ssm_HPN.numel(), num_heads), dim=1)
        ssm_SHPN = ssm.unflatten(1, (num_heads, head_dim, state_size))
        after_SH = functional.pad(log_decay_SH[1:].flip(0).cumsum(dim=0).flip(0), (0, 0, 0, 1))[: len(ssm_SHPN)]
        before_HPN = (after_SH.exp()[:, :, None, None] * ssm_SHPN).sum(dim=0)
        decay_LH = (dt_TH[: len(c_LGN)] * a_H).cumsum(dim=0).exp()
        c_LHN = c_LGN.float().repeat_interleave(num_heads // c_LGN.shape[1], dim=1)
        return torch.einsum("lh,lhn,hpn->lhp", decay_LH, c_LHN, before_HPN)


class PartialMoe(Moe):
    """Experts whose balance is that of whole sequences; all else of theirs is each token's own."""

    def _choices(self, experts_TX: Tensor, layout: Layout) -> Tensor:
        assert isinstance(layout, Part), "tokens come as a part"
        here_BE = count_chosen(experts_TX, num_experts=self.spec.num_experts, spans=layout.spans)
        here = slice(layout.first, layout.first + layout.num_sequences)
        whole_BE = here_BE.new_zeros(layout.whole.num_sequences, self.spec.num_experts)
        whole_BE[here] = here_BE
        return total(whole_BE, layout.group)[here]
