"""RoPE: frequencies against transformers' own, the rotation against complex numbers."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from freehold.models.attention import rope_table_frequencies
from freehold.models.spec import Llama3Scaling, RopeSpec, YarnScaling
from freehold.ops.rope import rope_frequencies, rotate, yarn_attention_factor

# float32: a power and a division in another order.
RTOL = 2e-6

HEAD_DIMS = [8, 64, 128]
THETAS = [1e4, 5e5, 1e6]


def config_with(head_dim, **rope):
    rope.setdefault("rope_type", "default")
    original = rope.get("original_max_position_embeddings", 8192)
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=int(original * rope.get("factor", 1)),
        rope_parameters=rope,
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("theta", THETAS)
def test_plain_frequencies_are_those_of_the_witness(head_dim, theta):
    expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config_with(head_dim, rope_theta=theta))
    torch.testing.assert_close(rope_frequencies(head_dim, theta), expected, rtol=RTOL, atol=0)
    assert factor == 1.0


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("original", [64, 8192])
def test_llama3_frequencies_are_those_of_the_witness(head_dim, factor, original):
    rope = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = config_with(
        head_dim, rope_type="llama3", rope_theta=5e5, original_max_position_embeddings=original, **rope
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    spec = RopeSpec(theta=5e5, scaling=Llama3Scaling(original_max_positions=original, **rope))
    found, attention_factor = rope_table_frequencies(spec, head_dim)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=0)
    assert attention_factor == 1.0


def test_llama3_keeps_short_waves_slows_long_ones_and_mixes_between():
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    plain = rope_frequencies(128, 5e5)
    found, _ = rope_table_frequencies(RopeSpec(theta=5e5, scaling=scaling), 128)
    wave = 2 * math.pi / plain
    assert torch.equal(found[wave < 8192 / 4], plain[wave < 8192 / 4])
    assert torch.equal(found[wave > 8192], plain[wave > 8192] / 8)
    between = (wave > 8192 / 4) & (wave < 8192)
    assert between.any()
    assert ((found > plain / 8) & (found < plain))[between].all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize(("factor", "original"), [(1.0, 4096), (4.0, 32768), (40.0, 64)])
@pytest.mark.parametrize(("beta_fast", "beta_slow"), [(32.0, 1.0), (8.0, 2.0)])
def test_yarn_frequencies_and_factor_are_those_of_the_witness(head_dim, theta, factor, original, beta_fast, beta_slow):
    betas = {"factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow}
    config = config_with(
        head_dim, rope_type="yarn", rope_theta=theta, original_max_position_embeddings=original, **betas
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    attention = yarn_attention_factor(factor)
    scaling = YarnScaling(original_max_positions=original, attention_factor=attention, **betas)
    found, attention_factor = rope_table_frequencies(RopeSpec(theta=theta, scaling=scaling), head_dim)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=0)
    assert attention_factor == pytest.approx(expected_factor)


def test_the_attention_factor_of_qwens_yarn_is_the_published_one():
    assert yarn_attention_factor(4.0) == pytest.approx(1.1386, abs=1e-4)
    assert yarn_attention_factor(1.0) == 1.0


def test_a_rotation_is_a_product_of_complex_numbers():
    num_tokens, half = 5, 4
    heads_THK = torch.randn(num_tokens, 3, 2 * half)
    angles_TK = torch.outer(torch.arange(num_tokens).float(), rope_frequencies(2 * half, 1e4))
    turned_THK = rotate(heads_THK, angles_TK.cos().repeat(1, 2), angles_TK.sin().repeat(1, 2))
    numbers = torch.complex(heads_THK[..., :half], heads_THK[..., half:])
    expected = numbers * torch.polar(torch.ones_like(angles_TK), angles_TK)[:, None]
    torch.testing.assert_close(turned_THK, torch.cat((expected.real, expected.imag), dim=-1))


def test_scores_depend_on_the_distance_alone():
    q_THK, k_THK = torch.randn(1, 1, 8).expand(9, 1, 8), torch.randn(1, 1, 8).expand(9, 1, 8)
    angles_TK = torch.outer(torch.arange(9).float(), rope_frequencies(8, 1e4)).repeat(1, 2)
    q_THK, k_THK = (rotate(t, angles_TK.cos(), angles_TK.sin()) for t in (q_THK, k_THK))
    scores = (q_THK[:, 0] @ k_THK[:, 0].T).diagonal(3)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-4, atol=1e-5)
