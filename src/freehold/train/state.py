"""Everything that a run is between two steps, on disk: saved whole or not at all, taken up again bit for bit.

    RUN/step-00000012/   weights.safetensors   the parameters that steps move, by the decoder's own names
                         state.safetensors     the optimizer's state, and torch's random numbers
                         run.json              the step, tokens so far, where the data goes on, the config
                         SHA256SUMS            of the three, as `sha256sum -c` reads it

The same bits come of a step on the same machine with the same number of threads: torch's sums in a backward pass depend
on it.

Belongs here: what a run is, and its way to disk and back. Not here: when to save; checkpoints for others
(checkpoint/save.py).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from freehold.checkpoint.safetensors import DTYPES, parse_json_object
from freehold.checkpoint.save import new_folder
from freehold.checkpoint.source import open_source
from freehold.errors import BadFile, BadInput, CheckpointMismatch
from freehold.models.decoder import Decoder
from freehold.train.optim import Optimizer

WEIGHTS, STATE, RECORD, DIGESTS = "weights.safetensors", "state.safetensors", "run.json", "SHA256SUMS"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_DIGEST_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


@dataclass(kw_only=True)
class Run:
    """Everything that decides how a run goes on, beside torch's random numbers.

    config: whatever else decides it, as JSON; a run goes on only with the config that it began with.
    step, num_tokens: done so far. cursor: where the data goes on, as JSON.
    """

    decoder: Decoder
    optimizer: Optimizer
    config: Mapping[str, Any]
    step: int = 0
    num_tokens: int = 0
    cursor: Mapping[str, Any] = field(default_factory=dict)


def save_run(folder: Path, run: Run, *, num_kept: int = 2) -> Path:
    """Save a run beside what was saved of it before, and return where; the oldest go, so that num_kept stay.

    The new one is on the disk before anything goes, and at no time is there a part of it under its name.
    Raises: BadInput where the disk refuses; what was saved before stays.
    """
    assert num_kept > 0, "one has to stay"
    path = folder / f"step-{run.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):  # by a process that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    if path.exists() and _fault(path) is None:
        return path
    shutil.rmtree(path, ignore_errors=True)
    weights, state, record = _weights(run), _state(run), _record(run)
    try:
        with new_folder(path, sum(t.nbytes for t in (*weights.values(), *state.values())) + len(record)) as partial:
            save_file(weights, partial / WEIGHTS)
            save_file(state, partial / STATE)
            (partial / RECORD).write_bytes(record)
            (partial / DIGESTS).write_text("".join(f"{_digest(partial / n)}  {n}\n" for n in (WEIGHTS, STATE, RECORD)))
            for file in (*partial.iterdir(), partial):
                _write_through(file)
        _write_through(folder)
    except (OSError, SafetensorError) as error:
        hint = "is the disk full? what was saved before is still there"
        raise BadInput(f"step {run.step} cannot be saved in {folder.name}: {_reason(error)}", hint=hint) from None
    for _, old in _saved(folder)[num_kept:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def resume_run(folder: Path, run: Run) -> tuple[str, ...]:
    """Take up the newest whole state in a folder, and return why newer ones were passed over.

    A run that was never saved stays as it is, at the step that it has.
    Mutates: run, its decoder and optimizer; torch's random numbers.
    Raises: BadFile where something was saved and nothing of it is whole; BadInput where the config is another one;
        CheckpointMismatch where the parameters are.
    """
    passed: list[str] = []
    for _, path in _saved(folder):
        fault = _fault(path)
        if fault is None:
            _load(path, run)
            return tuple(passed)
        passed.append(f"{path.name} is not whole: {fault}")
    if passed:
        raise BadFile(f"nothing in {folder.name} is whole, first {passed[0]}", hint="begin again in another folder")
    return ()


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in _moved(run.decoder).items()}


def _moved(decoder: Decoder) -> dict[str, Tensor]:
    """Return the parameters that steps move: those that ask for a gradient, and the corrections of routers."""
    return {
        name: parameter
        for name, parameter in decoder.named_parameters()
        if parameter.requires_grad or name.endswith("e_score_correction_bias")
    }


def _state(run: Run) -> dict[str, Tensor]:
    state = {f"optimizer/{name}": tensor.contiguous() for name, tensor in run.optimizer.tensors().items()}
    return state | {f"random/{device}": numbers for device, numbers in _random_numbers(run.decoder)}


def _random_numbers(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    yield "cpu", torch.get_rng_state()
    if decoder.device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(decoder.device)


def _record(run: Run) -> bytes:
    record = {"step": run.step, "num_tokens": run.num_tokens, "cursor": run.cursor, "config": run.config}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    assert json.loads(text) == record, "a cursor or config would come back as something else"
    return (text + "\n").encode()


def _load(path: Path, run: Run) -> None:
    record = parse_json_object((path / RECORD).read_bytes(), file=f"{path.name}/{RECORD}")
    _check_config(record["config"], run.config)
    _fill(_moved(run.decoder), _read(path / WEIGHTS))
    state = _read(path / STATE)
    of_optimizer = {name: tensor for name, tensor in state.items() if name.startswith("optimizer/")}
    run.optimizer.load_tensors({name.removeprefix("optimizer/"): tensor for name, tensor in of_optimizer.items()})
    torch.set_rng_state(state["random/cpu"].clone())
    if "random/cuda" in state and run.decoder.device.type == "cuda":
        torch.cuda.set_rng_state(state["random/cuda"].clone(), run.decoder.device)
    run.step, run.num_tokens, run.cursor = record["step"], record["num_tokens"], record["cursor"]


def _check_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key in (*saved, *given):
        if saved.get(key) != given.get(key):
            raise BadInput(
                f"the run began with {key} {saved.get(key)!r:.80}, and is to go on with {given.get(key)!r:.80}",
                hint="go on with what it began with, or begin a new run in another folder",
            )


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Give parameters the values that were saved. Mutates: parameters."""
    for name in (*parameters, *saved):
        found, wanted = (_kind(tensors.get(name)) for tensors in (saved, parameters))
        if found != wanted:
            raise CheckpointMismatch(f"`{name}` was saved as {found}, the model has {wanted}")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _read(path: Path) -> dict[str, Tensor]:
    """Return views of a file's tensors."""
    with open_source(path) as source:
        return {
            name: source.bytes_of(name).view(DTYPES[tensor.format]).view(tensor.shape)
            for name, tensor in source.tensors.items()
        }


def _saved(folder: Path) -> list[tuple[int, Path]]:
    """Return what is saved in a folder, by step, the newest first."""
    names = [(_STEP_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


def _fault(path: Path) -> str | None:
    """Return what is not as it was saved, None where all is."""
    try:
        lines = [_DIGEST_LINE.fullmatch(line) for line in (path / DIGESTS).read_text(encoding="ascii").splitlines()]
        if [line and line[2] for line in lines] != [WEIGHTS, STATE, RECORD]:
            return f"{DIGESTS} is damaged"
        changed = [line[2] for line in lines if line and _digest(path / line[2]) != line[1]]
        return f"{changed[0]} has another digest" if changed else None
    except (OSError, UnicodeDecodeError) as error:
        return _reason(error)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_through(path: Path) -> None:
    """Have the system write what it holds of a file, or of a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(str(error.filename)).name}: {error.strerror}" if error.filename else error.strerror
    return str(error)
