"""Many at once over HTTP: each seeded answer is that of its request alone, and nothing is left when all have gone."""

import asyncio
import json
import random

import httpx
import pytest

from cli.folders import write_folder
from freehold.checkpoint.fetch import shipped
from freehold.engine.engine import Engine
from freehold.engine.generate import generate
from freehold.engine.model import load
from freehold.engine.request import SamplingParams
from freehold.engine.scheduler import Limits
from models.forms import needs_kernels
from models.tiny import LLAMA
from serve.servers import MODEL_NAME, running_server

NUM_REQUESTS = 500  # of each model
AT_ONCE = 64
# Seven run at once at most, and their pages hold about four: many are preempted.
TIGHT = Limits(num_slots=7, num_pages=14, page_size=32, budget_tokens=48, max_positions=256)


def bodies(seed):
    choose = random.Random(seed)
    for _ in range(NUM_REQUESTS):
        yield {
            "model": MODEL_NAME,
            "prompt": "".join(choose.choice("abcdefgh ") for _ in range(choose.randint(1, 120))),
            "max_tokens": choose.randint(1, 40),
            "temperature": choose.choice([0.0, 0.7, 1.3]),
            "top_p": choose.choice([1.0, 0.9]),
            "seed": choose.randint(0, 2**40),
            "stream": choose.random() < 0.5,
        }


def alone(model, body):
    sampling = SamplingParams(**{name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed")})
    tokenizer = model.tokenizer
    prompt = tokenizer.encode(body["prompt"])
    tokens = list(generate(model.decoder, prompt, sampling, stop_ids=tokenizer.stop_ids, num_ids=tokenizer.vocab_size))
    return tokenizer.decode(token for token in tokens if token not in tokenizer.stop_ids)


async def ask(client, body, *, leaves_after):
    """Return the text of an answer, or what came of it until the client left."""
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"], True
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        num_lines = 0
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text, True
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                num_lines += 1
            if leaves_after is not None and num_lines > leaves_after:
                break
    return text, False


async def ask_all(url, wanted, choose):
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(body):
            async with gate:
                await asyncio.sleep(choose.expovariate(50))
                return await ask(client, body, leaves_after=choose.choice([None, None, 3]))

        return await asyncio.gather(*map(one, wanted))


def folder_of(name, tmp_path):
    return write_folder(tmp_path / name, LLAMA | {"vocab_size": 256}) if name == "dense" else shipped()["freehold-pico"]


@needs_kernels
@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_answers_among_many_are_those_alone_and_nothing_is_left(name, tmp_path):
    model = load(folder_of(name, tmp_path))
    wanted = list(bodies(name))
    with Engine(model, TIGHT) as engine, running_server(engine) as url:
        found = asyncio.run(ask_all(url, wanted, random.Random(name)))
        while engine.stats().num_running or engine.stats().num_waiting:
            pass
        stats = engine.stats()
    for body, (text, is_whole) in zip(wanted, found, strict=True):
        expected = alone(model, body)
        assert text == expected if is_whole else expected.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert sum(is_whole for _, is_whole in found) > NUM_REQUESTS / 2
    assert stats.num_preemptions > 0
    assert (stats.num_free_pages, stats.num_free_slots) == (TIGHT.num_pages, TIGHT.num_slots)
