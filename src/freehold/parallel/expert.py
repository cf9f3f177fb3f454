"""Expert parallelism: every process has some of the experts of each block, and tokens travel to those that they chose.

    chosen by this process's tokens    e0 e3 | e1 e2 | ...        of 4 experts, 2 a process
    sorted by expert, and sent         e0 e1 -> process 0    e2 e3 -> process 1
    computed there, and sent back      the sum over a token's experts is in the order of its choice, as in one process

Routers, latent projections and shared experts are in every process. No expert has a capacity: no token is dropped.
Paper: Lepikhin et al., 2020, arXiv 2006.16668, section 3.

Belongs here: which process has which expert, and the way there and back. Not here: the choice (ops/moe.py).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from freehold.errors import BadInput
from freehold.models.block import Block
from freehold.models.moe import Experts, Moe
from freehold.parallel.cuts import Cut, cut_parameter, plain
from freehold.parallel.exchange import exchanged


class ExpertsPart(Experts):
    """Some of a block's experts; a forward of all processes is over all of them."""

    def __init__(self, here: Experts, group: dist.ProcessGroup):
        nn.Module.__init__(self)
        self.up_proj, self.down_proj, self.group = here.up_proj, here.down_proj, group

    def forward(self, input_TZ: Tensor, experts_TX: Tensor, weights_TX: Tensor) -> Tensor:
        num_here, num_chosen = self.up_proj.shape[0], experts_TX.shape[1]
        order_S = experts_TX.flatten().argsort(stable=True)
        experts_S = experts_TX.flatten()[order_S]
        sent, received = self._counts(experts_S // num_here)
        rows_SZ = exchanged(input_TZ[order_S // num_chosen], sent=sent, received=received, group=self.group)
        asked_S = exchanged(experts_S % num_here, sent=sent, received=received, group=self.group)
        said_SZ = exchanged(self._ask(rows_SZ, asked_S), sent=received, received=sent, group=self.group)
        results_TXZ = torch.empty_like(said_SZ).index_copy(0, order_S, said_SZ).unflatten(0, experts_TX.shape)
        return (results_TXZ.float() * weights_TX[:, :, None]).sum(dim=1).to(input_TZ.dtype)

    def _counts(self, owners_S: Tensor) -> tuple[list[int], list[int]]:
        """Return how many rows go to each process, and how many come from each."""
        sent = owners_S.bincount(minlength=self.group.size())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return sent.tolist(), received.tolist()

    def _ask(self, rows_SZ: Tensor, asked_S: Tensor) -> Tensor:
        """Return what one expert, of those that are here, says of each row."""
        if not len(rows_SZ):  # gradients without rows go back all the same, and the weights' are zero
            return rows_SZ + sum(plain(weight).flatten()[:0].sum() for weight in (self.up_proj, self.down_proj))
        return super().forward(rows_SZ, asked_S[:, None], torch.ones_like(asked_S[:, None], dtype=torch.float32))


def divide_experts(block: Block, group: dist.ProcessGroup, *, where: str) -> dict[str, Cut]:
    """Leave a block of experts only those of this process, and return the cuts by the names of its mixer's parameters.

    where: which block it is, for messages. Mutates: block.
    Raises: BadInput where they do not divide evenly.
    """
    mixer, count = block.mixer, group.size()
    assert isinstance(mixer, Moe), "only experts are divided"
    number = mixer.spec.num_experts
    if number % count:
        raise BadInput(
            f"{where} has {number:,} experts, which cannot be divided over {count} processes",
            hint="`expert` has to divide the number of routed experts",
        )
    cuts = dict.fromkeys(("experts.up_proj", "experts.down_proj"), Cut(axis=0, segments=(number,)))
    for name, cut in cuts.items():
        cut_parameter(mixer, name, cut, index=group.rank(), count=count)
    mixer.experts = ExpertsPart(mixer.experts, group)
    return cuts
