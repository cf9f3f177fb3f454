"""Perplexity: what it is, and what rows in eight bits cost of it on a real text."""

import math

import pytest
from torch.nn.functional import log_softmax

import freehold
from freehold.evaluate.perplexity import nats_per_token
from inputs import brown_text, qwen_coder_gguf, smollm2_gguf
from models.forms import needs_kernels
from models.tiny import LLAMA, random_tokens, tiny_decoder
from models.witness import our_logits

WINDOW = 512


def test_it_is_the_mean_over_the_tokens_that_a_window_foretells():
    decoder, tokens_L = tiny_decoder(LLAMA), random_tokens(23)
    sums = []
    for window_L in tokens_L[:20].split(10):
        logs_LV = log_softmax(our_logits(decoder, window_L).double(), dim=-1)
        sums.append(-sum(float(logs_LV[i, window_L[i + 1]]) for i in range(9)))
    assert nats_per_token(decoder, tokens_L.tolist(), window=10) == pytest.approx(sum(sums) / 18, rel=1e-6)


def test_a_text_shorter_than_a_window_is_our_mistake():
    with pytest.raises(AssertionError, match="9 tokens fill no window of 10"):
        nats_per_token(tiny_decoder(LLAMA), [1] * 9, window=10)


@needs_kernels
@pytest.mark.parametrize(("file", "num_windows"), [(smollm2_gguf, 15), (qwen_coder_gguf, 4)], ids=["smollm2", "qwen"])
def test_packed_weights_foretell_a_text_as_their_values_in_float32_do(file, num_windows):
    """Within half a percent of perplexity."""
    packed, dense = (freehold.load(file(), dtype=dtype) for dtype in (None, "float32"))
    assert packed.decoder.packed_weights()
    assert not dense.decoder.packed_weights()
    tokens = packed.tokenizer.encode(brown_text()[:40_000])[: num_windows * WINDOW]
    found, expected = (nats_per_token(model.decoder, tokens, window=WINDOW) for model in (packed, dense))
    assert 3.0 < expected < 5.0
    assert abs(math.expm1(found - expected)) < 0.005
    assert found != expected  # two computations
