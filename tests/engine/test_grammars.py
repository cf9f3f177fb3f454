"""Answers held to grammars by decoders that would say anything else: in company, preempted, after reasoning."""

import json
import random
from functools import cache

import pytest

from engine.scripted import ScriptedDecoder
from engine.test_engine import ROOMY, TIGHT, ask, engine_of
from freehold.engine.request import ReasoningBudget, Request, SamplingParams
from freehold.models.spec import DecoderSpec
from freehold.text.answer import parse_answer
from freehold.text.answer_grammar import Form, write_grammar
from freehold.text.dialect import LLAMA, NEMOTRON
from freehold.text.grammar import Grammars
from models.forms import needs_kernels
from models.tiny import LLAMA as LLAMA_CONFIG
from models.tiny import NEMOTRON as NEMOTRON_CONFIG
from models.tiny import tiny_decoder, tiny_spec
from text.spelling import byte_tokenizer

TOKENIZER = byte_tokenizer(has_marks=True)
VOCAB = {"vocab_size": TOKENIZER.vocab_size}
CONFIGS = {"llama": LLAMA_CONFIG | VOCAB, "nemotron": NEMOTRON_CONFIG | VOCAB}
SCHEMA = {
    "type": "object",
    "properties": {
        "flag": {"type": "boolean"},
        "unit": {"enum": ["C", "F"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["flag", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
GRAMMARS = Grammars(TOKENIZER)


def grammar(form, dialect=LLAMA, *, tools=(), prompt=""):
    written = write_grammar(form, dialect, tools=tools, prompt=prompt, token_id=TOKENIZER.token_id)
    return GRAMMARS.compile(written.text, written.schemas)


@cache
def tiny(name):
    return tiny_decoder(CONFIGS[name])


def spec() -> DecoderSpec:
    return tiny_spec(CONFIGS["llama"])


def held(choose):
    """A request in random settings for an answer that keeps to SCHEMA, and seldom has blanks."""
    sampling = SamplingParams(
        max_tokens=choose.choice([6, 60]),
        temperature=choose.choice([0.0, 0.8, 1.5]),
        top_k=choose.choice([0, 2]),
        top_p=choose.choice([1.0, 0.9]),
        min_p=choose.choice([0.0, 0.1]),
        seed=choose.randint(0, 1 << 30),
        presence_penalty=choose.choice([0.0, 1.0]),
        min_tokens=choose.choice([0, 5]),
        logit_bias=dict.fromkeys(TOKENIZER.encode_plain("\n\r\t "), -50.0),  # blanks
    )
    prompt = tuple(choose.randrange(256) for _ in range(choose.randint(1, 40)))
    return Request(
        prompt=prompt,
        sampling=sampling,
        stop_ids=TOKENIZER.stop_ids,
        grammar=grammar(Form(schema=SCHEMA)),
        num_logprobs=1,
    )


@needs_kernels
@pytest.mark.parametrize("name", CONFIGS)
def test_a_held_answer_in_company_and_preempted_is_that_of_its_request_alone(name):
    choose = random.Random(name)
    requests = [held(choose) for _ in range(30)]
    with engine_of(tiny(name), TIGHT) as engine:
        together = [(one.tokens, one.events) for one in [ask(engine, request) for request in requests]]
        assert engine.stats().num_preemptions > 0
    with engine_of(tiny(name), ROOMY) as engine:
        for request, (tokens, events) in zip(requests, together, strict=True):
            alone = ask(engine, request)
            assert alone.tokens == tokens
            assert [event.scores for event in alone.events] == [event.scores for event in events]
    finished = [tokens for tokens, events in together if events[-1].finish.reason == "stop"]
    assert finished
    for tokens in finished:
        assert tokens[-1] in TOKENIZER.stop_ids
        value = json.loads(TOKENIZER.decode(tokens[:-1]))
        assert value["unit"] in ("C", "F")
        assert isinstance(value["flag"], bool)


def test_what_is_complete_ends_even_where_more_tokens_are_wanted():
    sampling = SamplingParams(max_tokens=50, min_tokens=40)
    held_to = grammar(Form(schema={"const": 12345}))
    request = Request(prompt=(1, 2), sampling=sampling, stop_ids=TOKENIZER.stop_ids, grammar=held_to)
    with engine_of(tiny("llama")) as engine:
        heard = ask(engine, request)
        assert TOKENIZER.decode(heard.tokens[:-1]) == "12345"
        assert heard.finish.reason == "stop"


def test_an_answer_cut_by_its_length_says_so():
    request = Request(
        prompt=(1,),
        sampling=SamplingParams(max_tokens=3),
        stop_ids=TOKENIZER.stop_ids,
        grammar=grammar(Form(schema=SCHEMA)),
    )
    with engine_of(tiny("llama")) as engine:
        heard = ask(engine, request)
        assert (len(heard.tokens), heard.finish.reason) == (3, "length")


def test_the_grammar_begins_where_reasoning_is_closed_by_its_budget():
    think, close = TOKENIZER.encode_plain("hm "), TOKENIZER.token_id("</think>")
    budget = ReasoningBudget(
        num_tokens=4,
        grace_tokens=5,
        answer_tokens=1,
        open_ids=(TOKENIZER.token_id("<think>"),),
        close_ids=(close,),
        newline_ids=frozenset(TOKENIZER.encode_plain("\n")),
        is_open=True,
    )
    held_to = grammar(Form(calls="one"), NEMOTRON, tools=[TOOL], prompt="<think>\n")
    request = Request(
        prompt=(1,),
        sampling=SamplingParams(max_tokens=200),
        stop_ids=TOKENIZER.stop_ids,
        grammar=held_to,
        reasoning=budget,
    )
    with engine_of(ScriptedDecoder(think, spec=spec())) as engine:
        heard = ask(engine, request)
        text = TOKENIZER.decode(heard.tokens[:-1])
    answer = parse_answer(NEMOTRON, text, tools=[TOOL], prompt="<think>\n")
    assert answer.reasoning.startswith("hm ")
    assert heard.tokens.index(close) == 9  # the budget and its grace
    (call,) = answer.tool_calls
    assert json.loads(call.arguments).keys() == {"flag", "unit"}


def test_a_grammar_that_becomes_too_complex_ends_its_own_answer_alone():
    pattern = {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}
    hard, easy = (
        Request(prompt=(1,), sampling=SamplingParams(max_tokens=60), stop_ids=TOKENIZER.stop_ids, grammar=held_to)
        for held_to in (grammar(Form(schema=pattern)), grammar(Form(schema={"const": "a"})))
    )
    with engine_of(ScriptedDecoder(TOKENIZER.encode_plain('"a'), spec=spec())) as engine:
        failed, done = ask(engine, hard), ask(engine, easy)
        assert (failed.finish.reason, done.finish.reason) == ("failed", "stop")
        assert "too complex" in failed.finish.message
