"""Low-rank adapters beside frozen weights: wrapped around a built decoder, and merged into its weights again.

    y = x W^T + alpha / rank * (x A^T) B^T          A is [R, K], B [N, R] and zero at first

W stays as it is, packed too. Mixers do not know: an adapted weight is a weight (ops/weight.py).
Paper: Hu et al., 2021, arXiv 2106.09685, section 4.1; on quantized weights: Dettmers et al., 2023, arXiv 2305.14314.

Belongs here: which weights get an adapter, what it begins as, and the way back. Not here: the names that others give
adapters (peft.py), files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from freehold.errors import BadRequest
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.linear import Linear, set_weight
from freehold.models.moe import Experts
from freehold.ops.weight import Adapted, Weight, dense

ALL_LINEAR = "all-linear"
MAX_RANK = 1 << 20
# What has no adapter here, by the part of a name that tells it.
UNADAPTED = {
    "lm_head": "the output head",
    "embed_tokens": "embeddings",
    "embeddings": "embeddings",
    "gate": "routers",
    "mtp": "multi-token prediction",
}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What adapters are made: rank R, alpha (the product counts alpha / rank times), and where.

    targets: ends of the names of projections, such as "q_proj", "shared_experts.up_proj" or "experts.up_proj"; or
    "all-linear", every projection of every block. Embeddings, output head, routers and MTP get none.
    dtype: of A and B.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < float("inf"):
            raise BadRequest(f"an adapter of rank {self.rank} and alpha {self.alpha}: both are wanted above 0")
        if self.rank > MAX_RANK:
            raise BadRequest(f"an adapter of rank {self.rank:,}: {MAX_RANK:,} is more than any matrix has")
        if not self.targets:
            raise BadRequest("an adapter without targets adapts nothing", hint=f"{ALL_LINEAR} takes every projection")

    @property
    def scale(self) -> float:
        """What the product of A and B counts."""
        return self.alpha / self.rank


def wrap(decoder: Decoder, settings: LoraSettings, *, seed: int) -> None:
    """Give projections of a decoder adapters that add nothing yet, and let nothing but these ask for a gradient.

    A is uniform in +-1 / sqrt(K), as `torch.nn.Linear` begins and as PEFT begins; the same seed draws the same.
    Mutates: decoder.
    Raises: BadRequest where a target names no projection, or the decoder has adapters already.
    """
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, settings.dtype)
    pairs = {}
    for name in _chosen(decoder, settings.targets):
        *stack, num_rows, num_columns = projections(decoder)[name].shape
        a = torch.empty(*stack, settings.rank, num_columns).uniform_(-1, 1, generator=random) / num_columns**0.5
        pairs[name] = a.to(dtype), torch.zeros(*stack, num_rows, settings.rank, dtype=dtype)
    attach(decoder, pairs, scale=settings.scale)


def attach(decoder: Decoder, pairs: Mapping[str, tuple[Tensor, Tensor]], *, scale: float) -> None:
    """Put A and B beside the weights of these names; nothing but they ask for a gradient. Mutates: decoder.

    Shapes: A [R, K] and B [N, R] for a weight [N, K]; stacked experts have stacks of them.
    Raises: BadRequest where the decoder has adapters already.
    """
    if any(adapted(decoder)):
        raise BadRequest("the model has an adapter already", hint="merge it first")
    decoder.requires_grad_(False)
    for name, (a, b) in pairs.items():
        module, leaf = _owner(decoder, name)
        base = getattr(module, leaf)
        a, b = nn.Parameter(a.to(decoder.device)), nn.Parameter(b.to(decoder.device))
        set_weight(module, leaf, Adapted(base=base, a=a, b=b, scale=scale))


@torch.no_grad()
def merge(decoder: Decoder, dtype: torch.dtype | None = None) -> float:
    """Add every adapter to its weight, W + scale * B A in float32, rounded once; return what the rounding took.

    That is the length of all rounding errors over the length of all that was added, as of one vector each: at 1 nothing
    of the adapter can be told from them. A packed weight becomes a tensor: what was quantized is not quantized again.
    dtype: of the merged weights; None for the decoder's. Mutates: decoder.
    """
    errors = sums = 0.0
    for name, weight in list(adapted(decoder)):
        module, leaf = _owner(decoder, name)
        added = weight.scale * (weight.b.float() @ weight.a.float())
        exact = dense(weight.base, torch.float32).float() + added
        rounded = exact.to(dtype or decoder.dtype)
        errors += float((rounded.float() - exact).square().sum())
        sums += float(added.square().sum())
        set_weight(module, leaf, rounded)
    return (errors / sums) ** 0.5 if sums else 0.0


@torch.no_grad()
def unpack(decoder: Decoder, dtype: torch.dtype) -> None:
    """Make every weight a tensor, as a decoder of that dtype has it. Mutates: decoder.

    Raises: BadRequest where the dtype cannot hold a value.
    """
    weights = decoder.weights()
    for name, parameter in build_decoder(decoder.spec, dtype=dtype).named_parameters():
        module, leaf = _owner(decoder, name)
        value = dense(weights[name], torch.float32).detach().to(parameter.dtype)
        if not value.isfinite().all():
            raise BadRequest(f"`{name}` has values that are no numbers in {dtype}", hint="use bfloat16 or float32")
        set_weight(module, leaf, value)
    decoder.tie_embeddings()


def adapted(decoder: Decoder) -> Iterator[tuple[str, Adapted]]:
    """Yield the weights that have an adapter, by their names."""
    return ((name, weight) for name, weight in projections(decoder).items() if isinstance(weight, Adapted))


def projections(decoder: Decoder) -> dict[str, Weight]:
    """Return every weight that can have an adapter, by the name that it has as a parameter."""
    found: dict[str, Weight] = {}
    for path, module in decoder.blocks.named_modules(prefix="blocks"):
        match module:
            case Linear():
                found[f"{path}.weight"] = module.weight
            case Experts():
                found |= {f"{path}.up_proj": module.up_proj, f"{path}.down_proj": module.down_proj}
    return found


def module_name(weight_name: str) -> str:
    """Return the name of a projection, as targets end it: without the `.weight` of a parameter."""
    return weight_name.removesuffix(".weight")


def unadapted_part(name: str) -> str | None:
    """Return what a name is of, where that is a part of a model that has no adapter here."""
    return next((what for part, what in UNADAPTED.items() if part in name.split(".")), None)


def _chosen(decoder: Decoder, targets: tuple[str, ...]) -> list[str]:
    names = list(projections(decoder))
    if ALL_LINEAR in targets:
        return names
    chosen = {target: [n for n in names if f".{module_name(n)}".endswith(f".{target}")] for target in targets}
    for target, found in chosen.items():
        if not found:
            known = ", ".join(sorted({module_name(name).rpartition(".")[2] for name in names}))
            what = unadapted_part(target)
            seen = f"{target!r} is of {what}, where no adapter can be" if what else f"no projection is {target!r}"
            raise BadRequest(seen, hint=f"adapters can be on {known}")
    wanted = {name for found in chosen.values() for name in found}
    return [name for name in names if name in wanted]


def _owner(decoder: Decoder, weight_name: str) -> tuple[nn.Module, str]:
    path, _, leaf = weight_name.rpartition(".")
    return decoder.get_submodule(path), leaf
