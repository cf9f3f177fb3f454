"""Tensors that processes have parts of, on disk: each process writes its own, and any number of them reads them again.

Files are safetensors, so that nothing is unpickled; each says in its header which part of a tensor it holds. What is
read may be whole or in parts, of any number of processes. (torch.distributed.checkpoint, with its storage for
safetensors.)

Belongs here: parts, and when all of them are on the disk. Not here: what else makes a save whole (train/state.py).
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from freehold.errors import BadInput


class Saver:
    """Saves parts beside the steps that follow, one save at a time; all processes come to each call."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # of its own: steps and saves speak at the same time
        self._saving: Future[Any] | None = None

    def begin(self, folder: Path, tensors: Mapping[str, Tensor], *, commit: Callable[[], None]) -> None:
        """Copy tensors, sharded ones and whole ones that all have alike, and begin to write them into a folder.

        commit: called in the first process when all parts of all processes are on its disk.
        """
        assert self._saving is None, "the save before is finished first"
        saving = async_save(dict(tensors), storage_writer=_Writer(folder, commit), process_group=self._group)
        assert isinstance(saving, Future), "what writes files has copied before it returns"
        self._saving = saving

    def finish(self) -> None:
        """Wait until what was begun is saved. Raises: BadInput in every process where one could not write."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except CheckpointException as error:
            reasons = [str(failure) for failure, _ in error.failures.values()]
            raise BadInput(f"a run cannot be saved: {reasons[0]}", hint="is the disk full?") from None


class _Writer(HuggingFaceStorageWriter):
    def __init__(self, folder: Path, commit: Callable[[], None]):
        super().__init__(path=str(folder), save_distributed=True)
        self._commit = commit

    def finish(self, metadata: Any, results: Any) -> None:
        self._commit()


def describe_parts(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that a folder holds, whole or in parts, on the meta device."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def read_parts(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors with what a folder holds under their names: of a sharded one, what this process has. Mutates: into.

    The folder is one whose digests have been checked.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it reads alone, which it is told to
        load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
