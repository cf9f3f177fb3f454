"""Everything that a run is between two steps, on disk: saved whole or not at all, taken up again bit for bit.

    RUN/step-00000012/   weights.safetensors   the parameters that steps move, by the decoder's own names
                         state.safetensors     the optimizer's state, and torch's random numbers
                         run.json              the step, tokens so far, where the data goes on, the config
                         SHA256SUMS            of the three, as `sha256sum -c` reads it

Where processes have parts of the weights, each writes its own of weights and state into one file, beside the steps that
follow. Either form is taken up by any number of processes, with whole weights or parts of them.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from freehold.checkpoint.safetensors import DTYPES, parse_json_object
from freehold.checkpoint.save import check_room, new_folder
from freehold.checkpoint.source import open_source
from freehold.errors import BadFile, BadInput, CheckpointMismatch, PeerFailed
from freehold.models.decoder import Decoder
from freehold.parallel.checkpoint import Saver, describe_parts, read_parts
from freehold.parallel.data import like, local
from freehold.parallel.model import WHOLE, Divided
from freehold.parallel.processes import Processes
from freehold.train.optim import Optimizer

WEIGHTS, STATE, RECORD, DIGESTS = "weights.safetensors", "state.safetensors", "run.json", "SHA256SUMS"
OF_OPTIMIZER, OF_RANDOM = "optimizer/", "random/"  # how names of the state begin
_STEP_NAME = re.compile(r"step-(\d{8,})")
_DIGEST_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


@dataclass(kw_only=True)
class Run:
    """Everything that decides how a run goes on, beside torch's random numbers.

    config: whatever else decides it, as JSON; a run goes on only with the config that it began with.
    machine: what the bits of a step depend on beside that, as JSON. A run goes on with the same one, too, unless there
        are other `processes` in it: then the next steps are the same within rounding.
    step, num_tokens: done so far. cursor: where the data goes on, as JSON.
    divided: which processes make the run together, and which part of the model this one has. saver: where weights are
        sharded over data.
    """

    decoder: Decoder
    optimizer: Optimizer
    config: Mapping[str, Any]
    machine: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    num_tokens: int = 0
    cursor: Mapping[str, Any] = field(default_factory=dict)
    divided: Divided = WHOLE
    saver: Saver | None = None

    @property
    def processes(self) -> Processes:
        """Those that make the run together."""
        return self.divided.processes


def save_run(folder: Path, run: Run, *, num_kept: int = 2) -> Path:
    """Save a run beside what was saved of it before, and return where; the oldest go, so that num_kept stay.

    The new one is on the disk before anything goes, and at no time is there a part of it under its name. Parts are
    there when `finish_saving` says so, or the next save begins.
    Raises: BadInput where the disk refuses; what was saved before stays.
    """
    assert num_kept > 0, "one has to stay"
    path = folder / f"step-{run.step:08d}"
    finish_saving(run)
    if run.processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # by a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
    if run.processes.any(run.processes.is_first and path.exists() and _fault(path) is None):
        return path
    if run.processes.is_first:
        shutil.rmtree(path, ignore_errors=True)
    if run.saver:
        _begin_to_save_parts(path, run, run.saver, num_kept)
    else:
        weights, state = _weights(run), _state(run)  # of all processes, where they have divided the model
        if run.processes.is_first:
            _save_whole(path, run, weights, state, num_kept)
    return path


def finish_saving(run: Run) -> None:
    """Wait until what was saved last is on the disk. Raises: BadInput where the disk refuses."""
    if run.saver:
        run.saver.finish()


def _save_whole(path: Path, run: Run, weights: dict[str, Tensor], state: dict[str, Tensor], num_kept: int) -> None:
    record = _record(run)
    try:
        with new_folder(path, sum(t.nbytes for t in (*weights.values(), *state.values())) + len(record)) as partial:
            save_file(weights, partial / WEIGHTS)
            save_file(state, partial / STATE)
            (partial / RECORD).write_bytes(record)
            _seal(partial)
        _write_through(path.parent)
    except (OSError, SafetensorError) as error:
        hint = "is the disk full? what was saved before is still there"
        raise BadInput(f"step {run.step} cannot be saved in {path.parent.name}: {_reason(error)}", hint=hint) from None
    _keep_newest(path.parent, num_kept)


def _begin_to_save_parts(path: Path, run: Run, saver: Saver, num_kept: int) -> None:
    tensors, record = _weights(run) | _state(run), _record(run)
    partial = path.with_name(f".{path.name}")  # as all processes call it
    if run.processes.is_first:
        check_room(path, sum(tensor.nbytes for tensor in tensors.values()))
    run.processes.any(False)  # nobody writes before what was left there has gone

    def commit() -> None:
        (partial / RECORD).write_bytes(record)
        _seal(partial)
        partial.rename(path)
        _write_through(path.parent)
        _keep_newest(path.parent, num_kept)

    saver.begin(partial, tensors, commit=commit)


def _seal(folder: Path) -> None:
    """Write the digests of a folder's files beside them, and all of it to the disk."""
    names = sorted((file.name for file in folder.iterdir()), key=lambda name: (name == RECORD, name == STATE, name))
    (folder / DIGESTS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in names))
    for file in (*folder.iterdir(), folder):
        _write_through(file)


def _keep_newest(folder: Path, num_kept: int) -> None:
    for _, old in _saved(folder)[num_kept:]:
        shutil.rmtree(old, ignore_errors=True)


