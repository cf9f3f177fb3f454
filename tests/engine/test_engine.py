"""The engine with real decoders, dense and hybrid: answers in any company are those alone, and nothing is lost."""

import queue
import random
import threading
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.scripted import ScriptedDecoder
from freehold.engine.engine import Engine
from freehold.engine.generate import generate
from freehold.engine.request import Event, Finish, ReasoningBudget, Request, SamplingParams
from freehold.engine.scheduler import Limits
from freehold.errors import BadRequest, Draining
from freehold.models.layout import Layout
from models.forms import needs_kernels
from models.tiny import LLAMA, NEMOTRON, QWEN, Config, random_tokens, tiny_decoder
from models.witness import our_logits

CONFIGS = {"llama": LLAMA, "qwen": QWEN, "nemotron": NEMOTRON}
ROOMY = Limits(num_slots=8, num_pages=64, page_size=32, budget_tokens=64, max_positions=256)
TIGHT = Limits(num_slots=6, num_pages=5, page_size=32, budget_tokens=24, max_positions=128)  # two or three fit
TIMEOUT_S = 60.0


class Heard:
    """What an engine says of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._is_over = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self._is_over.is_set(), "an event after the last"
        self.events.append(event)
        if event.finish:
            self._is_over.set()

    @property
    def finish(self) -> Finish:
        assert self._is_over.wait(TIMEOUT_S), "the request did not end"
        finish = self.events[-1].finish
        assert finish is not None
        return finish

    @property
    def tokens(self) -> list[int]:
        assert self.finish
        return [token for event in self.events for token in event.tokens]


def engine_of(decoder: Any, limits: Limits = ROOMY) -> Engine:
    model: Any = SimpleNamespace(decoder=decoder, text=SimpleNamespace(tokenizer=None))
    return Engine(model, limits)


def ask(engine: Engine, request: Request) -> Heard:
    heard = Heard()
    heard.number = engine.submit(request, heard)  # type: ignore[attr-defined]
    return heard


@cache
def tiny(name: str) -> Any:
    config: Config = CONFIGS[name]
    return tiny_decoder(config)


def some_request(choose: random.Random) -> Request:
    prompt = random_tokens(choose.randint(1, 60), seed=choose.randint(0, 1000)).tolist()
    max_tokens = choose.randint(1, 30)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, choose.choice([0, 0, 12])),
        ignore_eos=choose.choice([False, False, True]),
        temperature=choose.choice([0.0, 0.8, 1.5]),
        top_k=choose.choice([0, 20]),
        top_p=choose.choice([1.0, 0.9]),
        seed=choose.randint(0, 1 << 30),
        presence_penalty=choose.choice([0.0, 1.0]),
        logit_bias=choose.choice([{}, {5: 4.0}]),
    )
    return Request(
        prompt=tuple(prompt), sampling=sampling, stop_ids=frozenset({3, 11}), priority=choose.choice([0, 0, 1])
    )


@needs_kernels
@pytest.mark.parametrize("limits", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_seeded_answer_in_random_company_is_that_of_its_request_alone(name, limits):
    choose = random.Random(name)
    requests = [some_request(choose) for _ in range(60)]
    with engine_of(tiny(name), limits) as engine:
        heard = [ask(engine, request) for request in requests]
        cancelled = choose.sample(heard, 12)
        for one in cancelled:
            engine.cancel(one.number)
        found = [one.tokens for one in heard]
        stats = engine.stats()
    for request, one, tokens in zip(requests, heard, found, strict=True):
        alone = list(generate(tiny(name), request.prompt, request.sampling, stop_ids=request.stop_ids))
        is_whole = one.finish.reason in ("stop", "length")
        assert is_whole or one in cancelled
        assert tokens == alone if is_whole else alone[: len(tokens)] == tokens
    assert (stats.num_free_pages, stats.num_free_slots) == (limits.num_pages, limits.num_slots)
    assert (stats.num_preemptions > 0) == (limits is TIGHT)


def test_a_slot_that_had_another_sequence_before_begins_at_zero():
    one_slot = Limits(num_slots=1, num_pages=8, page_size=32, budget_tokens=64, max_positions=128)
    request = Request(prompt=tuple(random_tokens(9).tolist()), sampling=SamplingParams(max_tokens=8))
    with engine_of(tiny("nemotron"), one_slot) as engine:
        first, again = ask(engine, request), ask(engine, request)
        assert first.tokens == again.tokens


def test_scores_are_those_of_the_whole_text_at_once_whatever_the_chunks():
    prompt = tuple(random_tokens(40).tolist())
    small = Limits(num_slots=2, num_pages=8, page_size=32, budget_tokens=7, max_positions=128)
    request = Request(prompt=prompt, sampling=SamplingParams(max_tokens=3), num_logprobs=2, scores_prompt=True)
    with engine_of(tiny("nemotron"), small) as engine:
        heard, other = ask(engine, request), ask(engine, Request(prompt=prompt[:5]))
        tokens = heard.tokens
        assert other.finish.reason == "length"
    expected_TV = our_logits(tiny("nemotron"), torch.tensor([*prompt, *tokens])).double().log_softmax(dim=-1)
    found = [score for event in heard.events for score in (*event.prompt_scores, *event.scores)]
    assert found[0] is None
    assert [score.id for score in found[1:]] == [*prompt[1:], *tokens]
    for score, logprobs_V in zip(found[1:], expected_TV, strict=False):
        assert score.logprob == pytest.approx(float(logprobs_V[score.id]), abs=1e-4)
        assert [logprob for _, logprob in score.top] == pytest.approx(logprobs_V.topk(2).values.tolist(), abs=1e-4)


def test_an_embedding_is_the_mean_of_the_hidden_states_and_has_length_one():
    prompt = tuple(random_tokens(40).tolist())
    small = Limits(num_slots=2, num_pages=8, page_size=32, budget_tokens=7, max_positions=128)
    with engine_of(tiny("qwen"), small) as engine:
        heard = ask(engine, Request(prompt=prompt, embeds=True))
        assert heard.finish.reason == "stop"
    mean_D = tiny("qwen")(torch.tensor(prompt), Layout.packed([len(prompt)])).double().mean(dim=0)
    (embedding,) = [event.embedding for event in heard.events]
    assert embedding == pytest.approx((mean_D / mean_D.norm()).tolist(), abs=1e-5)


# Failures.


class FailingDecoder(ScriptedDecoder):
    """Fails at every step that a token of evil is in."""

    EVIL = 66

    def predict(self, tokens_T: Any, layout: Any, states: Any = None) -> Any:
        if self.EVIL in tokens_T.tolist():
            raise RuntimeError("a fault that was put here")
        return super().predict(tokens_T, layout, states)


def test_a_request_that_breaks_the_step_fails_alone(caplog):
    with engine_of(FailingDecoder([1])) as engine:
        good = [ask(engine, Request(prompt=(5, 6), sampling=SamplingParams(max_tokens=40))) for _ in range(3)]
        bad = ask(engine, Request(prompt=(5, FailingDecoder.EVIL, 6)))
        more = [ask(engine, Request(prompt=(5, 6), sampling=SamplingParams(max_tokens=4))) for _ in range(3)]
        assert bad.finish.reason == "failed"
        assert bad.tokens == []
        assert [one.finish.reason for one in good + more] == ["length"] * 6
        assert [len(one.tokens) for one in good + more] == [40] * 3 + [4] * 3
        assert engine.is_accepting
    assert "a fault that was put here" in caplog.text


def test_weights_that_are_no_numbers_fail_the_request_and_not_the_engine():
    with engine_of(ScriptedDecoder([1], say=lambda logits_V: logits_V.fill_(torch.nan))) as engine:
        finish = ask(engine, Request(prompt=(5, 6))).finish
        assert (finish.reason, finish.message) == ("failed", "the model computed no number")
        assert engine.is_accepting


def test_a_listener_that_fails_is_told_no_more_and_nobody_else_suffers(caplog):
    def broken(event: Event) -> None:
        raise OSError("nobody is there")

    with engine_of(tiny("llama")) as engine:
        engine.submit(Request(prompt=(5, 6), sampling=SamplingParams(max_tokens=50)), broken)
        other = ask(engine, Request(prompt=(5, 6), sampling=SamplingParams(max_tokens=20)))
        assert len(other.tokens) == 20
        assert engine.stats().num_free_slots == ROOMY.num_slots
    assert "a listener failed" in caplog.text


# Ends.


def slow_decoder(steps: "queue.Queue[None]") -> ScriptedDecoder:
    """Return a decoder that makes a step for each entry of a queue."""
    return ScriptedDecoder([1], say=lambda logits_V: steps.get(timeout=TIMEOUT_S))


def test_a_cancelled_request_owns_nothing_before_the_next_step():
    steps: queue.Queue[None] = queue.Queue()
    with engine_of(slow_decoder(steps)) as engine:
        heard = ask(engine, Request(prompt=(5, 6)))
        steps.put(None)
        while not heard.events:
            pass
        engine.cancel(heard.number)
        steps.put(None)
        assert heard.finish.reason == "cancelled"
        assert engine.stats().num_free_pages == ROOMY.num_pages
        steps.put(None)


def test_draining_refuses_new_requests_and_finishes_those_there_are():
    with engine_of(tiny("llama")) as engine:
        heard = ask(engine, Request(prompt=(5, 6), sampling=SamplingParams(max_tokens=50)))
        assert engine.drain(TIMEOUT_S)
        assert len(heard.tokens) == 50
        with pytest.raises(Draining):
            engine.submit(Request(prompt=(5, 6)), Heard())
        assert not engine.is_accepting


def test_what_has_not_ended_when_the_engine_closes_is_told_so():
    steps: queue.Queue[None] = queue.Queue()
    with engine_of(slow_decoder(steps)) as engine:
        heard = [ask(engine, Request(prompt=(5, 6))) for _ in range(3)]
        for _ in range(1000):
            steps.put(None)
        assert not engine.drain(0.0)
    assert {one.finish.message for one in heard} == {"the engine stopped"}


def test_a_request_past_its_deadline_ends_with_it():
    with engine_of(tiny("llama")) as engine:
        finish = ask(engine, Request(prompt=(5, 6), deadline_s=0.0)).finish
        assert (finish.reason, finish.message) == ("deadline", "not done after 0 s")


@pytest.mark.parametrize("prompt", [(), (97,), (-1,), (1,) * 257], ids=["empty", "unknown", "negative", "long"])
def test_a_prompt_that_cannot_be_read_is_refused_before_any_work(prompt):
    with engine_of(tiny("llama")) as engine, pytest.raises(BadRequest):
        engine.submit(Request(prompt=prompt), Heard())


# Reasoning. The script's ids: 20 opens it, 21 closes it, 10 ends a line, 3 stops.


def reasoned(script: list[int], *, max_tokens: int = 200, is_open: bool = False, **budget: int) -> list[int]:
    given = ReasoningBudget(
        open_ids=(20,), close_ids=(21, 22), newline_ids=frozenset({10}), is_open=is_open, **{"num_tokens": 5} | budget
    )
    request = Request(
        prompt=(5, 6),
        sampling=SamplingParams(max_tokens=max_tokens),
        stop_ids=frozenset({3}),
        reasoning=given,
    )
    with engine_of(ScriptedDecoder(script)) as engine:
        return ask(engine, request).tokens


def test_reasoning_within_its_budget_is_left_as_it_is():
    script = [20, 7, 10, 21, 22, 9, 3]
    assert reasoned(script) == script


def test_reasoning_over_its_budget_is_closed_at_the_next_newline():
    assert reasoned([20, 7, 7, 7, 7, 7, 10, 7, 7, 8, 3]) == [20, 7, 7, 7, 7, 7, 10, 21, 22, 8, 3]


def test_reasoning_without_a_newline_is_closed_where_the_grace_ends():
    assert reasoned([7] * 8 + [9] * 5 + [3], is_open=True, grace_tokens=2)[:10] == [7] * 7 + [21, 22, 9]


def test_reasoning_is_closed_so_early_that_an_answer_fits():
    found = reasoned([7], is_open=True, max_tokens=20, num_tokens=1000, answer_tokens=6)
    assert found == [7] * 12 + [21, 22] + [7] * 6


def test_an_answer_is_not_empty_where_the_model_would_stop_in_its_reasoning_or_right_after_it():
    found = reasoned([7, 7, 3], is_open=True)
    assert found[:4] == [7, 7, 21, 22]
    assert found[4] not in (3, 10)
