"""Law 1 to 3 and training on a GPU: the same decoder there as in float64 on the CPU, in any parts and any company."""

import copy

import pytest
import torch
from torch import Tensor

from freehold.evaluate.laws import check_laws, relative_difference
from freehold.models.decoder import Decoder
from freehold.models.layout import Layout
from freehold.train.batch import Batch
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.step import Objective, train_step
from models.forms import running
from models.tiny import CONFIGS, MTP, random_tokens, saved_names, tiny_decoder
from train.steps import LENGTHS, batch_of, document, step_on, training

if not torch.cuda.is_available():
    pytest.skip("no GPU is here", allow_module_level=True)

CONFIGS_AND_MTP = CONFIGS | {"nemotron-mtp": MTP}
ALL = pytest.mark.parametrize("name", CONFIGS_AND_MTP)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Against float64, relative to the length of what is compared: sums in another order, and roundings to bfloat16 over
# four blocks, where the choice of an expert may turn on one.
VALUES = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
ROUTED_BFLOAT16 = 0.25
# Seen through the scan's decays, which are small sums of large terms.
GRADIENTS = 2e-3


def packed_tokens() -> Tensor:
    return torch.cat([random_tokens(length, seed=length) for length in LENGTHS])


def in_float64(decoder: Decoder) -> Tensor:
    """Return the hidden states of the reference with every `float()` in it made a `double()`."""
    with running("off"), pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return copy.deepcopy(decoder).double()(packed_tokens(), Layout.packed(LENGTHS))


@ALL
@DTYPES
def test_hidden_states_are_those_of_float64(name, dtype):
    decoder = tiny_decoder(CONFIGS_AND_MTP[name], dtype=dtype)
    expected_TD = in_float64(decoder)
    decoder = decoder.cuda()
    with torch.inference_mode():
        found_TD = decoder(packed_tokens().cuda(), Layout.packed(LENGTHS, "cuda"))
    is_routed = dtype is torch.bfloat16 and "E" in CONFIGS_AND_MTP[name].get("hybrid_override_pattern", "")
    assert relative_difference(found_TD.cpu(), expected_TD) < (ROUTED_BFLOAT16 if is_routed else VALUES[dtype])


@ALL
@DTYPES
def test_the_laws_of_the_model_hold(name, dtype):
    config = CONFIGS_AND_MTP[name]
    decoder = tiny_decoder(config, dtype=dtype)
    names = saved_names(decoder, config)
    failed = [finding for finding in check_laws(decoder.cuda(), names, seed=0) if not finding.holds]
    assert not failed


def batch_on_the_card() -> Batch:
    return Batch.packed([document(length) for length in LENGTHS], "cuda")


@ALL
def test_a_step_has_the_loss_and_the_gradients_of_the_cpu(name):
    config = CONFIGS_AND_MTP[name]
    expected, gradients = step_on(training(config), [batch_of()])
    found, on_card = step_on(training(config).cuda(), [batch_on_the_card()])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.mtp_losses == pytest.approx(expected.mtp_losses, rel=1e-5)
    assert on_card.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert relative_difference(on_card[parameter].cpu(), gradient) < GRADIENTS, parameter


@ALL
@DTYPES
def test_the_same_step_moves_the_weights_by_the_same_bits(name, dtype):
    def moved() -> Decoder:
        decoder = training(CONFIGS_AND_MTP[name], dtype=dtype).cuda()
        step_on(decoder, [batch_on_the_card()])
        return decoder

    one, other = moved(), moved()
    for (parameter, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second), parameter


def test_a_run_goes_on_from_what_was_saved_as_if_it_had_not_stopped():
    def step(decoder: Decoder, optimizer: Optimizer, number: int) -> None:
        batches = [batch_on_the_card()]
        train_step(decoder, optimizer, batches, number=number, learning_rate=1e-2, objective=Objective())

    decoder = training(MTP, dtype=torch.bfloat16).cuda()
    optimizer = Optimizer(decoder, OptimizerSettings())
    step(decoder, optimizer, 1)
    resumed = copy.deepcopy(decoder)
    saved = {name: tensor.cpu() for name, tensor in optimizer.tensors().items()}
    step(decoder, optimizer, 2)
    other = Optimizer(resumed, OptimizerSettings())
    other.load_tensors(saved)
    step(resumed, other, 2)
    for (parameter, first), second in zip(decoder.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second), parameter
