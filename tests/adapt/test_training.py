"""Adapters in training: their gradient, and that steps move them and nothing else."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adapt.adapters import HERE_AND_OFF, SETTINGS, adapt
from freehold.adapt.lora import LoraSettings, adapted, wrap
from freehold.evaluate.laws import relative_difference
from freehold.models.decoder import Decoder
from freehold.models.layout import Layout
from freehold.ops.weight import dense
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.step import Objective, train_step
from models.forms import needs_kernels, running, same_bits
from models.packing import PACKED_LLAMA, PACKED_NEMOTRON, pack_decoder
from models.tiny import CONFIGS, random_tokens, tiny_decoder
from train.steps import batch_of

# Norms, the scan and the softmax of the witness are float32, too: rounding, seen through at most four blocks.
GRADIENT_TOLERANCE = 2e-4
FROZEN_ROUTERS = Objective(correction_rate=0.0)  # the corrections belong to the base


def gradient_of_loss(decoder: Decoder) -> None:
    tokens_T = random_tokens(41)
    logits_TV = decoder.logits(decoder(tokens_T[:-1], Layout.packed([25, 15]))).double()
    cross_entropy(logits_TV, tokens_T[1:]).backward()


def dense_witness(config) -> tuple[Decoder, dict[str, tuple[Tensor, Tensor]]]:
    """Return the same decoder in float64, its adapted weights computed from A and B, and these."""
    decoder = adapt(tiny_decoder(config))
    weights = dict(adapted(decoder))
    decoder.double()
    leaves = {}
    for name, weight in weights.items():
        a, b = (part.detach().double().requires_grad_() for part in (weight.a, weight.b))
        path, _, leaf = name.rpartition(".")
        module = decoder.get_submodule(path)
        vars(module)[leaf] = weight.base.detach().double() + weight.scale * b @ a
        leaves[name] = a, b
    return decoder, leaves


@pytest.mark.parametrize("form", HERE_AND_OFF)
@pytest.mark.parametrize("name", ["llama", "qwen", "nemotron", "nemotron-latent"])
def test_gradients_are_those_of_dense_weights_in_float64(name, form):
    with running("off"):
        witness, leaves = dense_witness(CONFIGS[name])
        gradient_of_loss(witness)
    decoder = adapt(tiny_decoder(CONFIGS[name]))
    with running(form):
        gradient_of_loss(decoder)
    for path, weight in adapted(decoder):
        for found, expected in zip((weight.a, weight.b), leaves[path], strict=True):
            assert relative_difference(found.grad, expected.grad) <= GRADIENT_TOLERANCE, path
    with_gradient = {name for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{path}_lora_{part}" for path, _ in adapted(decoder) for part in "AB"}


def take_steps(decoder: Decoder, num_steps: int) -> list[float]:
    optimizer = Optimizer(decoder, OptimizerSettings(weight_decay=0.0))
    batch = batch_of()
    return [
        train_step(decoder, optimizer, [batch], number=n, learning_rate=1e-2, objective=FROZEN_ROUTERS).loss
        for n in range(1, num_steps + 1)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen", "nemotron", "nemotron-latent"])
def test_steps_lower_the_loss_and_move_adapters_alone(name, dtype):
    decoder = tiny_decoder(CONFIGS[name], dtype=dtype)
    before = {path: dense(weight, dtype).clone() for path, weight in decoder.weights().items()}
    wrap(decoder, SETTINGS, seed=0)
    losses = take_steps(decoder, 12)
    assert losses[-1] < losses[0] - 0.05
    assert all(weight.b.any() for _, weight in adapted(decoder))
    assert [
        path for path, weight in decoder.weights().items() if not same_bits(dense(weight, dtype), before[path])
    ] == []


@needs_kernels
@pytest.mark.parametrize(
    ("config", "format"), [(PACKED_LLAMA, "Q4_0"), (PACKED_NEMOTRON, "Q4_0")], ids=["llama", "nemotron"]
)
def test_adapters_learn_beside_packed_weights(config, format):
    decoder = pack_decoder(tiny_decoder(config), format)
    wrap(decoder, SETTINGS, seed=0)
    losses = take_steps(decoder, 12)
    assert losses[-1] < losses[0] - 0.05


def test_bfloat16_adapters_have_float32_masters():
    decoder = tiny_decoder(CONFIGS["llama"])
    wrap(decoder, LoraSettings(rank=4, dtype="bfloat16"), seed=0)
    assert {weight.a.dtype for _, weight in adapted(decoder)} == {torch.bfloat16}
    optimizer = Optimizer(decoder, OptimizerSettings())
    masters = {name for name in optimizer.tensors() if name.endswith("/master")}
    assert len(masters) == 2 * len(list(adapted(decoder)))
    assert all(isinstance(parameter, nn.Parameter) for parameter in decoder.parameters())
