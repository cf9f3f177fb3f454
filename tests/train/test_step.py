"""A step: what the mean is over, whatever the division; MTP; clipping; and what stops a run."""

from collections.abc import Callable
from math import inf

import pytest
import torch
from torch import Tensor

from freehold.errors import BadInput, Diverged
from freehold.evaluate.laws import relative_difference
from freehold.models.decoder import Decoder
from freehold.ops.loss import token_logprobs
from freehold.train.balance import all_blocks
from freehold.train.batch import Batch
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.step import Objective, train_step
from models.forms import needs_kernels, running, same_bits
from models.tiny import LLAMA, MTP, NEMOTRON, QWEN
from train.steps import LENGTHS, UNCLIPPED, batch_of, document, step_on, training

KINDS = {
    "attention": LLAMA,
    "attention-bias-tied": QWEN | {"tie_word_embeddings": True},
    "mamba": NEMOTRON | {"hybrid_override_pattern": "MM"},
    "experts": NEMOTRON | {"hybrid_override_pattern": "E"},
    "hybrid": NEMOTRON,
    "hybrid-mtp": MTP,
    "hybrid-mtp-tied": MTP | {"tie_word_embeddings": True},
}
ALL = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)

# Sums of the same terms in another order, seen through the scan's decays, which are small sums of large terms: at most
# 1.5e-5, where a parameter is eight numbers whose gradients are a thousandth of the others'; 3e-7 elsewhere.
TOLERANCE = 3e-5
# Weights with which an error in any part would show.
HEAVY = Objective(mtp_weight=1.0, balance_weight=0.1, max_gradient_norm=inf)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative_difference(found[name], expected[name]) for name in expected)


@ALL
def test_packed_documents_have_the_loss_and_the_gradient_of_separate_passes(config):
    together, gradients = step_on(training(config), [batch_of()], objective=HEAVY)
    separate, expected = step_on(training(config), [batch_of((length,)) for length in LENGTHS], objective=HEAVY)
    assert together.loss == pytest.approx(separate.loss, rel=1e-6)
    assert together.mtp_losses == pytest.approx(separate.mtp_losses, rel=1e-5)
    assert together.balance == pytest.approx(separate.balance, rel=1e-6)
    assert differences(gradients, expected) <= TOLERANCE


@needs_kernels
@ALL
def test_each_token_of_packed_documents_has_the_bits_of_its_document_alone(config):
    decoder = training(config)

    def logprobs(batch: Batch) -> Tensor:
        return token_logprobs(decoder(batch.tokens_T, batch.layout), decoder.lm_head.weight, batch.labels_T).detach()

    separate_T = torch.cat([logprobs(batch_of((length,))) for length in LENGTHS])
    assert torch.equal(logprobs(batch_of()), separate_T)


DIVISIONS = {
    "two": [(7, 1, 34), (2, 3, 12)],
    "three": [(7,), (1, 34, 2), (3, 12)],
    "other-order": [(12, 34), (3, 2, 7, 1)],
    "one-each": [(length,) for length in LENGTHS],
}


@pytest.mark.parametrize("division", DIVISIONS.values(), ids=DIVISIONS)
def test_a_mean_is_over_the_global_batch_however_it_is_divided(division):
    whole, expected = step_on(training(MTP), [batch_of()], objective=HEAVY)
    report, gradients = step_on(training(MTP), [batch_of(lengths) for lengths in division], objective=HEAVY)
    assert (report.num_supervised, report.num_tokens) == (whole.num_supervised, whole.num_tokens)
    assert report.loss == pytest.approx(whole.loss, rel=1e-6)
    assert report.gradient_norm == pytest.approx(whole.gradient_norm, rel=TOLERANCE)
    assert differences(gradients, expected) <= TOLERANCE


class Exchange:
    """Two processes' sums without processes: what each contributed in a first pass is added in a second."""

    def __init__(self) -> None:
        self.values: list[list[Tensor]] = [[], []]

    def listen(self, process: int) -> Callable[[Tensor], Tensor]:
        return lambda values: self.values[process].append(values) or values

    def answer(self, process: int) -> Callable[[Tensor], Tensor]:
        others = iter(self.values[1 - process])
        return lambda values: values + next(others)


def test_a_mean_is_over_the_tokens_of_all_processes():
    shares, exchange = [[batch_of((7, 1, 34))], [batch_of((2,)), batch_of((3, 12))]], Exchange()
    whole, expected = step_on(one := training(MTP), [batch_of()], objective=HEAVY)
    for process, share in enumerate(shares):
        step_on(training(MTP), share, objective=HEAVY, sum_over_processes=exchange.listen(process))
    decoders = [training(MTP), training(MTP)]
    found = [
        step_on(decoders[p], share, objective=HEAVY, sum_over_processes=exchange.answer(p))
        for p, share in enumerate(shares)
    ]
    for report, _ in found:
        assert report.loss == pytest.approx(whole.loss, rel=1e-6)
        assert report.num_tokens == whole.num_tokens
        assert report.worst_violation == whole.worst_violation
    summed = {name: found[0][1][name] + found[1][1][name] for name in expected}
    assert differences(summed, expected) <= TOLERANCE
    for decoder in decoders:
        for block, same in zip(all_blocks(decoder), all_blocks(one), strict=True):
            if hasattr(block.mixer, "gate"):
                correction, of_one = (b.mixer.gate.e_score_correction_bias for b in (block, same))
                assert same_bits(correction, of_one)


