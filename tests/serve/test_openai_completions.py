"""Completions and embeddings with OpenAI's client over a real socket, of a real model."""

import base64
import struct
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI

from freehold.engine.request import SamplingParams
from inputs import smollm2_gguf
from serve.servers import CONTEXT, MODEL_NAME, engine_of, openai_client, running_server, wait_for

TEXT = "The capital of France is"
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(smollm2_gguf()) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with openai_client(url) as made:
        yield made


def ask(client: OpenAI, prompt=TEXT, **options):
    return client.completions.create(model=MODEL_NAME, prompt=prompt, **options)


def ids_of(text: str) -> list[int]:
    return engine_of(smollm2_gguf()).model.tokenizer.encode(text)


def test_a_text_is_continued_as_the_model_alone_does(client):
    model = engine_of(smollm2_gguf()).model
    sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=4)
    alone = "".join(model.stream(TEXT, sampling=sampling))
    answer = ask(client, max_tokens=12, temperature=0.7, seed=4)
    assert answer.choices[0].text == alone
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids_of(TEXT)), 12)


def test_ids_are_continued_as_their_text(client):
    options = {"max_tokens": 6, "temperature": 0}
    assert ask(client, ids_of(TEXT), **options).choices[0].text == ask(client, **options).choices[0].text


def test_without_max_tokens_there_are_up_to_16(client):
    assert ask(client, temperature=0, logit_bias={"2": -100, "0": -100}).usage.completion_tokens == 16


@pytest.mark.parametrize("as_ids", [False, True], ids=["texts", "ids"])
def test_each_of_several_prompts_is_continued_as_if_alone(client, as_ids):
    texts = [TEXT, "Two and two", "é"]
    prompts = [ids_of(text) if as_ids else text for text in texts]
    options = {"max_tokens": 5, "temperature": 1, "seed": 9, "n": 2}
    together = ask(client, prompts, **options)
    alone = [choice.text for prompt in prompts for choice in ask(client, prompt, **options).choices]
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == list(range(6))
    assert together.usage.prompt_tokens == sum(len(ids_of(text)) for text in texts)
    assert together.usage.completion_tokens == 30


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 2}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 1}, {"stop": [","]}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_stream_and_a_whole_answer_agree(client, options):
    options = {"max_tokens": 8, "temperature": 0.8, "seed": 2, **options}
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    for choice in whole.choices:
        parts = [made for chunk in chunks for made in chunk.choices if made.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if choice.logprobs else ():
            joined = [value for part in parts if part.logprobs for value in getattr(part.logprobs, field)]
            assert joined == getattr(choice.logprobs, field)
    assert chunks[-1].usage == whole.usage


def test_echoed_scores_are_of_the_whole_text(client):
    answer = ask(client, "Grüße €", echo=True, logprobs=2, max_tokens=4, temperature=0).choices[0]
    scores = answer.logprobs
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    assert answer.text.startswith("Grüße €")
    assert len(scores.tokens) == len(ids_of("Grüße €")) + 4
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert token.startswith("bytes:") or answer.text[offset:].startswith(token)
    for token, logprob, top in list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob <= 0
        assert len(top) in (2, 3)


def test_scores_of_a_prompt_are_the_models_own(client):
    model = engine_of(smollm2_gguf()).model
    ids = ids_of(TEXT)
    expected = model.logits(ids).log_softmax(-1)
    scores = ask(client, ids, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    assert len(scores.token_logprobs) == len(ids)
    for place, logprob in enumerate(scores.token_logprobs[1:]):
        assert logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-4)  # float32 of other batches


@pytest.mark.parametrize("echo", [False, True], ids=["answer", "echo"])
def test_the_id_that_ends_a_continuation_has_a_score_but_no_text(client, echo):
    """So scores and tokens are as many as usage says, as evaluation harnesses count on."""
    answer = ask(client, max_tokens=9, temperature=0, logprobs=1, echo=echo, logit_bias={str(END): 100})
    choice, scores = answer.choices[0], answer.choices[0].logprobs
    assert (choice.text, choice.finish_reason) == (TEXT if echo else "", "stop")
    assert scores.tokens[-1] == "<|im_end|>"
    assert len(scores.tokens) == answer.usage.completion_tokens + (answer.usage.prompt_tokens if echo else 0)
    assert scores.text_offset[-1] == len(choice.text)
    alone = engine_of(smollm2_gguf()).model.logits(ids_of(TEXT)).log_softmax(-1)
    assert scores.token_logprobs[-1] == pytest.approx(float(alone[-1, END]), abs=1e-4)


def test_with_ignore_eos_an_answer_goes_on_past_the_models_own_end(client):
    options = {"max_tokens": 6, "temperature": 0, "logit_bias": {str(END): 100}}
    assert ask(client, **options).usage.completion_tokens == 1
    answer = ask(client, **options, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "length")
    assert answer.choices[0].text == "<|im_end|>" * 6


def test_nothing_ends_an_answer_before_min_tokens(client):
    first = ask(client, max_tokens=1, temperature=0).choices[0].text
    options = {"max_tokens": 9, "temperature": 0, "logit_bias": {str(END): 50}}
    answer = ask(client, **options, stop=[first], extra_body={"min_tokens": 4})
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text.startswith(first)


def test_usage_is_in_every_chunk_that_is_asked_for(client):
    options = {"max_tokens": 5, "temperature": 0, "n": 2, "stream": True, "extra_body": {"ignore_eos": True}}
    usages = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, [TEXT, "Two and two"], stream_options=usages, **options))
    written = [chunk.usage.completion_tokens for chunk in chunks]
    assert written == sorted(written)
    assert len(set(written)) > 10
    read = len(ids_of(TEXT)) + len(ids_of("Two and two"))
    assert (chunks[-1].usage.prompt_tokens, written[-1]) == (read, 20)
    with pytest.raises(openai.BadRequestError, match="include_usage"):
        ask(client, stream=True, stream_options={"continuous_usage_stats": True})


