"""Generation with states equals generation without, the seed alone decides a draw, and an answer ends where it must."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.scripted import ScriptedDecoder
from freehold.engine import generate as module
from freehold.engine.generate import Continuation, check_prompt, generate
from freehold.engine.request import SamplingParams
from freehold.errors import BadInput, BadRequest
from freehold.models.decoder import Decoder
from freehold.ops.sampling import uniform_draw
from models.tiny import CONFIGS, LATENT, LLAMA, MTP, NEMOTRON, random_tokens, tiny_decoder
from models.witness import our_logits

PROMPT = random_tokens(9, seed=5).tolist()
NAMES = ["llama-llama3", "qwen-yarn", "nemotron", "nemotron-latent", "nemotron-mamba", "nemotron-router-groups"]


def answer(decoder: Any, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
    named = {name: sampling.pop(name) for name in ("stop_ids", "num_ids") if name in sampling}
    return list(generate(decoder, prompt, SamplingParams(**{"max_tokens": 20} | sampling), **named))


def drawn(decoder: Any, *, seed: int, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
    return answer(decoder, prompt, **{"temperature": 1.0, "seed": seed} | sampling)


def recomputed(decoder: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the greedy answer, each token from a forward over everything before it."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(our_logits(decoder, torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


# States.


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_equals_recomputation_from_the_start(name):
    decoder = tiny_decoder(CONFIGS[name])
    assert answer(decoder, max_tokens=24) == recomputed(decoder, PROMPT, 24)


def test_a_model_with_an_mtp_module_generates_as_one_without():
    assert answer(tiny_decoder(MTP)) == recomputed(tiny_decoder(MTP), PROMPT, 20)


@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1100])
@pytest.mark.parametrize("config", [LLAMA, NEMOTRON], ids=["llama", "nemotron"])
def test_a_prompt_read_in_chunks_has_the_same_answer(config, length, monkeypatch):
    config = config | {"max_position_embeddings": 4096}
    decoder, prompt = tiny_decoder(config), random_tokens(length).tolist()
    in_chunks = answer(decoder, prompt, max_tokens=3)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 10_000)
    assert in_chunks == answer(decoder, prompt, max_tokens=3)


@pytest.mark.parametrize("chunk", [1, 2, 7, 8, 9, 10])
def test_chunks_of_any_size_have_the_same_answer(chunk, monkeypatch):
    decoder = tiny_decoder(LATENT)
    whole = answer(decoder)
    monkeypatch.setattr(module, "PREFILL_TOKENS", chunk)
    assert answer(decoder) == whole


@pytest.mark.parametrize("config", [LLAMA, NEMOTRON], ids=["llama", "nemotron"])
def test_pages_that_double_keep_what_they_held(config, monkeypatch):
    decoder = tiny_decoder(config)
    in_one_page = answer(decoder, max_tokens=60)
    monkeypatch.setattr(module, "PAGE_SIZE", 32)
    assert answer(decoder, max_tokens=60) == in_one_page
    assert answer(decoder, PROMPT[:1], max_tokens=60) == recomputed(decoder, PROMPT[:1], 60)


def test_reading_more_than_all_pages_at_once_doubles_them_until_there_is_room(monkeypatch):
    monkeypatch.setattr(module, "PAGE_SIZE", 32)
    decoder, tokens = tiny_decoder(LLAMA), random_tokens(200).tolist()
    continuation = Continuation(decoder, room_tokens=3)
    continuation.read(tokens[:2])
    torch.testing.assert_close(continuation.read(tokens[2:]), our_logits(decoder, torch.tensor(tokens))[-1])


def test_generation_needs_no_gradients_and_leaves_the_weights_alone():
    decoder = tiny_decoder(NEMOTRON).requires_grad_(True)
    before = [p.clone() for p in decoder.parameters()]
    answer(decoder)
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))
    assert all(p.grad is None for p in decoder.parameters())


def test_bfloat16_generates():
    decoder = tiny_decoder(NEMOTRON, dtype=torch.bfloat16)
    assert len(answer(decoder)) == 20


# The seed.


def test_the_seed_alone_decides_an_answer():
    decoder = tiny_decoder(NEMOTRON)
    first = drawn(decoder, seed=7)
    torch.manual_seed(999)
    torch.rand(17)
    drawn(decoder, seed=8, prompt=PROMPT[:3])
    assert drawn(decoder, seed=7) == first
    assert drawn(tiny_decoder(NEMOTRON), seed=7) == first


def test_sampling_draws_nothing_from_the_generators_of_the_process():
    before = torch.get_rng_state()
    drawn(tiny_decoder(LLAMA), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_answers_in_turn_are_those_that_come_alone():
    decoder = tiny_decoder(NEMOTRON)
    sampling = [SamplingParams(max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 2)]
    prompts = [PROMPT, PROMPT[:4]]
    pairs = zip(*(generate(decoder, p, s) for p, s in zip(prompts, sampling, strict=True)), strict=True)
    assert [list(tokens) for tokens in zip(*pairs, strict=True)] == [
        drawn(decoder, seed=seed, prompt=prompt) for seed, prompt in ((1, prompts[0]), (2, prompts[1]))
    ]


def test_a_draw_depends_on_the_seed_and_on_its_place_in_the_answer():
    decoder = ScriptedDecoder(say=lambda logits_V: logits_V.zero_())
    vocab_size = decoder.spec.vocab_size
    for prompt in (PROMPT, PROMPT[:2]):
        expected = [int(uniform_draw(7, index) * vocab_size) for index in range(20)]
        assert drawn(decoder, seed=7, prompt=prompt) == expected


def test_seeds_differ_and_greedy_ignores_them():
    decoder = tiny_decoder(LLAMA)
    assert len({tuple(drawn(decoder, seed=seed)) for seed in range(-5, 15)}) == 20
    assert len({tuple(answer(decoder, seed=seed)) for seed in range(5)}) == 1


def test_a_longer_limit_continues_the_same_answer():
    decoder = tiny_decoder(NEMOTRON)
    long = drawn(decoder, seed=3, max_tokens=30)
    assert [drawn(decoder, seed=3, max_tokens=n) for n in (1, 10, 30)] == [long[:1], long[:10], long]


# What may be drawn.


def test_filters_that_leave_one_token_are_greedy():
    decoder = tiny_decoder(NEMOTRON)
    greedy = answer(decoder)
    for sampling in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-9}, {"temperature": 5e-324}):
        assert drawn(decoder, seed=4, **sampling) == greedy, sampling


def first_tokens(say: Any, *, num_seeds: int = 400, **sampling: Any) -> list[int]:
    """Return the token that each of many seeds draws from the same logits."""
    decoder = ScriptedDecoder(say=say)
    return [drawn(decoder, seed=seed, max_tokens=1, **sampling)[0] for seed in range(num_seeds)]


def probabilities(*values: float) -> Any:
    """Return what makes these the probabilities of the first tokens, and zero those of all others."""

    def say(logits_V: Tensor) -> None:
        logits_V.fill_(float("-inf"))
        logits_V[: len(values)] = torch.tensor(values).log()

    return say


FILTERS = {
    "none": ({}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
    "top_k": ({"top_k": 2}, {0: 0.625, 1: 0.375}),
    "top_p": ({"top_p": 0.79}, {0: 0.625, 1: 0.375}),
    "top_p-just-past": ({"top_p": 0.81}, {0: 0.5263, 1: 0.3158, 2: 0.1579}),
    "min_p": ({"min_p": 0.4}, {0: 0.625, 1: 0.375}),
    "temperature": ({"temperature": 0.5}, {0: 0.6849, 1: 0.2466, 2: 0.0616, 3: 0.0068}),
}


@pytest.mark.parametrize(("sampling", "expected"), FILTERS.values(), ids=FILTERS)
def test_tokens_come_as_often_as_the_filtered_probabilities_say(sampling, expected):
    num_seeds = 1000
    tokens = first_tokens(probabilities(0.5, 0.3, 0.15, 0.05), num_seeds=num_seeds, **sampling)
    assert set(tokens) <= set(expected)
    for token, probability in expected.items():
        deviation = (probability * (1 - probability) / num_seeds) ** 0.5
        assert abs(tokens.count(token) / num_seeds - probability) < 4 * deviation, token


def penalized(decoder: Decoder, num_tokens: int, *, repetition: float, presence: float, frequency: float) -> list[int]:
    """Return the greedy answer under penalties, by the formulas of their papers, token by token."""
    written: list[int] = []
    for _ in range(num_tokens):
        logits = our_logits(decoder, torch.tensor(PROMPT + written))[-1].tolist()
        for token in set(PROMPT + written):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(written):
            logits[token] -= presence + frequency * written.count(token)
        written.append(max(range(len(logits)), key=lambda token: (logits[token], -token)))
    return written


PENALTIES = {
    "repetition": {"repetition": 1.5, "presence": 0.0, "frequency": 0.0},
    "presence": {"repetition": 1.0, "presence": 0.8, "frequency": 0.0},
    "frequency": {"repetition": 1.0, "presence": 0.0, "frequency": 0.3},
    "all": {"repetition": 0.8, "presence": -0.3, "frequency": 0.5},
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_penalties_are_those_of_their_formulas(penalty):
    decoder = tiny_decoder(CONFIGS["llama-tied"])
    sampling = {f"{name}_penalty": value for name, value in penalty.items()}
    found = answer(decoder, max_tokens=16, **sampling)
    assert found == penalized(decoder, 16, **penalty)
    assert found != answer(decoder, max_tokens=16)


def test_repetition_concerns_what_the_answer_has_said_too():
    def say(logits_V: Tensor) -> None:
        logits_V[6] = 40.0  # beside 50 for 5

    decoder = ScriptedDecoder([5], say=say)
    assert answer(decoder, [1], repetition_penalty=1.5, max_tokens=3) == [5, 6, 5]
    assert answer(decoder, [5], repetition_penalty=1.5, max_tokens=3) == [6, 5, 5]


def prefers_padding(logits_V: Tensor) -> None:
    logits_V[90:] = 100.0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}, {"frequency_penalty": 1.0}, {"top_k": 5}], ids=str)
def test_ids_that_the_tokenizer_lacks_are_never_drawn(sampling):
    decoder = ScriptedDecoder([3], say=prefers_padding)
    assert max(answer(decoder, num_ids=90, **sampling)) < 90
    assert max(answer(decoder)) >= 90


def test_a_prompt_of_ids_that_the_tokenizer_lacks_can_be_penalized():
    decoder = ScriptedDecoder([3])
    assert answer(decoder, [95, 96], num_ids=90, repetition_penalty=1.5, max_tokens=1) == [3]
    assert answer(decoder, [95, 1], num_ids=90, repetition_penalty=1.5, max_tokens=1) == [3]


# Where an answer ends.


@pytest.mark.parametrize("own", [True, False], ids=["of-the-model", "of-the-request"])
def test_a_stop_id_is_the_last_token(own):
    decoder = ScriptedDecoder([5, 6, 7, 8])
    if own:
        assert answer(decoder, stop_ids={7, 99}) == [5, 6, 7]
    else:
        assert list(generate(decoder, PROMPT, SamplingParams(stop_ids=frozenset({7}), max_tokens=9))) == [5, 6, 7]


def test_a_stop_id_in_the_prompt_does_not_stop():
    assert answer(ScriptedDecoder([5, 6]), [7, 7], stop_ids={7}, max_tokens=3) == [5, 6, 6]


def test_no_stop_id_is_drawn_before_min_tokens():
    decoder = ScriptedDecoder([5, 6, 7, 7])
    assert answer(decoder, stop_ids={7}, min_tokens=3) == [5, 6, 0, 7]
    assert answer(decoder, stop_ids={7}, min_tokens=2) == [5, 6, 7]


def test_with_ignore_eos_only_the_ids_of_the_request_stop():
    decoder = ScriptedDecoder([5, 6, 7, 8])
    assert answer(decoder, stop_ids={7}, ignore_eos=True, max_tokens=5) == [5, 6, 7, 8, 8]
    sampling = SamplingParams(ignore_eos=True, stop_ids=frozenset({8}), max_tokens=9)
    assert list(generate(decoder, PROMPT, sampling, stop_ids={7})) == [5, 6, 7, 8]


def test_nothing_is_read_after_the_last_token():
    decoder = ScriptedDecoder([5])
    assert len(answer(decoder, max_tokens=4)) == 4
    assert decoder.num_read == len(PROMPT) + 3


@pytest.mark.parametrize("max_tokens", [None, 10_000, 2**31])
def test_an_answer_ends_where_the_context_does(max_tokens):
    decoder = tiny_decoder(LLAMA | {"max_position_embeddings": 20})
    assert len(answer(decoder, max_tokens=max_tokens)) == 20 - len(PROMPT)
    assert len(answer(decoder, (PROMPT * 3)[:19], max_tokens=max_tokens)) == 1


def test_the_caller_may_leave_in_the_middle():
    decoder = tiny_decoder(NEMOTRON)
    whole = drawn(decoder, seed=2)
    tokens = generate(decoder, PROMPT, SamplingParams(max_tokens=20, temperature=1.0, seed=2))
    assert list(islice(tokens, 5)) == whole[:5]
    tokens.close()
    assert list(tokens) == []
    assert drawn(decoder, seed=2) == whole


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"presence_penalty": 1.0}], ids=str)
def test_a_model_that_computes_nan_says_so_and_draws_nothing(sampling):
    decoder = tiny_decoder(LLAMA)
    decoder.get_parameter("blocks.3.mixer.up_proj.weight")[3, 5] = float("nan")
    with pytest.raises(BadInput, match="the model computed no number"):
        answer(decoder, **sampling)


# What cannot be read.


BAD_PROMPTS = {
    "empty": ([], "the prompt is empty"),
    "full": ([1] * 256, "the prompt has 256 tokens, the model's context is 256 with room for an answer"),
    "long": ([1] * 5000, "the prompt has 5000 tokens, the model's context is 256"),
    "past-the-vocabulary": ([1, 97], "the prompt has the id 97, wanted are integers from 0 to 96"),
    "negative": ([-1, 1], "the prompt has the id -1, wanted are integers from 0 to 96"),
    "huge": ([1, 2**70], "the prompt has the id 1180591620717411303424"),
    "fraction": ([1, 2.0], r"the prompt has the id 2\.0"),
    "text": (["1"], "the prompt has the id '1'"),
    "boolean": ([True], "the prompt has the id True"),
    "string": ("hello", "the prompt has the id 'h'"),
    "tensor": (torch.tensor([1, 2]), r"the prompt has the id tensor\(1\)"),
}


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_prompt_that_cannot_be_read_is_refused_with_numbers(prompt, message):
    with pytest.raises(BadRequest, match=message) as caught:
        answer(ScriptedDecoder(), prompt)
    assert caught.value.message.isprintable()


def test_a_prompt_that_is_only_scored_may_fill_the_context():
    check_prompt(ScriptedDecoder(), [1] * 256, room_tokens=0)
    with pytest.raises(BadRequest, match="257 tokens"):
        check_prompt(ScriptedDecoder(), [1] * 257, room_tokens=0)
