"""The first weights of a new model: the distributions that were published, and the same for the same seed."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from freehold.errors import BadFile
from freehold.models.decoder import build_decoder
from freehold.models.init import InitSettings, initialize
from models.tiny import CONFIGS, MTP, tiny_spec

# Of a standard deviation measured on this many values, in units of it; the seed is fixed.
MANY, WITHIN = 1000, 0.1


def begun(config, *, seed=0, dtype=torch.float32):
    decoder = build_decoder(tiny_spec(config), dtype=dtype).to_empty(device="cpu")
    decoder.tie_embeddings()
    initialize(decoder, InitSettings.from_config(config), seed=seed)
    return decoder.requires_grad_(False)


@pytest.mark.parametrize("config", [*CONFIGS.values(), MTP], ids=[*CONFIGS, "mtp"])
def test_every_parameter_is_filled_and_its_matrices_have_the_published_deviation(config):
    rescales = config["model_type"] == "nemotron_h"
    decoder = begun(config | {"initializer_range": 0.0173} | ({"rescale_prenorm_residual": True} if rescales else {}))
    for name, parameter in decoder.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim > 1 and parameter.numel() > MANY and "conv1d" not in name:
            writes = rescales and any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2_latent"))
            std = 0.0173 / math.sqrt(len(decoder.blocks)) if writes else 0.0173
            assert float(parameter.detach().std()) == pytest.approx(std, rel=WITHIN), name


def test_norms_are_one_biases_zero_and_steps_in_their_range():
    decoder = begun(CONFIGS["nemotron"])
    parameters = dict(decoder.named_parameters())
    assert (parameters["norm.weight"] == 1).all()
    assert (parameters["blocks.3.mixer.gate.e_score_correction_bias"] == 0).all()
    assert (parameters["blocks.0.mixer.D"] == 1).all()
    a_H = parameters["blocks.0.mixer.A_log"].exp()
    assert 1.0 <= float(a_H.min()) < float(a_H.max()) <= 16.0
    steps_H = softplus(parameters["blocks.0.mixer.dt_bias"])
    assert 0.0009 < float(steps_H.min()) < float(steps_H.max()) < 0.11
    taps_CW = parameters["blocks.0.mixer.conv1d.weight"]
    assert 0.4 < float(taps_CW.abs().max()) <= 0.5
    assert (dict(begun(CONFIGS["qwen"]).named_parameters())["blocks.0.mixer.q_proj.bias"] == 0).all()


def test_the_seed_decides_the_weights_and_the_dtype_only_rounds_them():
    first, same, other = begun(CONFIGS["llama"]), begun(CONFIGS["llama"]), begun(CONFIGS["llama"], seed=1)
    rounded = begun(CONFIGS["llama"], dtype=torch.bfloat16)
    for a, b, c, d in zip(*(m.parameters() for m in (first, same, other, rounded)), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)
        assert torch.equal(a.bfloat16(), d)


@pytest.mark.parametrize(
    "keys", [{"initializer_range": "wide"}, {"rescale_prenorm_residual": 1}, {"time_step_min": 0.2}], ids=str
)
def test_a_config_that_says_nonsense_is_refused(keys):
    with pytest.raises(BadFile, match=next(iter(keys))):
        InitSettings.from_config(CONFIGS["nemotron"] | keys)
