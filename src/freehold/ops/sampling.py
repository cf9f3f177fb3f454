"""From logits to one token: penalties, filters, and a draw that the seed alone decides."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from freehold.ops.native import kernels


def penalize(
    logits_V: Tensor, *, seen: Tensor, generated_counts_V: Tensor, repetition: float, presence: float, frequency: float
) -> Tensor:
    """Return the logits lowered for tokens that occurred.

    repetition divides positive and multiplies negative logits of `seen` tokens (prompt and answer); presence is
    subtracted once and frequency per occurrence for tokens of the answer.
    Shapes: [V]; seen is int64 ids without repeats.
    Paper: repetition: Keskar et al., 2019, arXiv 1909.05858, section 4.1.
    """
    values = logits_V[seen]
    logits_V = logits_V.index_copy(0, seen, torch.where(values > 0, values / repetition, values * repetition))
    return logits_V - presence * (generated_counts_V > 0) - frequency * generated_counts_V


def sample(logits_V: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """Return a token drawn from the filtered softmax of logits / temperature, by its inverse distribution at `uniform`.

    Order: temperature, then the top_k largest (0 keeps all), then the smallest set whose probability reaches top_p,
    then those with at least min_p times the largest probability. At temperature 0 it is the largest logit, and of equal
    ones the lowest id.
    Precision: float64 for the probabilities and their running sum, so that the draw is exact to the last id.
    This is the specification; `sample_rows` is what runs.
    Paper: top-p: Holtzman et al., 2019, arXiv 1904.09751; min-p: Nguyen et al., 2024, arXiv 2407.01082.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    values, ids = logits_V.double().sort(descending=True, stable=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probabilities = ((values - values[0]) / temperature).softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities
    kept = (before < top_p) & (probabilities >= min_p * probabilities[0]) & (probabilities > 0)
    kept[0] = True
    cumulative = (probabilities * kept).cumsum(dim=0)
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return int(ids[min(index, int(kept.sum()) - 1)])


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a row is drawn from; see `sample`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


def sample_rows(rows: Sequence[Tensor], drawings: Sequence[Drawing]) -> list[int]:
    """Return what `sample` gives for each row of logits [V], all of one length; of a row with a NaN, its place."""
    form = kernels()
    if form is None or not all(row.is_cpu and row.dtype is torch.float32 and row.is_contiguous() for row in rows):
        return [_sampled(row, drawing) for row, drawing in zip(rows, drawings, strict=True)]
    width = len(rows[0])
    assert all(row.shape == (width,) for row in rows), "rows of one length are drawn from at once"
    addresses = array("Q", (row.data_ptr() for row in rows))
    numbers = array("d", (number for d in drawings for number in (d.temperature, d.top_p, d.min_p, d.uniform)))
    top_k = array("q", (drawing.top_k for drawing in drawings))
    tokens = array("q", bytes(8 * len(rows)))
    form.sample(
        torch.get_num_threads(),
        *(values.buffer_info()[0] for values in (addresses, numbers, top_k)),
        len(rows),
        width,
        tokens.buffer_info()[0],
    )
    return tokens.tolist()


def _sampled(logits_V: Tensor, drawing: Drawing) -> int:
    likeliest = int(logits_V.argmax())
    return likeliest if logits_V[likeliest].isnan() else sample(logits_V, **asdict(drawing))


def uniform_draw(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends on the seed and the token's index in its answer, and on nothing else.

    The first 53 bits of BLAKE2b over both, so that an answer can be replayed on any machine and in any language.
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
