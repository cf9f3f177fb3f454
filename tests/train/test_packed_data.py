"""From files to losses: a pack of real documents has for each of them what it has alone, in every kind of block."""

import pytest
import torch
from torch import Tensor

from freehold.evaluate.laws import relative_difference
from freehold.models.decoder import Decoder
from freehold.ops.loss import IGNORED, linear_cross_entropy, token_logprobs
from freehold.train.batch import Batch
from freehold.train.dataset import Sequences
from freehold.train.order import Order, Source
from freehold.train.packing import Stream
from models.tiny import LLAMA, MTP, NEMOTRON, tiny_decoder
from train.data import build, chats, texts, write_rows

VOCABULARY = {"vocab_size": 262}  # bytes, and Nemotron's marks
KINDS = {
    "attention": LLAMA,
    "mamba": NEMOTRON | {"hybrid_override_pattern": "MM"},
    "experts": NEMOTRON | {"hybrid_override_pattern": "E"},
    "hybrid": NEMOTRON,
    "hybrid-mtp": MTP,
}
# Sums of the same terms in another order, seen through the scan's decays.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Batch, list[Batch]]:
    """Return a pack of texts and conversations, and each of its sequences as a batch of its own."""
    folder = tmp_path_factory.mktemp("data")
    files = [write_rows(folder / "a.jsonl", texts(9)), write_rows(folder / "b.jsonl", chats(4))]
    sequences = Sequences(build(files, folder / "out"), max_tokens=200)
    order = Order([Source(name="all", sequences=sequences)], seed=3)
    stream = Stream(order, budget_tokens=600)
    pack = max(stream.one_pass(), key=len)
    assert len(pack) > 3
    return stream.batch(pack), [stream.batch((place,)) for place in pack]


def trained(config) -> Decoder:
    return tiny_decoder(config | VOCABULARY).requires_grad_(True)


def loss_of(decoder: Decoder, batch: Batch) -> Tensor:
    """Return the sum of losses, that of multi-token prediction included."""
    hidden_TD = decoder(batch.tokens_T, batch.layout)
    loss, _ = linear_cross_entropy(hidden_TD, decoder.lm_head.weight, batch.labels_T)
    if decoder.mtp is not None:
        hidden_TD = decoder.mtp(hidden_TD, decoder.embeddings(batch.further.tokens_T), batch.layout)
        loss = loss + linear_cross_entropy(hidden_TD, decoder.lm_head.weight, batch.further.labels_T)[0]
    return loss


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_each_token_has_the_loss_that_it_has_in_its_document_alone(parts, config):
    packed, separate = parts
    decoder = trained(config)

    def logprobs(batch: Batch) -> Tensor:
        hidden_TD = decoder(batch.tokens_T, batch.layout)
        return token_logprobs(hidden_TD, decoder.lm_head.weight, batch.labels_T).detach()

    expected_T = torch.cat([logprobs(batch) for batch in separate])
    assert relative_difference(logprobs(packed), expected_T) <= TOLERANCE
    assert packed.num_supervised == sum(batch.num_supervised for batch in separate)
    assert bool((packed.labels_T == IGNORED).any())


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_the_gradient_of_a_pack_is_the_sum_of_its_documents_gradients(parts, config):
    packed, separate = parts
    together, apart = trained(config), trained(config)
    loss_of(together, packed).backward()
    for batch in separate:
        loss_of(apart, batch).backward()
    expected = {name: parameter.grad for name, parameter in apart.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in together.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    assert max(relative_difference(found[name], expected[name]) for name in expected) <= TOLERANCE
