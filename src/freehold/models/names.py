"""How the tensors of a file and the parameters of a decoder name each other: declarative rules, read both ways.

Belongs here: rules, transforms, and their expansion over a spec. Not here: files, and the names themselves (families).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from freehold.models.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What turns a stored tensor into a parameter, and back; both also run on meta tensors, for the shapes.

    keeps_rows: whether rows are moved at most, each as a whole: then it also holds for rows of a packed format's bytes.
    """

    load: Callable[[Tensor], Tensor]
    save: Callable[[Tensor], Tensor]
    keeps_rows: bool = False


SAME = Transform(load=lambda stored: stored, save=lambda parameter: parameter, keeps_rows=True)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One parameter and the stored tensor it comes from.

    stored: may contain `{expert}`, and then the parameter is the stack over all experts, in order.
    """

    parameter: str
    stored: str
    transform: Transform = SAME

    @property
    def is_stack(self) -> bool:
        return "{expert}" in self.stored

    def stored_names(self, parameter: Tensor) -> list[str]:
        """Return the names of the stored tensors that make up `parameter`."""
        if not self.is_stack:
            return [self.stored]
        return [self.stored.replace("{expert}", str(expert)) for expert in range(len(parameter))]

    def stored_parts(self, parameter: Tensor) -> list[tuple[str, Tensor]]:
        """Return name and value of each stored tensor that `parameter` becomes; values are views where possible."""
        parts = list(parameter.unbind()) if self.is_stack else [parameter]
        return [(n, self.transform.save(p)) for n, p in zip(self.stored_names(parameter), parts, strict=True)]


def place(rules: Iterable[Rule], parameter_prefix: str, stored_prefix: str) -> list[Rule]:
    """Return the rules of a part, put at its place in the decoder and in the file."""
    return [
        Rule(parameter=parameter_prefix + r.parameter, stored=stored_prefix + r.stored, transform=r.transform)
        for r in rules
    ]


def rename(pairs: dict[str, str]) -> list[Rule]:
    """Return plain rules from a table of parameter name -> stored name."""
    return [Rule(parameter=parameter, stored=stored) for parameter, stored in pairs.items()]


def reshaped(*, ours: tuple[int, ...], stored: tuple[int, ...]) -> Transform:
    """Return the transform between two shapes of the same elements in the same order."""
    return Transform(
        load=lambda tensor: tensor.reshape(ours),
        save=lambda parameter: parameter.reshape(stored),
    )


def interleaved_heads(num_heads: int) -> Transform:
    """Return the transform between rotate-half rows (ours) and the interleaved rows of GGUF's llama layout.

    ours    head = [first half; second half]      stored   head = [f0, s0, f1, s1, ...]
    """

    def load(stored: Tensor) -> Tensor:
        pairs = stored.unflatten(0, (num_heads, -1, 2))  # [heads, K/2, 2, ...]
        return pairs.transpose(1, 2).flatten(0, 2)

    def save(parameter: Tensor) -> Tensor:
        halves = parameter.unflatten(0, (num_heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2)

    return Transform(load=load, save=save, keeps_rows=True)


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """All rules of a checkpoint, and the stored names that need no use.

    ignored: patterns of `fnmatch` for tensors that hold no weight (tables that are computed, and the like).
    head: stored names of the output head and of the embeddings; a tied model may store its head once more.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    head: tuple[str, str]


def head_rules(spec: DecoderSpec, head: str) -> list[Rule]:
    """Return the rule of the output head, none where it shares the embeddings."""
    return [] if spec.tied_embeddings else [Rule(parameter="lm_head.weight", stored=head)]
