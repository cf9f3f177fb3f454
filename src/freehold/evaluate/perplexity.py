"""How well a model foretells a text."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from freehold.models.decoder import Decoder
from freehold.models.layout import Layout


@torch.inference_mode()
def nats_per_token(decoder: Decoder, tokens: Sequence[int], *, window: int = 512) -> float:
    """Return the mean negative log-likelihood of a text's tokens, in nats; e to its power is the perplexity.

    The text is cut into windows that do not see each other. The first token of each is given, the others count; what is
    left at the end and fills no window does not.
    """
    assert len(tokens) >= window, f"{len(tokens)} tokens fill no window of {window}"
    total, num_windows = 0.0, len(tokens) // window
    for start in range(0, num_windows * window, window):
        tokens_L = torch.tensor(tokens[start : start + window], device=decoder.device)
        logits_LV = decoder.logits(decoder(tokens_L, Layout.packed([window], decoder.device)))
        total += float(cross_entropy(logits_LV[:-1], tokens_L[1:], reduction="sum"))
    return total / (num_windows * (window - 1))
