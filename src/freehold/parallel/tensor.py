"""Tensor parallelism: every process has some of the heads and channels of each mixer, and sees all tokens.

    x ──shared──> this process's heads, groups, channels ──> partial sums ──summed──> x + ...

A mixer with fewer heads is a mixer: it keeps its class, and gets a spec of what it has. What goes in is shared, what
comes out is summed, by hooks; no mixer knows of it. A router, the latent projections beside it and norms see whole
tokens in every process, and have the whole gradient there.
Paper: Shoeybi et al., 2019, arXiv 1909.08053, section 3; Mamba-2 by heads and by the groups that share B, C and the
norm: Dao and Gu, 2024, arXiv 2405.21060, section 8.1.

Belongs here: which parameter is cut where. Not here: embeddings and output head (vocabulary.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from freehold.errors import BadInput
from freehold.models.attention import Attention
from freehold.models.block import Block, Mixer
from freehold.models.mamba2 import Mamba2
from freehold.models.mlp import GatedMlp, SquaredReluMlp
from freehold.models.moe import Moe
from freehold.parallel.cuts import Cut, cut_parameter
from freehold.parallel.exchange import shared, summed


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a mixer is divided.

    counts: what has to be a multiple of the processes, by name. cuts: of its parameters, by name. ends: the modules
    whose input is shared and whose output is summed.
    """

    counts: Mapping[str, int]
    cuts: Mapping[str, Cut]
    ends: tuple[nn.Module, ...]


def divide_mixer(block: Block, group: dist.ProcessGroup, *, where: str) -> dict[str, Cut]:
    """Leave a block only this process's part of its mixer, and return the cuts by the names of the mixer's parameters.

    where: which block it is, for messages. Mutates: block.
    Raises: BadInput where the mixer does not divide evenly.
    """
    index, count = group.rank(), group.size()
    division = division_of(block.mixer)
    for what, number in division.counts.items():
        if number % count:
            raise BadInput(
                f"{where} has {number:,} {what}, which cannot be divided over {count} processes",
                hint="`tensor` has to divide the numbers of heads, groups and channels of all blocks",
            )
    for name, cut in division.cuts.items():
        cut_parameter(block.mixer, name, cut, index=index, count=count)
    _shrink(block.mixer, count)
    for module in division.ends:
        _join(module, group)
    return dict(division.cuts)


def division_of(mixer: Mixer) -> Division:
    """Return how a mixer is divided."""
    match mixer:
        case Attention():
            return _attention(mixer)
        case Mamba2():
            return _mamba2(mixer)
        case GatedMlp() | SquaredReluMlp():
            width, cuts = _mlp(mixer)
            return Division(counts={"channels of its MLP": width}, cuts=cuts, ends=(mixer,))
        case Moe():
            return _moe(mixer)


def _attention(mixer: Attention) -> Division:
    spec = mixer.spec
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    cuts = {"q_proj.weight": _rows(q), "k_proj.weight": _rows(kv), "v_proj.weight": _rows(kv)}
    if spec.qkv_bias:
        cuts |= {"q_proj.bias": _rows(q), "k_proj.bias": _rows(kv), "v_proj.bias": _rows(kv)}
    return Division(
        counts={"key/value heads": spec.num_kv_heads}, cuts=cuts | {"o_proj.weight": _columns(q)}, ends=(mixer,)
    )


def _mamba2(mixer: Mamba2) -> Division:
    spec = mixer.spec
    inner, shared_width, heads = spec.inner_width, spec.num_groups * spec.state_size, spec.num_heads
    cuts = {
        "in_proj.weight": _rows(inner, inner, shared_width, shared_width, heads),  # z x B C dt
        "conv1d.weight": _rows(inner, shared_width, shared_width),
        "conv1d.bias": _rows(inner, shared_width, shared_width),
        "A_log": _rows(heads),
        "D": _rows(heads),
        "dt_bias": _rows(heads),
        "norm.weight": _rows(inner),
        "out_proj.weight": _columns(inner),
    }
    return Division(counts={"heads": heads, "groups": spec.num_groups}, cuts=cuts, ends=(mixer,))


def _mlp(mlp: GatedMlp | SquaredReluMlp) -> tuple[int, dict[str, Cut]]:
    width = mlp.down_proj.weight.shape[1]
    ups = ("gate_proj.weight", "up_proj.weight") if isinstance(mlp, GatedMlp) else ("up_proj.weight",)
    return width, {**dict.fromkeys(ups, _rows(width)), "down_proj.weight": _columns(width)}


def _moe(mixer: Moe) -> Division:
    width = mixer.experts.up_proj.shape[1]
    shared_width, shared_cuts = _mlp(mixer.shared_experts)
    cuts = {f"shared_experts.{name}": cut for name, cut in shared_cuts.items()}
    cuts |= {
        "experts.up_proj": Cut(axis=1, segments=(width,)),
        "experts.down_proj": Cut(axis=2, segments=(width,)),
    }
    counts = {"channels of each expert": width, "channels of its shared expert": shared_width}
    return Division(counts=counts, cuts=cuts, ends=(mixer.experts, mixer.shared_experts))


def _rows(*segments: int) -> Cut:
    return Cut(axis=0, segments=segments)


def _columns(*segments: int) -> Cut:
    return Cut(axis=1, segments=segments)


def _shrink(mixer: Mixer, count: int) -> None:
    """Give a mixer the spec of what it has left. Mutates: mixer."""
    match mixer:
        case Attention(spec=spec):
            mixer.spec = replace(spec, num_heads=spec.num_heads // count, num_kv_heads=spec.num_kv_heads // count)
        case Mamba2(spec=spec):
            mixer.spec = replace(spec, num_heads=spec.num_heads // count, num_groups=spec.num_groups // count)


def _join(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Have a module's input shared, and its output summed. Mutates: module."""

    def share(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(shared(a, group) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)

    def add_up(_: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
        return summed(out, group)

    module.register_forward_pre_hook(share)
    module.register_forward_hook(add_up)
