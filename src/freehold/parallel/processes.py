"""The processes that train one model together: started, laid out as a mesh, and ended.

    with joined(Settings().launch, Sizes(tensor=2), device_type="cpu") as processes:
        processes.mesh["tensor"]                     a DeviceMesh of one dimension, as DTensor and FSDP2 take it
        processes.size("tensor")                     how many processes share the work of this one along a dimension
        processes.index("tensor")                    which of them this one is
        processes.sum(counts)                        over all that see other tokens: data, expert and context
        processes.sum(norms, "tensor")               over the dimensions that are named
        processes.group("data", "context")           the same processes as a group, for torch.distributed

Along `data` processes have other sequences and the same weights (or parts of them, where they are sharded); along
`expert` other sequences, other experts and else the same weights; along `context` other tokens of the same sequences;
along `tensor` the same tokens and other parts of every matrix. What is neither named by torchrun nor asked for is one
process, ALONE, whose sums are what they are sums of: no caller asks whether there are others.

An error in one process ends all: that one raises it, and the others PeerFailed as soon as they miss it, which tells
nobody anything new. Where one is gone without a word, the first that misses it raises PeerLost.

Belongs here: groups of processes, and how they end together. Not here: what is divided among them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from freehold.errors import BadInput, FreeholdError, PeerFailed, PeerLost
from freehold.settings import Launch

Dimension = Literal["data", "expert", "context", "tensor"]
# The last one changes fastest: processes that talk most are neighbours.
DIMENSIONS: tuple[Dimension, ...] = ("data", "expert", "context", "tensor")
TOKENS: tuple[Dimension, ...] = ("data", "expert", "context")  # along which processes see other tokens
OWN_SEQUENCES: tuple[Dimension, ...] = ("data", "expert")  # along which these are of other sequences

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # counts are summed where they are, on the CPU
FAILURES = "freehold/failures"  # in the store of the run: how many processes have failed


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many processes there are along each dimension but `data`, which has the rest."""

    expert: int = 1
    context: int = 1
    tensor: int = 1

    def mesh_shape(self, num_processes: int) -> tuple[int, ...]:
        """Return the sizes of DIMENSIONS. Raises: BadInput where they do not divide the processes."""
        inner = self.expert * self.context * self.tensor
        if num_processes % inner:
            raise BadInput(
                f"{num_processes} processes cannot be divided by expert {self.expert} x context {self.context} x "
                f"tensor {self.tensor}",
                hint=f"start a multiple of {inner} of them",
            )
        return num_processes // inner, self.expert, self.context, self.tensor


DATA_ALONE = Sizes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Processes:
    """The processes of a run, and which of them this one is.

    num_here: how many are on this machine. mesh: None where there is one alone.
    """

    rank: int = 0
    count: int = 1
    num_here: int = 1
    mesh: DeviceMesh | None = None
    _groups: dict[tuple[Dimension, ...], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def size(self, *dimensions: Dimension) -> int:
        """Return how many processes there are along dimensions."""
        if self.mesh is None:
            return 1
        shape = dict(zip(DIMENSIONS, self.mesh.shape, strict=True))
        return int(torch.tensor([shape[dimension] for dimension in dimensions]).prod())

    def index(self, *dimensions: Dimension) -> int:
        """Return which of the processes along dimensions this one is: from 0, the last dimension fastest."""
        number = 0
        for dimension in dimensions:
            place = self.mesh.get_local_rank(dimension) if self.mesh else 0
            number = number * self.size(dimension) + place
        return number

    def sum(self, values: Tensor, *dimensions: Dimension) -> Tensor:
        """Return the sum of a tensor over processes: of all that see other tokens, or along the dimensions named.

        The same bits in every one of them.
        """
        dimensions = dimensions or TOKENS
        if self.size(*dimensions) == 1:
            return values
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group(*dimensions))
        return total

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process; all have to ask."""
        return bool(self.sum(torch.tensor(int(flag)), *DIMENSIONS))

    def group(self, *dimensions: Dimension) -> dist.ProcessGroup:
        """Return the processes along dimensions as a group, in the order of `index`.

        The first call for some dimensions makes it, and all processes have to come to that call.
        """
        assert self.mesh is not None, "one process alone has no groups"
        if dimensions not in self._groups:
            along = [DIMENSIONS.index(dimension) for dimension in dimensions]
            across = [axis for axis in range(len(DIMENSIONS)) if axis not in along]
            ranks = self.mesh.mesh.permute(*across, *along).reshape(-1, self.size(*dimensions))
            made, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
            assert made is not None, "every process is in one of them"
            self._groups[dimensions] = made
        return self._groups[dimensions]


ALONE = Processes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Imagined(Processes):
    """Processes that nobody has started, as the first of them would see the others: enough to divide a model by.

    shape: the sizes of DIMENSIONS.
    """

    shape: tuple[int, ...]

    def size(self, *dimensions: Dimension) -> int:
        return prod(self.shape[DIMENSIONS.index(dimension)] for dimension in dimensions)

    def group(self, *dimensions: Dimension) -> dist.ProcessGroup:
        return dist.ProcessGroup(0, self.size(*dimensions))  # type: ignore[call-arg]  # without a store: it speaks to nobody


@contextmanager
def joined(launch: Launch | None, sizes: Sizes = DATA_ALONE, *, device_type: str = "cpu") -> Iterator[Processes]:
    """Yield this process among those that were launched with it; ALONE where none was.

    Raises: BadInput where sizes do not divide them; PeerFailed or PeerLost in the place of whatever went wrong here,
        where another one failed before.
    """
    if launch is None or launch.count == 1:
        sizes.mesh_shape(1)
        yield ALONE
        return
    shape = sizes.mesh_shape(launch.count)
    if device_type == "cuda":
        torch.cuda.set_device(launch.local_rank)
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group(BACKENDS[device_type], store=store, rank=rank, world_size=count)
    try:
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=DIMENSIONS)
        yield Processes(rank=rank, count=count, num_here=launch.num_here, mesh=mesh)
    except Exception as error:
        raise _to_end_with(error, store) from None
    dist.destroy_process_group()  # after a failure the system does it: others may be where they cannot answer


@contextmanager
def said_once(launch: Launch | None) -> Iterator[None]:
    """Have the first of several processes alone say an error that all of them find alike, before they are joined.

    Raises: PeerFailed in the others.
    """
    try:
        yield
    except FreeholdError:
        if launch is None or launch.rank == 0:
            raise
        raise PeerFailed("the first process says why") from None


def _to_end_with(error: Exception, store: Store) -> Exception:
    """Return what this process ends with: the first to fail says why, and the others that one did."""
    if isinstance(error, PeerFailed):
        return error
    try:
        is_first = store.add(FAILURES, 1) == 1
    except RuntimeError:  # the store was another process's, and went with it
        is_first = True
    if not is_first:
        return PeerFailed("another process failed, and said why")
    if _is_lost_connection(error):
        return PeerLost("another process of this run is gone, and said nothing", hint="was it killed, for its memory?")
    return error


def _is_lost_connection(error: Exception) -> bool:
    """Return whether an error is how torch.distributed says that another process does not answer any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