def test_an_echo_of_no_tokens_is_the_prompt_alone(client):
    for stream in (False, True):
        made = ask(client, echo=True, max_tokens=0, stream=stream)
        choices = [choice for chunk in made for choice in chunk.choices] if stream else made.choices
        assert "".join(choice.text for choice in choices) == TEXT
        assert choices[-1].finish_reason == "length"
    assert ask(client, echo=True, max_tokens=0).usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        ("word " * 2000, {}, "context_length_exceeded"),
        (TEXT, {"max_tokens": CONTEXT}, "context_length_exceeded"),
        ([1_000_000], {}, None),
        ("", {}, None),
        (TEXT, {"suffix": "!"}, None),
        (TEXT, {"best_of": 2}, None),
        (TEXT, {"use_beam_search": True, "max_tokens": 1}, "unsupported_parameter"),
        (TEXT, {"min_tokens": 5, "max_tokens": 4}, None),
        ([1_000_000], {"echo": True}, None),
    ],
    ids=["long", "long answer", "unknown id", "empty", "suffix", "best_of", "beams", "min_tokens", "unknown id echoed"],
)
def test_what_cannot_be_continued_is_refused(client, prompt, options, code):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, prompt, extra_body=options)
    assert refused.value.code == code


def test_one_prompt_that_is_refused_ends_those_beside_it(client):
    engine = engine_of(smollm2_gguf())
    with pytest.raises(openai.BadRequestError):
        ask(client, [TEXT, "word " * 2000], max_tokens=100)
    wait_for(lambda: engine.stats().num_free_pages == engine.stats().num_pages)


# Embeddings.


def embed(client: OpenAI, given, **options):
    return client.embeddings.create(model=MODEL_NAME, input=given, **options)


def test_an_embedding_has_length_one_and_is_the_same_in_company(client):
    alone = embed(client, TEXT, encoding_format="float")
    together = embed(client, ["Hello", TEXT, TEXT], encoding_format="float")
    assert together.data[1].embedding == alone.data[0].embedding == together.data[2].embedding
    assert sum(value * value for value in alone.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert alone.usage.prompt_tokens == alone.usage.total_tokens == len(ids_of(TEXT))


def test_base64_is_the_same_numbers_as_floats(client, url):
    floats = embed(client, TEXT, encoding_format="float").data[0].embedding
    body = {"model": MODEL_NAME, "input": TEXT, "encoding_format": "base64"}
    packed = base64.b64decode(httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(packed) // 4}f", packed)) == floats
    assert embed(client, TEXT).data[0].embedding == floats  # the client itself asks for base64


def test_ids_are_embedded_as_their_text(client):
    by_ids = embed(client, ids_of(TEXT)).data[0].embedding
    assert by_ids == embed(client, TEXT).data[0].embedding == embed(client, [ids_of(TEXT)]).data[0].embedding


def test_what_cannot_be_embedded_is_refused(client):
    for given in ("word " * 2000, "", [1_000_000], ["a", "word " * 2000]):
        with pytest.raises(openai.BadRequestError):
            embed(client, given)
    with pytest.raises(openai.BadRequestError) as refused:
        embed(client, TEXT, dimensions=8)
    assert refused.value.param == "dimensions"
