"""Packed sequences in pieces: where each token lies, what fills up, and that all come back."""

import pytest
import torch

from freehold.ops.pieces import cut, whole

CPU = torch.device("cpu")


def test_tokens_lie_in_their_sequences_pieces_and_zeros_fill_up():
    pieces = cut((0, 5, 7), 2, CPU)
    assert pieces.starts == (0, 3, 4)
    assert pieces.spread(torch.arange(1, 8)).tolist() == [[1, 2], [3, 4], [5, 0], [6, 7]]


@pytest.mark.parametrize("starts", [(0, 5, 7), (0, 1), (0, 4, 8), (0, 1, 4, 12)])
@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_gathered_pieces_are_the_tokens_that_were_spread(starts, length):
    values_TK = torch.randn(starts[-1], 3)
    for pieces in (cut(starts, length, CPU), whole(starts, CPU)):
        assert torch.equal(pieces.gather(pieces.spread(values_TK)), values_TK)


def test_what_inference_has_cut_serves_training_afterwards():
    starts = (0, 3, 10)
    with torch.inference_mode():
        whole(starts, CPU)
    values_T = torch.randn(10, requires_grad=True)
    whole(starts, CPU).spread(values_T).square().sum().backward()
    torch.testing.assert_close(values_T.grad, 2 * values_T.detach())
