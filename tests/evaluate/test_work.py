"""What steps ask of the machine, beside sums made by hand; and that counting changes no result."""

import pytest
import torch

from freehold.evaluate.work import CountingDecoder, held_bytes, held_formats
from freehold.models.layout import Capacity, Layout
from models.tiny import LATENT, LLAMA, NEMOTRON, random_tokens, tiny_decoder

FLOAT = 4  # bytes
PAGE = 256


def state_bytes(decoder):
    """Return the bytes that one sequence's states take: one page and one slot."""
    states = decoder.allocate_states(Capacity(num_slots=1, num_pages=1, page_size=PAGE))
    return sum(part.nbytes for state in states if state for part in vars(state).values() if part is not None)


def run_counted(decoder, *, length, batch=1, context=0):
    """Return a counting decoder after one step, its logits, and the decoder's own."""
    tokens_T = random_tokens(length * batch)

    def run(runs):
        capacity = Capacity(num_slots=batch, num_pages=batch, page_size=PAGE)
        states = decoder.allocate_states(capacity)
        layout = Layout.step(
            [length] * batch,
            [context] * batch,
            slots=range(batch),
            pages=[[b] for b in range(batch)],
            page_size=PAGE,
        )
        return runs.predict(tokens_T, layout, states)

    counting = CountingDecoder(decoder)
    with torch.inference_mode():
        return counting, run(counting), run(decoder)


@pytest.mark.parametrize("config", [LLAMA, LATENT], ids=["llama", "nemotron-latent"])
def test_counting_changes_no_result(config):
    _, counted_TV, expected_TV = run_counted(tiny_decoder(config), length=1, batch=3)
    assert torch.equal(counted_TV, expected_TV)


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
def test_a_step_reads_each_weight_once_and_every_sequences_keys_and_values(is_tied):
    decoder = tiny_decoder(LLAMA | {"tie_word_embeddings": is_tied})
    work = run_counted(decoder, length=1, batch=3)[0].work
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    met = weights if is_tied else weights - decoder.embeddings.weight.numel()  # a table of its own is looked up in
    assert work.read_bytes == FLOAT * met + 3 * state_bytes(decoder) / PAGE
    assert work.operations == 3 * 2 * met
    assert (work.num_steps, work.num_experts) == (1, [])


def test_keys_and_values_of_the_whole_context_are_read():
    decoder = tiny_decoder(LLAMA)
    short = run_counted(decoder, length=1)[0].work
    long = run_counted(decoder, length=1, context=100)[0].work
    assert long.read_bytes - short.read_bytes == 100 * state_bytes(decoder) / PAGE


def test_a_prompt_meets_the_head_with_its_last_token_alone():
    decoder = tiny_decoder(LLAMA)
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    head = table = decoder.embeddings.weight.numel()
    work = run_counted(decoder, length=10)[0].work
    assert work.operations == 2 * (10 * (weights - table - head) + head)
    assert work.read_bytes == FLOAT * (weights - table) + 10 * state_bytes(decoder) / PAGE


def test_a_step_reads_the_experts_that_its_tokens_choose_once():
    decoder = tiny_decoder(NEMOTRON | {"hybrid_override_pattern": "E"})
    held = dict(held_bytes(decoder))
    expert = (held["blocks.0.mixer.experts.up_proj"] + held["blocks.0.mixer.experts.down_proj"]) / 8
    others = sum(held.values()) - held["embeddings.weight"] - 8 * expert
    alone = run_counted(decoder, length=1)[0].work
    assert alone.num_experts == [3]
    assert alone.read_bytes == others + 3 * expert
    many = run_counted(decoder, length=1, batch=64)[0].work
    (num_experts,) = many.num_experts
    assert 3 < num_experts <= 8
    assert many.read_bytes == others + num_experts * expert
    assert many.operations == 64 * alone.operations


def test_a_recurrent_state_is_read_once_a_step_for_each_sequence():
    decoder = tiny_decoder(NEMOTRON | {"hybrid_override_pattern": "M"})
    one, two = (run_counted(decoder, length=1, batch=batch)[0].work.read_bytes for batch in (1, 2))
    assert two - one == state_bytes(decoder)
    assert run_counted(decoder, length=20)[0].work.read_bytes == one


def test_held_formats_add_up():
    decoder = tiny_decoder(LATENT, dtype=torch.bfloat16)
    formats = held_formats(decoder)
    assert list(formats) == ["bfloat16", "float32"]  # a router stays float32
    assert sum(formats.values()) == sum(num_bytes for _, num_bytes in held_bytes(decoder))