def test_the_loss_of_mtp_is_that_of_each_depth_written_out():
    decoder, example = training(MTP), document(12)
    report, _ = step_on(training(MTP), [Batch.packed([example])])
    tokens_L, labels_L = example.tokens_L, example.labels_L
    layout = Batch.packed([example]).layout
    with torch.no_grad():
        hidden_LD = decoder(tokens_L, layout)
        for depth, found in enumerate(report.mtp_losses, start=1):
            shifted_L = torch.cat((tokens_L[depth:], tokens_L[-1:].repeat(depth)))
            hidden_LD = decoder.mtp(hidden_LD, decoder.embeddings(shifted_L), layout)
            logprobs_LV = decoder.logits(hidden_LD).log_softmax(dim=-1)
            pairs = [(i, int(label)) for i, label in enumerate(labels_L[depth:]) if label >= 0]
            expected = -sum(float(logprobs_LV[i, label]) for i, label in pairs) / len(pairs)
            assert found == pytest.approx(expected, rel=1e-5)


def test_the_weight_of_mtp_is_of_the_mean_over_its_depths():
    def gradient(weight: float, depths: int) -> Tensor:
        objective = Objective(mtp_weight=weight, mtp_depths=depths, balance_weight=0.0, max_gradient_norm=inf)
        return step_on(training(MTP), [batch_of()], objective=objective)[1]["mtp.eh_proj.weight"]

    torch.testing.assert_close(gradient(0.4, 2), 4 * gradient(0.1, 2), rtol=1e-4, atol=1e-7)
    assert gradient(0.0, 2).count_nonzero() == 0
    first = gradient(1.0, 1)
    second = 2 * gradient(1.0, 2) - first
    assert relative_difference(second, first) > 0.1


def test_a_model_without_mtp_or_experts_has_neither_loss():
    report, _ = step_on(training(LLAMA), [batch_of()])
    assert (report.mtp_losses, report.balance, report.worst_violation) == ((), 0.0, 0.0)


@pytest.mark.parametrize("form", ["auto", "off"])
def test_blocks_that_compute_once_more_take_the_same_step(form):
    stepped: list[Decoder] = []
    for recomputes in (False, True):
        decoder = training(MTP)
        for block in all_blocks(decoder):
            block.recomputes = recomputes
        with running(form) if form == "off" else torch.enable_grad():
            step_on(decoder, [batch_of((7, 34)), batch_of((12,))])
        stepped.append(decoder)
    for (name, kept), recomputed in zip(stepped[0].named_parameters(), stepped[1].parameters(), strict=True):
        assert same_bits(kept.detach(), recomputed.detach()), name


def test_gradients_are_clipped_as_one_vector_and_the_norm_before_is_told():
    free, unclipped = step_on(training(NEMOTRON), [batch_of()])
    norm = torch.cat([gradient.flatten() for gradient in unclipped.values()]).norm()
    assert free.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    objective = Objective(max_gradient_norm=float(norm) / 3)
    report, clipped = step_on(training(NEMOTRON), [batch_of()], objective=objective)
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-6)
    assert differences(clipped, {name: gradient / 3 for name, gradient in unclipped.items()}) <= 1e-5


def snapshot(decoder: Decoder) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in decoder.parameters()]


def assert_stops(decoder: Decoder, batches: list[Batch], message: str) -> None:
    before, optimizer = snapshot(decoder), Optimizer(decoder, OptimizerSettings())
    with pytest.raises(Diverged, match=message) as caught:
        train_step(decoder, optimizer, batches, number=17, learning_rate=1e-3, objective=UNCLIPPED)
    assert caught.value.message.isprintable()
    assert all(same_bits(a, b) for a, b in zip(before, snapshot(decoder), strict=True))
    assert optimizer.tensors() == {}
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_weights():
    decoder, batches = training(MTP), [batch_of((7,)), batch_of((34,))]
    with torch.no_grad():
        decoder.embeddings.weight[batches[1].tokens_T[3]] = torch.nan
    assert not (batches[0].tokens_T == batches[1].tokens_T[3]).any()
    assert_stops(decoder, batches, r"loss is .*nan.* in step 17, micro-batch 2 of 2")


def test_a_gradient_that_is_no_number_stops_the_run_and_leaves_the_weights():
    """All hidden states are zero, so the loss is finite, and each norm multiplies the gradient by 1e21."""
    decoder = training(LLAMA | {"rms_norm_eps": 1e-42})
    with torch.no_grad():
        decoder.embeddings.weight.zero_()
    assert_stops(decoder, [batch_of((7,))], "gradient's norm is (inf|nan) in step 17")


def test_a_step_without_a_supervised_token_is_refused():
    batch = batch_of((7, 3))
    empty = Batch(
        tokens_T=batch.tokens_T, labels_T=torch.full_like(batch.labels_T, -100), layout=batch.layout, num_supervised=0
    )
    decoder = training(LLAMA)
    before = snapshot(decoder)
    with pytest.raises(BadInput, match="step 1 has 20 tokens, and none of them is trained on"):
        step_on(decoder, [empty, empty])
    assert all(same_bits(a, b) for a, b in zip(before, snapshot(decoder), strict=True))
    step_on(decoder, [empty, batch])  # one micro-batch without is fine


def test_steps_learn_a_document_by_heart():
    decoder, batch = training(MTP), batch_of((24,))
    optimizer = Optimizer(decoder, OptimizerSettings())
    losses = [
        train_step(decoder, optimizer, [batch], number=i, learning_rate=1e-2, objective=Objective()).loss
        for i in range(15)
    ]
    assert losses[-1] < 0.5 * losses[0]
