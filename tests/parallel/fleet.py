"""Four processes that stay, and do together what tests ask of them; gloo joins them on the CPU."""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from freehold.parallel.processes import DIMENSIONS, Processes, Sizes

NUM_PROCESSES = 4
# One child is born with these imported, and bears the others: each is imported once.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.device_mesh", "freehold.train.step", "models.tiny"]


class Fleet:
    """Runs a function of a module in all processes at once."""

    def __init__(self, pipes: list[Connection]):
        self._pipes = pipes

    def run(self, work: Callable[..., Any], sizes: Sizes, *arguments: Any) -> list[Any]:
        """Return what `work(processes, *arguments)` returns in each process; fail with the traceback of the first."""
        for pipe in self._pipes:
            pipe.send((work, sizes, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        faults = [fault for fault, _ in answers if fault]
        assert not faults, faults[0]
        return [answer for _, answer in answers]


@contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    """Yield four processes, which end with the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pairs = [context.Pipe() for _ in range(NUM_PROCESSES)]
    children = [
        context.Process(target=_serve, args=(rank, folder / "store", theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for child in children:
        child.start()
    try:
        yield Fleet([ours for ours, _ in pairs])
    finally:
        for ours, _ in pairs:
            ours.send(None)
        for child in children:
            child.join(timeout=20)
            child.kill()


def _serve(rank: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), NUM_PROCESSES),
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=timedelta(minutes=10),
    )
    made: dict[Sizes, Processes] = {}
    while asked := pipe.recv():
        work, sizes, arguments = asked
        try:
            if sizes not in made:
                shape = sizes.mesh_shape(NUM_PROCESSES)
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
                made[sizes] = Processes(rank=rank, count=NUM_PROCESSES, mesh=mesh)
            pipe.send((None, work(made[sizes], *arguments)))
        except Exception:
            pipe.send((f"process {rank}: {traceback.format_exc()}", None))
    dist.destroy_process_group()
