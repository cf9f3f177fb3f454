"""The match of a file's tensors with a decoder's parameters: each stored tensor one use, each parameter one source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from freehold.checkpoint.stored import StoredTensor
from freehold.errors import CheckpointMismatch, UnsupportedModel
from freehold.models.decoder import Decoder
from freehold.models.names import Rule, TensorNames
from freehold.quantize.gguf_blocks import BLOCKS

NAMES_SHOWN = 6
MOST_MISSING = 1000  # of layers or experts: where more are missing, the config is wrong, and no names are made for them


@dataclass(frozen=True, kw_only=True)
class Match:
    """A parameter of a decoder, the rule that fills it, and the stored tensors that it comes from, in order."""

    name: str
    parameter: Tensor
    rule: Rule
    stored: tuple[StoredTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """All parameters with their sources, and the stored tensors that were left out, each for a reason."""

    matches: tuple[Match, ...]
    ignored: tuple[str, ...]
    repeated_head: str | None  # a tied model's output head that is stored all the same


def match_tensors(decoder: Decoder, names: TensorNames, stored: Mapping[str, StoredTensor]) -> Matches:
    """Return the match of a decoder on the meta device with the tensors of a file.

    Raises: CheckpointMismatch with both lists where a tensor has no use or a parameter no source, or where a shape
        disagrees; UnsupportedModel for a storage format that no weight can have.
    """
    parameters = dict(decoder.named_parameters())  # a tied head is not listed twice
    assert {rule.parameter for rule in names.rules} == set(parameters), "the rules must name each parameter once"
    for rule in names.rules:
        if rule.is_stack and (count := len(parameters[rule.parameter])) > len(stored) + MOST_MISSING:
            raise CheckpointMismatch(f"the config has {count} experts, the file {len(stored)} tensors")
    wanted = {name: rule for rule in names.rules for name in rule.stored_names(parameters[rule.parameter])}
    ignored = [name for name in stored if any(fnmatchcase(name, pattern) for pattern in names.ignored)]
    head, _ = names.head
    repeated_head = head if decoder.spec.tied_embeddings and head in stored else None
    unused = [name for name in stored if name not in wanted and name not in ignored and name != repeated_head]
    missing = [name for name in wanted if name not in stored]
    if unused or missing:
        raise CheckpointMismatch(_both_lists(unused, missing), hint="is config.json the one of these weights?")
    matches = tuple(_match(rule, parameters[rule.parameter], stored) for rule in names.rules)
    return Matches(matches=matches, ignored=tuple(ignored), repeated_head=repeated_head)


def _match(rule: Rule, parameter: Tensor, stored: Mapping[str, StoredTensor]) -> Match:
    for name, part in rule.stored_parts(parameter):
        tensor = stored[name]
        if tensor.shape != tuple(part.shape):
            raise CheckpointMismatch(
                f"`{name}` in {tensor.file} has shape {list(tensor.shape)}, the config makes it {list(part.shape)}"
            )
        if tensor.format not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise UnsupportedModel(f"`{name}` is stored as {tensor.format}, no weight can be", hint=f"known: {known}")
    found = tuple(stored[name] for name in rule.stored_names(parameter))
    return Match(name=rule.parameter, parameter=parameter, rule=rule, stored=found)


def _both_lists(unused: list[str], missing: list[str]) -> str:
    return "; ".join(
        part
        for part in (
            f"{len(unused)} stored tensors have no use: {_shown(unused)}" if unused else "",
            f"{len(missing)} tensors are missing: {_shown(missing)}" if missing else "",
        )
        if part
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:NAMES_SHOWN]) + more


def stored_tensors(decoder: Decoder, names: TensorNames) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor that a checkpoint of this decoder stores; views where possible."""
    parameters = dict(decoder.named_parameters())
    for rule in names.rules:
        yield from rule.stored_parts(parameters[rule.parameter].detach())
