"""A model divided over processes, against the same model in one: hidden states, losses and every gradient."""

import pytest
from parallel.divided import (
    distances,
    errors_in_bfloat16,
    has_same_bits,
    measured,
    refusal,
    refusal_of_an_adapter,
    refusal_of_tokens,
)
from parallel.fleet import Fleet

from freehold.parallel.processes import Sizes
from models.tiny import LLAMA, MTP, NEMOTRON, QWEN

# Of each tensor's largest value, in float32 ulps. Partial sums are added in another order, and blocks make more of the
# difference: up to 20 ulps in these models.
MAX_ULPS = 64
# The gradient of decays and steps is what is left of cumulated sums that nearly cancel: in one process, too, that of
# these models is up to 800 ulps from that in float64.
MAX_ULPS_OF_DECAYS = 2048
DECAYS = ("A_log", "dt_bias")

MODELS = {
    "llama": LLAMA,
    "llama-4-kv-heads": LLAMA | {"num_key_value_heads": 4},
    "qwen-tied": QWEN | {"tie_word_embeddings": True},
    "nemotron-dense": NEMOTRON | {"hybrid_override_pattern": "M-M*-"},
    "nemotron-moe": NEMOTRON,
    "nemotron-latent-mtp": MTP,
}
# Over four parts: a document in three of them, short ones, one that begins with a part.
LENGTHS = (19, 1, 2, 2, 7, 1)
# Parts of one token, or two: the convolution looks beyond its neighbour.
FEW = (5,)

DIVISIONS = [
    (Sizes(tensor=2), "llama", LENGTHS),
    (Sizes(tensor=4), "llama-4-kv-heads", LENGTHS),
    (Sizes(tensor=2), "qwen-tied", LENGTHS),
    (Sizes(tensor=2), "nemotron-dense", LENGTHS),
    (Sizes(tensor=2), "nemotron-latent-mtp", LENGTHS),
    (Sizes(expert=2), "nemotron-moe", LENGTHS),
    (Sizes(expert=4), "nemotron-latent-mtp", LENGTHS),
    (Sizes(expert=4), "nemotron-moe", (1,)),  # some experts are asked by nobody
    (Sizes(context=2), "qwen-tied", LENGTHS),
    (Sizes(context=4), "llama", LENGTHS),
    (Sizes(context=4), "nemotron-dense", LENGTHS),
    (Sizes(context=4), "nemotron-latent-mtp", LENGTHS),
    (Sizes(context=4), "nemotron-latent-mtp", FEW),
    (Sizes(expert=2, context=2), "nemotron-latent-mtp", LENGTHS),
    (Sizes(tensor=2, context=2), "nemotron-latent-mtp", LENGTHS),
    (Sizes(tensor=2, expert=2), "nemotron-latent-mtp", LENGTHS),
]


def named(sizes: Sizes) -> str:
    return "-".join(f"{name}-{size}" for name, size in vars(sizes).items() if size > 1)


@pytest.mark.parametrize(
    ("sizes", "model", "lengths"), DIVISIONS, ids=[f"{named(s)}-{m}-{sum(n)}-tokens" for s, m, n in DIVISIONS]
)
def test_a_divided_step_is_that_of_one_process(fleet: Fleet, sizes: Sizes, model: str, lengths: tuple[int, ...]):
    for rank, found in enumerate(fleet.run(distances, sizes, MODELS[model], lengths)):
        assert {name for name in found if name.startswith("choices") and found[name]} == set()
        far = {name: found[name] for name in found if found[name] > bound(name)}
        assert far == {}, f"in process {rank}"


def bound(name: str) -> float:
    return MAX_ULPS_OF_DECAYS if name.endswith(DECAYS) else MAX_ULPS


@pytest.mark.parametrize("sizes", [Sizes(tensor=2, context=2), Sizes(expert=4)], ids=named)
def test_in_bfloat16_a_divided_step_is_about_as_exact_as_that_of_one_process(fleet: Fleet, sizes: Sizes):
    for found in fleet.run(errors_in_bfloat16, sizes, MTP, LENGTHS):
        assert {name: pair for name, pair in found.items() if pair[0] > 2 * pair[1] + 1e-3} == {}


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sizes", [Sizes(tensor=2, expert=2), Sizes(expert=2, context=2)], ids=named)
def test_a_divided_step_makes_the_same_bits_again(fleet: Fleet, sizes: Sizes, recomputes: bool):
    assert all(fleet.run(has_same_bits, sizes, MTP, LENGTHS, recomputes))


@pytest.mark.parametrize("sizes", [Sizes(tensor=2, expert=2), Sizes(expert=2, context=2)], ids=named)
def test_a_loss_is_measured_without_a_gradient(fleet: Fleet, sizes: Sizes):
    assert all(found["loss"] < MAX_ULPS for found in fleet.run(measured, sizes, MTP, LENGTHS))


@pytest.mark.parametrize(
    ("sizes", "config", "told"),
    [
        (Sizes(tensor=4), LLAMA | {"vocab_size": 96}, "`blocks.0` has 2 key/value heads"),
        (Sizes(tensor=4), QWEN | {"vocab_size": 97}, "a vocabulary of 97"),
        (Sizes(tensor=4), LLAMA | {"vocab_size": 96, "num_key_value_heads": 4, "intermediate_size": 50}, "50 channels"),
        (Sizes(tensor=4), NEMOTRON | {"vocab_size": 96}, "`blocks.0` has 2 groups"),
        (Sizes(expert=4), NEMOTRON | {"n_routed_experts": 6}, "`blocks.3` has 6 experts"),
        (
            Sizes(expert=4),
            MTP | {"n_routed_experts": 6, "hybrid_override_pattern": "M"},
            "`mtp.blocks.1` has 6 experts",
        ),
    ],
    ids=["heads", "vocabulary", "channels", "groups", "experts", "experts-of-mtp"],
)
def test_what_does_not_divide_evenly_is_refused_in_one_line(fleet: Fleet, sizes: Sizes, config: dict, told: str):
    for found in fleet.run(refusal, sizes, config):
        line, hint = found.splitlines()
        assert told in line
        assert line.endswith("cannot be divided over 4 processes")
        assert hint.startswith("hint: ")


def test_fewer_tokens_than_processes_are_refused(fleet: Fleet):
    assert {found.splitlines()[0] for found in fleet.run(refusal_of_tokens, Sizes(context=4), 3)} == {
        "BadInput: 3 tokens cannot be divided over 4 processes"
    }


def test_a_model_with_an_adapter_is_refused(fleet: Fleet):
    for found in fleet.run(refusal_of_an_adapter, Sizes(tensor=2), LLAMA):
        assert found.startswith("UnsupportedModel: weights that are quantized, or have adapters,")
