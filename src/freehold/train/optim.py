"""What moves the weights: AdamW, or Muon for the matrices of blocks; float32 inside, whatever the model's dtype.

Belongs here: which parameter is moved by what, gradients in float32, and the state that outlives a process. AdamW's
arithmetic is torch.optim's, Muon's is in muon.py. Not here: the learning rate (schedule.py), when a step is taken
(step.py).
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from freehold.errors import CheckpointMismatch, UnsupportedModel
from freehold.models.decoder import Decoder
from freehold.models.linear import Linear
from freehold.models.moe import Experts, Router
from freehold.parallel.data import REPLICATED, Gradients, local
from freehold.train.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How weights are moved; the defaults are those of Nemotron 3's pre-training.

    matrices: what moves the matrices of blocks: AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) as it moves all
    else, or Muon (Jordan, 2024; Liu et al., 2025, arXiv 2502.16982), scaled so that it takes AdamW's learning rate and
    decay. betas, eps: of AdamW. momentum: of Muon.
    """

    matrices: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95


def train_all(decoder: Decoder) -> None:
    """Have every parameter ask for a gradient, but the corrections of routers, which balance.py moves.

    Mutates: decoder.
    """
    decoder.requires_grad_(True)
    for module in decoder.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias.requires_grad_(False)


class Optimizer:
    """Moves the parameters of a decoder that ask for a gradient when it is made.

    A parameter that is not float32 has a float32 master: gradients of all micro-batches are summed in it, steps are
    taken on it, and the parameter is its rounding. Small steps would vanish in bfloat16, as would small gradients in a
    sum. What has two axes or more decays: matrices, experts, routers, convolution taps, embeddings. Norms, biases,
    A_log, D and dt_bias do not.
    """

    def __init__(self, decoder: Decoder, settings: OptimizerSettings, gradients: Gradients = REPLICATED):
        """gradients: what becomes of them where other processes have made some, too. Raises: UnsupportedModel."""
        self._gradients = gradients
        self._parameters = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype is torch.float32 and local(p) is p else local(p.detach()).float()
            for name, p in self._parameters.items()
        }
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                hook = parameter.register_post_accumulate_grad_hook(_collector(self._masters[name]))
                weakref.finalize(self, hook.remove)  # the decoder may be trained by another later
        by_muon = matrix_names(decoder) if settings.matrices == "muon" else frozenset()
        if by_muon & gradients.divided.keys():
            raise UnsupportedModel("Muon moves whole matrices, and a process has parts", hint="AdamW moves parts, too")
        self._parts = {name: _parts(name, m, apart=name in by_muon) for name, m in self._masters.items()}
        self._optimizers = _optimizers(self._parts, by_muon, settings)

    def sum_gradients(self) -> None:
        """Add to the gradients of this process those of all others. Mutates: the gradients."""
        self._gradients.sum(self._accumulated())

    def clip(self, max_norm: float) -> float:
        """Scale all gradients so that their norm, as of one vector, is `max_norm` at most; return what it was.

        Mutates: the gradients.
        """
        norm = self._gradients.norm(self._accumulated())
        nn.utils.clip_grads_with_norm_(list(self._masters.values()), max_norm, norm)
        return float(norm)

    def step(self, learning_rate: float) -> None:
        """Move the parameters by their gradients, and forget these. Mutates: the decoder's parameters."""
        for master, parts in zip(self._masters.values(), self._parts.values(), strict=True):
            _share_gradient(master, tuple(parts.values()))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                if master is not self._parameters[name]:
                    local(self._parameters[name]).copy_(master)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Drop what has been accumulated. Mutates: the gradients."""
        for master, parts in zip(self._masters.values(), self._parts.values(), strict=True):
            master.grad = None
            for part in parts.values():
                part.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all state by name, as it is, not a copy: masters, moments, counts of steps."""
        masters = {f"{n}/master": m for n, m in self._masters.items() if self._parameters[n].dtype is not m.dtype}
        moments = {
            f"{name}/{key}": value
            for name, part in self._all_parts()
            for optimizer in self._optimizers
            for key, value in optimizer.state.get(part, {}).items()
        }
        return masters | moments

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take on the state that `tensors` returned, of the same decoder with the same settings. Mutates: the state.

        Raises: CheckpointMismatch.
        """
        parts = dict(self._all_parts())
        moved_by = {id(p): o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for name, value in tensors.items():
            owner, _, key = name.rpartition("/")
            if key == "master" and owner in self._masters:
                self._masters[owner].copy_(value)
            elif owner in parts:
                moved_by[id(parts[owner])].state[parts[owner]][key] = value.to(parts[owner].device, copy=True)
            else:
                raise CheckpointMismatch(f"`{name}` belongs to no parameter that is trained")

    def _accumulated(self) -> dict[str, Tensor]:
        return {name: master.grad for name, master in self._masters.items() if master.grad is not None}

    def _all_parts(self) -> Iterator[tuple[str, Tensor]]:
        for parts in self._parts.values():
            yield from parts.items()


def _collector(master: Tensor) -> Callable[[Tensor], None]:
    """Return what moves a parameter's gradient to its master, as soon as a backward has made it."""

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None, "this is called when there is one"
        gradient, parameter.grad = local(parameter.grad).float(), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    return collect


def matrix_names(decoder: Decoder) -> frozenset[str]:
    """Return the names of the matrices of blocks: what maps hidden vectors to hidden vectors, routers left out."""
    names = set[str]()
    for path, module in decoder.named_modules():
        match module:
            case Linear() if module is not decoder.lm_head:
                names.add(f"{path}.weight")
            case Experts():
                names |= {f"{path}.up_proj", f"{path}.down_proj"}
    return frozenset(names)


def _parts(name: str, master: Tensor, *, apart: bool) -> dict[str, Tensor]:
    """Return what an optimizer sees of a master: all of it, or each matrix of a stack apart; views by name."""
    whole = master.detach()
    return (
        {f"{name}.{i}": part for i, part in enumerate(whole.unbind())} if apart and whole.ndim == 3 else {name: whole}
    )


def _share_gradient(master: Tensor, parts: tuple[Tensor, ...]) -> None:
    """Give each part its piece of the gradient. Mutates: parts."""
    if master.grad is not None:
        pieces = (master.grad,) if master.shape == parts[0].shape else master.grad.unbind()
        for part, piece in zip(parts, pieces, strict=True):
            part.grad = piece


def _optimizers(
    parts: Mapping[str, Mapping[str, Tensor]], by_muon: frozenset[str], settings: OptimizerSettings
) -> list[torch.optim.Optimizer]:
    muon = [part for name in parts if name in by_muon for part in parts[name].values()]
    rest = [part for name in parts if name not in by_muon for part in parts[name].values()]
    decayed, undecayed = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    found: list[torch.optim.Optimizer] = []
    if muon:
        found.append(Muon(muon, weight_decay=settings.weight_decay, momentum=settings.momentum))
    if rest:
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        found.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]], betas=settings.betas, eps=settings.eps, fused=True
            )
        )
    return found
