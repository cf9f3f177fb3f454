"""A batch: labels that stay inside their document, also those of multi-token prediction."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from freehold.train.batch import IGNORED, Batch, Example


def example(tokens: list[int], following: int = IGNORED) -> Example:
    return Example(tokens_L=torch.tensor(tokens), labels_L=torch.tensor([*tokens[1:], following]))


def test_labels_never_cross_an_edge():
    batch = Batch.packed([example([1, 2, 3]), example([4]), example([5, 6], following=7)])
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.labels_T.tolist() == [2, 3, IGNORED, IGNORED, 6, 7]
    assert batch.layout.starts == (0, 3, 4, 6)
    assert batch.num_supervised == 4


def test_labels_of_mtp_never_cross_an_edge():
    batch = Batch.packed([example([1, 2, 3]), example([4]), example([5, 6], following=7)])
    assert batch.further.tokens_T.tolist() == [2, 3, 3, 4, 6, 6]
    assert batch.further.labels_T.tolist() == [3, IGNORED, IGNORED, IGNORED, 7, IGNORED]
    assert batch.further.num_supervised == 2


@given(st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=9), min_size=1, max_size=6))
def test_packed_labels_are_those_of_each_sequence_alone(documents):
    alone = [Batch.packed([example(tokens)]) for tokens in documents]
    packed = Batch.packed([example(tokens) for tokens in documents])
    for name in ("tokens_T", "labels_T"):
        assert torch.equal(getattr(packed, name), torch.cat([getattr(batch, name) for batch in alone]))
        assert torch.equal(getattr(packed.further, name), torch.cat([getattr(batch.further, name) for batch in alone]))
    assert packed.num_supervised == sum(batch.num_supervised for batch in alone)