def resume_run(folder: Path, run: Run) -> tuple[str, ...]:
    """Take up the newest whole state in a folder, and return why newer ones were passed over.

    A run that was never saved stays as it is, at the step that it has.
    Mutates: run, its decoder and optimizer; torch's random numbers.
    Raises: BadFile where something was saved and nothing of it is whole; BadInput where the config is another one;
        CheckpointMismatch where the parameters are.
    """
    passed: list[str] = []
    for _, path in _saved(folder):
        fault = _fault(path) if run.processes.is_first else None
        if not run.processes.any(fault is not None):
            return (*passed, *_load(path, run))
        passed.append(f"{path.name} is not whole: {fault}")
    if passed and not run.processes.is_first:
        raise PeerFailed("the first process says what is wrong with it")
    if passed:
        raise BadFile(f"nothing in {folder.name} is whole, first {passed[0]}", hint="begin again in another folder")
    return ()


def _weights(run: Run) -> dict[str, Tensor]:
    """Return the weights that steps move; where the model is divided the whole of each, in the first process alone."""
    moved = _moved(run.decoder).items()
    return _held(run, ((name, run.divided.whole(name, p.detach().contiguous())) for name, p in moved))


def _held(run: Run, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return what this process writes of tensors that all of them make together, one after the other."""
    return {name: tensor for name, tensor in named if run.saver or run.processes.is_first}


def _moved(decoder: Decoder) -> dict[str, Tensor]:
    """Return the parameters that steps move: those that ask for a gradient, and the corrections of routers."""
    return {
        name: parameter
        for name, parameter in decoder.named_parameters()
        if parameter.requires_grad or name.endswith("e_score_correction_bias")
    }


def _state(run: Run) -> dict[str, Tensor]:
    parameters = dict(run.decoder.named_parameters())

    def stored(owner: str, tensor: Tensor) -> Tensor:
        tensor = like(tensor.contiguous(), parameters.get(owner, tensor))
        return run.divided.whole(owner, tensor) if tensor.ndim else tensor  # without axes: a count of steps

    tensors = run.optimizer.tensors().items()
    state = _held(run, ((f"{OF_OPTIMIZER}{name}", stored(name.rpartition("/")[0], tensor)) for name, tensor in tensors))
    return state | {f"{OF_RANDOM}{device}": numbers for device, numbers in _random_numbers(run.decoder)}


def _random_numbers(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    yield "cpu", torch.get_rng_state()
    if decoder.device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(decoder.device)


def _record(run: Run) -> bytes:
    record = {"step": run.step, "num_tokens": run.num_tokens, "cursor": run.cursor, "config": run.config}
    record |= {"machine": run.machine}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    assert json.loads(text) == record, "a cursor or config would come back as something else"
    return (text + "\n").encode()


def _load(path: Path, run: Run) -> tuple[str, ...]:
    """Take up a state, and return what is worth a note. Mutates: run."""
    record = parse_json_object((path / RECORD).read_bytes(), file=f"{path.name}/{RECORD}")
    _check_config(record["config"], run.config)
    then, now = (machine.get("processes") for machine in (record.get("machine", {}), run.machine))
    if then == now:
        _check_config(record.get("machine", {}), run.machine)
    is_whole = run.saver is None and (path / WEIGHTS).exists()
    tensors = {**_read(path / WEIGHTS), **_read(path / STATE)} if is_whole else _read_parts(path, run)
    part = run.divided.part
    weights = {n: part(n, tensor) for n, tensor in tensors.items() if not n.startswith((OF_OPTIMIZER, OF_RANDOM))}
    _fill(_moved(run.decoder), weights)
    state = {n.removeprefix(OF_OPTIMIZER): local(t) for n, t in tensors.items() if n.startswith(OF_OPTIMIZER)}
    run.optimizer.load_tensors({n: part(n.rpartition("/")[0], t) if t.ndim else t for n, t in state.items()})
    torch.set_rng_state(tensors[f"{OF_RANDOM}cpu"].clone())
    if f"{OF_RANDOM}cuda" in tensors and run.decoder.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"{OF_RANDOM}cuda"].clone(), run.decoder.device)
    run.step, run.num_tokens, run.cursor = record["step"], record["num_tokens"], record["cursor"]
    return () if then == now else (f"{path.name} was made by {then}; {now} go on within rounding, not bit for bit",)


def _read_parts(path: Path, run: Run) -> dict[str, Tensor]:
    """Return of each tensor in a folder what this process has of it."""
    parameters = dict(run.decoder.named_parameters())

    def empty(name: str, stored: Tensor) -> Tensor:
        owner = parameters.get(name.removeprefix(OF_OPTIMIZER).rpartition("/")[0] or name)
        if owner is None or owner.shape != stored.shape:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return like(torch.empty_like(local(owner), dtype=stored.dtype, requires_grad=False), owner)

    tensors = {name: empty(name, stored) for name, stored in describe_parts(path).items()}
    read_parts(path, tensors)
    return tensors


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
        local(parameter).copy_(local(saved[name]))


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
        names = {line[2] for line in lines if line}
        if None in lines or RECORD not in names or not names - {RECORD}:
            return f"{DIGESTS} is damaged"
        if more := {file.name for file in path.iterdir()} - names - {DIGESTS}:
            return f"{min(more)} is not in {DIGESTS}"
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
