"""How fast a model runs: what is measured and what is not, and that the sequences are what they say."""

from statistics import median
from unittest.mock import Mock

import pytest
import torch

from evaluate.quick import measure_limits_quickly
from freehold.errors import BadRequest
from freehold.evaluate import speed
from freehold.evaluate.limits import READ_BYTES
from freehold.evaluate.speed import DECODE_ROOM, Case, Sequences, measure_speed, plan_cases, sequence_bytes
from freehold.models.layout import Layout
from models.tiny import LATENT, LLAMA, tiny_decoder

PLENTY = 1 << 40
CONTEXT = 256  # of the tiny models


@pytest.fixture
def decoder():
    return tiny_decoder(LLAMA)


def plan(decoder, *, prompts=None, depths=None, batches=None, memory_bytes=PLENTY):
    return plan_cases(decoder, prompts=prompts, depths=depths, batches=batches, memory_bytes=memory_bytes)


def test_defaults_are_cut_to_the_context(decoder):
    cases = plan(decoder)
    deepest = CONTEXT - DECODE_ROOM
    assert [case for case in cases if case.phase == "prefill"] == [Case(depth=0, prompt=128), Case(depth=0, prompt=256)]
    decodes = [(case.depth, case.batch) for case in cases if case.phase == "decode"]
    assert decodes == [(depth, batch) for depth in (0, deepest) for batch in (1, 4, 8, 16)]
    assert max(case.room for case in cases) == CONTEXT


def test_default_batches_are_cut_to_the_memory(decoder):
    memory_bytes = READ_BYTES + 5 * sequence_bytes(decoder, CONTEXT)
    assert {case.batch for case in plan(decoder, memory_bytes=memory_bytes)} == {1, 4, 5}


def test_what_was_given_is_measured_once_and_in_order(decoder):
    cases = plan(decoder, prompts=[16, 8, 16], depths=[100, 0], batches=[3])
    here = [Case(depth=0, prompt=8), Case(depth=0, prompt=16), Case(depth=0, batch=3)]
    assert cases == here + [Case(depth=100, batch=case.batch, prompt=case.prompt) for case in here]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompts": [CONTEXT + 1]}, "a prompt of 257"),
        ({"depths": [0, CONTEXT - DECODE_ROOM + 1]}, "a depth of 224"),
        ({"prompts": [200], "depths": [100]}, "depth 100, is 300 in all"),
        ({"batches": [99], "memory_bytes": READ_BYTES + 1_000_000}, "a batch of 99"),
        ({"memory_bytes": READ_BYTES}, "does not fit the free memory"),
    ],
    ids=["prompt", "depth", "prompt at depth", "batch", "memory"],
)
def test_what_does_not_fit_is_refused(decoder, given, says):
    with pytest.raises(BadRequest, match=says):
        plan(decoder, **given)


def test_a_context_too_short_to_measure_in_is_refused():
    with pytest.raises(BadRequest, match="context is 32"):
        plan(tiny_decoder(LLAMA | {"max_position_embeddings": 32}))


@torch.inference_mode()
@pytest.mark.parametrize("config", [LLAMA, LATENT], ids=["llama", "nemotron-latent"])
def test_every_sequence_continues_what_the_first_has_read(config, monkeypatch):
    decoder = tiny_decoder(config)
    sequences = Sequences(decoder, num=3, room=300)
    drawn = []
    draw = sequences._draw
    monkeypatch.setattr(sequences, "_draw", lambda *shape: drawn.append(draw(*shape)) or drawn[-1])
    for depth in (20, 270):
        sequences.deepen(depth)
    read_L = torch.cat(drawn)
    assert len(read_L) == 270
    for case in (Case(depth=270, prompt=9), Case(depth=270, batch=2), Case(depth=270, batch=3)):
        sequences.time_steps(case)
    sequences._rewind()
    step_T = torch.tensor([5, 6, 7])
    hidden_TD = decoder(step_T, sequences._layout([1, 1, 1], 270), sequences._states)
    for token, hidden_D in zip(step_T, hidden_TD, strict=True):
        whole_LD = decoder(torch.cat((read_L, token[None])), Layout.packed([271]))
        torch.testing.assert_close(hidden_D, whole_LD[-1], rtol=1e-4, atol=1e-4)


def test_speeds_are_medians_and_shares_of_what_the_machine_did(decoder, monkeypatch):
    """Three rounds of two cases, on a machine and a model that take scripted times."""
    seconds = iter([2.0, 1.0, 9.0, 0.5, 1.0, 0.25])
    monkeypatch.setattr(Sequences, "time_steps", lambda self, case: next(seconds))
    rates = {"read_bandwidth": [5e3, 1e3, 4e3], "product_rate": [1e6, 3e6, 9e6]}
    for name, values in rates.items():
        monkeypatch.setattr(speed, name, Mock(side_effect=values))
    turns = []
    limits, (prefill, decode) = measure_speed(
        decoder,
        [Case(depth=0, prompt=8), Case(depth=0, batch=2)],
        num_rounds=3,
        progress=lambda done, total, turn: turns.append((done, total, turn)),
    )
    assert (limits.read_bytes_per_s, limits.operations_per_s) == (median(rates["read_bandwidth"]), 3e6)
    assert (prefill.tokens_per_s, prefill.step_s) == (8 / 2.0, 2.0)
    assert (decode.tokens_per_s, decode.step_s) == (2 / 0.5, 0.5)
    assert decode.bandwidth_share(limits) == decode.read_bytes * 4 / 4e3
    assert decode.compute_share(limits) == decode.operations * 4 / 3e6
    names = ["prefill, 8 tokens, depth 0", "decode, batch 2, depth 0"]
    assert turns[0] == (0, 8, "reading up to depth 0")
    assert turns[1:] == [(i, 8, names[i % 2]) for i in range(8)]


def test_a_hybrid_is_measured_with_its_experts(monkeypatch):
    measure_limits_quickly(monkeypatch)
    monkeypatch.setattr(speed, "ROUND_S", 0.0)
    cases = [Case(depth=0, prompt=4), Case(depth=0, batch=1), Case(depth=40, batch=4)]
    limits, speeds = measure_speed(tiny_decoder(LATENT), cases, num_rounds=1)
    assert limits.arithmetic == "float32"
    assert [found.case for found in speeds] == cases
    assert all(found.tokens_per_s > 0 and found.bandwidth_share(limits) > 0 for found in speeds)
    assert [speeds[1].num_experts] == [3]
    assert 3 <= speeds[2].num_experts <= 8
