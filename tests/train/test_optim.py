"""The optimizer against torch's own on plain tensors: who decays, who is moved by what, masters, saved state."""

import pytest
import torch
from torch import Tensor

from freehold.errors import CheckpointMismatch
from freehold.models.decoder import Decoder
from freehold.train.muon import orthogonalized
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.step import Objective, train_step
from models.forms import same_bits
from models.tiny import LATENT, LLAMA, MTP, QWEN
from train.steps import batch_of, training

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
ADAMW, MUON = OptimizerSettings(), OptimizerSettings(matrices="muon")
BOTH = pytest.mark.parametrize("settings", [ADAMW, MUON], ids=["adamw", "muon"])
HYBRID = LATENT | {"hybrid_override_pattern": "M*-E"}


def give_gradients(decoder: Decoder, *, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Have every trained parameter get a random gradient as a backward gives it; return them in float32."""
    random = torch.Generator().manual_seed(seed)
    given = {
        name: (scale * torch.randn(p.shape, generator=random)).to(p.dtype)
        for name, p in decoder.named_parameters()
        if p.requires_grad
    }
    torch.stack([(p * given[n]).sum().float() for n, p in decoder.named_parameters() if n in given]).sum().backward()
    return {name: gradient.float() for name, gradient in given.items()}


def values(decoder: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("config", [QWEN, MTP], ids=["qwen", "nemotron-mtp"])
@BOTH
def test_what_has_two_axes_decays_and_nothing_else(config, settings):
    decoder = training(config)
    before = values(decoder)
    optimizer = Optimizer(decoder, settings)
    give_gradients(decoder, scale=0.0)
    optimizer.step(0.1)
    moved = {name for name, after in values(decoder).items() if not same_bits(after, before[name])}
    assert moved == {name for name, p in decoder.named_parameters() if p.ndim >= 2}
    names = "".join(sorted(set(before) - moved))
    for kind in ("norm", *(("bias",) if config is QWEN else ("A_log", ".D", "dt_bias", "conv1d.bias"))):
        assert kind in names
    for name in moved:
        torch.testing.assert_close(values(decoder)[name], before[name] * (1 - 0.1 * 0.1))


def test_adamw_is_that_of_torch():
    decoder = training(HYBRID)
    copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in decoder.named_parameters()}
    groups = [
        {"params": [p for p in copies.values() if p.ndim >= 2 and p.requires_grad], "weight_decay": 0.1},
        {"params": [p for p in copies.values() if p.ndim < 2 and p.requires_grad], "weight_decay": 0.0},
    ]
    theirs, ours = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)), Optimizer(decoder, ADAMW)
    for seed in range(3):
        for name, gradient in give_gradients(decoder, seed=seed).items():
            copies[name].grad = gradient
        ours.step(1e-2)
        theirs.step()
    for name, after in values(decoder).items():
        torch.testing.assert_close(after, copies[name].detach(), rtol=1e-5, atol=1e-6)


def test_muon_moves_each_matrix_of_blocks_apart_and_adamw_the_rest():
    by_adamw, by_muon = training(MTP), training(MTP)
    before, (first, second) = values(by_muon), (Optimizer(by_adamw, ADAMW), Optimizer(by_muon, MUON))
    gradients = give_gradients(by_adamw)
    give_gradients(by_muon)
    first.step(1e-2)
    second.step(1e-2)
    found, plain = values(by_muon), values(by_adamw)
    matrices = {name for name in found if not same_bits(found[name], plain[name])}
    suffixes = ("_proj.weight", "_proj")
    assert matrices == {name for name in found if name.endswith(suffixes)}
    assert {"blocks.3.mixer.experts.up_proj", "mtp.eh_proj.weight"} <= matrices
    assert not {"embeddings.weight", "lm_head.weight", "blocks.3.mixer.gate.weight"} & matrices
    for name in matrices:
        stacks = [t if t.ndim == 3 else t[None] for t in (before[name], gradients[name], found[name])]
        for old, gradient, new in zip(*stacks, strict=True):
            expected = old.clone()
            expected.grad = gradient.clone()
            torch.optim.Muon([expected], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
            largest = float((expected.detach() - old).abs().max())  # torch's rounds to bfloat16 within the iteration
            torch.testing.assert_close(new, expected.detach(), rtol=0, atol=0.05 * largest, msg=name)


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 32, 32)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_lengths(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    found = orthogonalized(matrices)
    assert torch.all((torch.linalg.svdvals(found) > 0.3) & (torch.linalg.svdvals(found) < 1.3))
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ found @ vt.mT  # diagonal where the directions are the same
    assert torch.allclose(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)), atol=1e-9)
    torch.testing.assert_close(orthogonalized(matrices.float()).double(), found, rtol=1e-4, atol=1e-5)


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    decoder = training(MTP)
    before, optimizer = values(decoder), Optimizer(decoder, OptimizerSettings(matrices="muon", weight_decay=0.0))
    give_gradients(decoder)
    optimizer.step(1e-2)
    moved = {name: (after - before[name]).square().mean().sqrt() for name, after in values(decoder).items()}
    for name in ("blocks.2.mixer.up_proj.weight", "blocks.3.mixer.experts.up_proj", "mtp.eh_proj.weight"):
        assert 0.1e-2 < float(moved[name]) < 0.3e-2, name  # 0.2 of AdamW's largest, as Liu et al. choose it


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    """One and 2^-10: their sum in bfloat16 is one."""
    decoder = training(LLAMA, dtype=torch.bfloat16)
    optimizer = Optimizer(decoder, ADAMW)
    for value in (1.0, 2.0**-10, 2.0**-10):
        torch.stack([(p * value).sum().float() for p in decoder.parameters()]).sum().backward()
    num_values = sum(p.numel() for p in decoder.parameters())
    assert optimizer.clip(float("inf")) == pytest.approx((1 + 2.0**-9) * num_values**0.5, rel=1e-5)


def test_small_steps_add_up_in_bfloat16():
    decoder = training(LLAMA, dtype=torch.bfloat16)
    before, optimizer = values(decoder), Optimizer(decoder, OptimizerSettings(weight_decay=0.0))
    for _ in range(50):
        give_gradients(decoder)
        optimizer.step(1e-4)
    moved = values(decoder)["blocks.1.norm.weight"].float() - before["blocks.1.norm.weight"].float()
    assert float(moved.abs().mean()) == pytest.approx(50 * 1e-4, rel=0.3)


def test_bfloat16_parameters_are_the_rounding_of_what_float32_ones_would_be():
    narrow, wide = training(HYBRID, dtype=torch.bfloat16), training(HYBRID)
    with torch.no_grad():
        for parameter, rounded in zip(wide.parameters(), narrow.parameters(), strict=True):
            parameter.copy_(rounded)
    ours, exact = Optimizer(narrow, ADAMW), Optimizer(wide, ADAMW)
    for seed in range(3):
        gradients = give_gradients(narrow, seed=seed)
        for name, parameter in wide.named_parameters():
            parameter.grad = gradients.get(name)
        ours.step(1e-2)
        exact.step(1e-2)
    for name, after in values(narrow).items():
        assert same_bits(after, values(wide)[name].to(after.dtype)), name


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_state_goes_on_with_the_same_bits(dtype, settings):
    decoder = training(MTP, dtype=dtype)
    optimizer = Optimizer(decoder, settings)
    for seed in range(2):
        give_gradients(decoder, seed=seed)
        optimizer.step(1e-2)
    other = training(MTP, dtype=dtype, seed=1)
    resumed = Optimizer(other, settings)
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), decoder.parameters(), strict=True):
            parameter.copy_(value)
    resumed.load_tensors({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    for seed in range(2, 4):
        for trained, by in ((decoder, optimizer), (other, resumed)):
            give_gradients(trained, seed=seed)
            by.step(1e-2)
    assert all(same_bits(values(other)[name], value) for name, value in values(decoder).items())
    assert resumed.tensors().keys() == optimizer.tensors().keys()
    assert all(same_bits(resumed.tensors()[name], value) for name, value in optimizer.tensors().items())


def test_state_of_a_parameter_that_is_not_trained_is_refused():
    decoder = training(LLAMA)
    optimizer = Optimizer(decoder, ADAMW)
    with pytest.raises(CheckpointMismatch, match=r"`blocks\.9\.norm\.weight/exp_avg` belongs to no parameter"):
        optimizer.load_tensors({"blocks.9.norm.weight/exp_avg": torch.zeros(32)})


def test_only_what_asks_for_a_gradient_is_moved_and_has_state():
    decoder = training(HYBRID).requires_grad_(False)
    decoder.blocks[0].requires_grad_(True)
    before, optimizer = values(decoder), Optimizer(decoder, ADAMW)
    train_step(decoder, optimizer, [batch_of()], number=1, learning_rate=1e-2, objective=Objective())
    assert {name.rpartition("/")[0] for name in optimizer.tensors()} == {n for n in before if n.startswith("blocks.0.")}
    moved = {name for name, after in values(decoder).items() if not same_bits(after, before[name])}
    assert {name for name in moved if "correction" not in name} == {n for n in before if n.startswith("blocks.0.")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_may_be_trained_by_one_optimizer_after_another(dtype):
    decoder, other = training(LLAMA, dtype=dtype), training(LLAMA, dtype=dtype)
    optimizer = Optimizer(decoder, MUON)
    optimizer = Optimizer(decoder, ADAMW)
    alone = Optimizer(other, ADAMW)
    for trained, by in ((decoder, optimizer), (other, alone)):
        give_gradients(trained)
        by.step(1e-2)
    assert all(same_bits(values(decoder)[name], value) for name, value in values(other).items())
