"""Data in parallel: each process computes with sequences of its own, and all of them move the same weights.

    replicated   every process has all weights. Once a step, when all micro-batches have been computed, gradients are
                 summed in a few large pieces.
    sharded      every process has a part of each weight, with what the optimizer knows of it (FSDP2): a block's weights
                 are gathered when it computes and let go after it, and a micro-batch's gradients are summed into parts.
    copies       the mix: processes in several groups, each of which has all weights in parts.

Losses are divided by counts of all processes (train/step.py), so gradients are summed, never averaged.

Belongs here: who has which part of a weight because of data, and what becomes of gradients. Not here: which sequences
a process takes (recipes/loop.py); weights divided because one process cannot compute with them (tensor.py, expert.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from freehold.errors import BadInput, UnsupportedModel
from freehold.models.decoder import Decoder, build_decoder
from freehold.parallel.processes import ALONE, TOKENS, Dimension, Processes

BUCKET_BYTES = 64 << 20  # of gradients that are summed in one call


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: a view of its part where it is sharded, else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of which this process has `part`, sharded as a parameter is; `part` itself where it is not."""
    if not isinstance(parameter, DTensor) or part.shape != parameter.to_local().shape:
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard(decoder: Decoder, processes: Processes, *, copies: int = 1) -> None:
    """Leave a decoder this process's part of each weight, of as many whole copies as said.

    What is float32 in a decoder of another dtype stays whole, and so do the corrections of routers, which no gradient
    moves: all of it is small.
    Mutates: decoder.
    Raises: BadInput where copies do not divide the processes; UnsupportedModel for weights that are packed, or have an
        adapter.
    """
    if decoder.has_adapter or decoder.packed_weights():
        raise UnsupportedModel(
            "adapters and quantized weights are not sharded", hint='`parallel.weights = "replicate"`'
        )
    mesh = _mesh(processes, copies)
    whole = {p for p in decoder.parameters() if p.dtype is not decoder.dtype or not p.requires_grad}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*decoder.blocks, *(decoder.mtp.blocks if decoder.mtp else ()), decoder):
        unit: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other


def let_go(decoder: Decoder) -> None:
    """Have a decoder keep its own part of the weights only, which after a forward without a backward it does not.

    Mutates: decoder.
    """
    if isinstance(decoder, FSDPModule):
        decoder.reshard()


def whole_decoder(
    decoder: Decoder, processes: Processes, *, join: Callable[[str, Tensor], Tensor] | None = None
) -> Decoder | None:
    """Return a decoder with all weights on the CPU, in the first process; None in the others, which have to call too.

    One that has all of them is returned as it is. join: returns the whole of a weight that processes have other parts
    of than those of data, by its name and this process's part.
    """
    if join is None and not isinstance(decoder, FSDPModule):
        return decoder if processes.is_first else None
    let_go(decoder)
    made = build_decoder(decoder.spec, dtype=decoder.dtype)
    if processes.is_first:
        made = made.to_empty(device="cpu")
        made.tie_embeddings()
    target = dict(made.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if join is not None:
                whole = join(name, whole)
            if processes.is_first:
                target[name].copy_(whole)
    return made if processes.is_first else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """What becomes of gradients that each process has made of its own tokens.

    divided: along which dimensions processes have different parts of a parameter, by its name; along the others of
    TOKENS they have the same, whose gradients are summed. copies: see `shard`.
    """

    processes: Processes = ALONE
    divided: Mapping[str, tuple[Dimension, ...]] = field(default_factory=dict)
    copies: int = 1

    @staticmethod
    def of(decoder: Decoder, processes: Processes, *, copies: int = 1) -> "Gradients":
        """Return those of a decoder that is replicated, or sharded over data."""
        sharded: dict[str, tuple[Dimension, ...]] = {
            name: ("data",) for name, p in decoder.named_parameters() if isinstance(p, DTensor)
        }
        return Gradients(processes=processes, divided=sharded, copies=copies)

    def sum(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients over the processes that have the same parameters. Mutates: gradients.

        Every process has to have a gradient of the same parameters.
        """
        if self.processes.count == 1:
            return
        for divided, names in self._alike(gradients):
            along = tuple(dimension for dimension in TOKENS if dimension not in divided)
            if along and self.processes.size(*along) > 1:
                for bucket in _buckets([gradients[name] for name in names]):
                    _sum_in_place(bucket, self.processes.group(*along))

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of all gradients as of one vector, over all parts that processes have of it; float32."""
        squares = []
        for divided, names in self._alike(gradients):
            square = nn.utils.get_total_norm([gradients[name] for name in names]).double().square()
            if divided and self.processes.count > 1:
                square = self.processes.sum(square, *divided)
                square /= self.copies if "data" in divided else 1
            squares.append(square)
        return torch.stack(squares).sum().sqrt().float() if squares else torch.zeros(())

    def _alike(self, gradients: Mapping[str, Tensor]) -> Iterator[tuple[tuple[Dimension, ...], list[str]]]:
        """Yield the names of those that are divided alike, in the order that all processes have."""

        def key(name: str) -> tuple[Dimension, ...]:
            return self.divided.get(name, ())

        for divided, names in groupby(sorted(gradients, key=key), key=key):
            yield divided, list(names)


REPLICATED = Gradients()


def _mesh(processes: Processes, copies: int) -> DeviceMesh:
    """Return the processes that share weights, [copies, parts] where there are several copies."""
    assert processes.mesh is not None, "one process has nothing to share"
    count = processes.size("data")
    if count % copies:
        raise BadInput(f"{count} processes cannot hold {copies} copies of a model, in parts of the same size")
    mesh = processes.mesh["data"]
    if copies == 1:
        return mesh
    ranks = processes.mesh.mesh.movedim(0, -1).reshape(-1, copies, count // copies)
    parts, _ = dist.new_subgroups_by_enumeration(ranks.flatten(0, 1).tolist())
    alike, _ = dist.new_subgroups_by_enumeration(ranks.mT.flatten(0, 1).tolist())
    assert parts is not None, "every process is in one"
    assert alike is not None, "every process is in one"
    mine = next(group for group in ranks if (group == processes.rank).any())
    return DeviceMesh.from_group([alike, parts], mesh.device_type, mesh=mine, mesh_dim_names=("copies", "parts"))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one kind, as many as a bucket holds."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
