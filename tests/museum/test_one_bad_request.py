"""One request never ends another's answer, whatever is in it, and an engine that broke says so.

Guards against requests that took a whole server with them: vLLM CVE-2025-48944 (a tool's schema ended the worker),
CVE-2026-44222 (a few words in a prompt did), llama.cpp CVE-2026-21869 (a negative number wrote out of bounds).

The engine alone, with decoders that fail: tests/engine/test_engine.py. Hundreds of answers in company:
tests/serve/test_company.py. Odd values in every place of a body: tests/serve/test_writing.py.
"""

import json
import random
import threading

import httpx
import pytest

from cli.folders import write_folder
from freehold.engine.engine import Engine
from freehold.engine.model import load
from freehold.engine.scheduler import Limits
from serve.bodies import BODIES, ODD, changed, places
from serve.servers import MODEL_NAME, running_server, wait_for

LIMITS = Limits(num_slots=4, num_pages=32, page_size=32, budget_tokens=64, max_positions=256)
EVIL = 7  # the step that this id is in fails
GOOD = {"model": MODEL_NAME, "prompt": "Hello", "max_tokens": 40, "temperature": 1.0, "seed": 5}
NUM_GOOD = 12


@pytest.fixture
def engine(tmp_path):
    model = load(write_folder(tmp_path / "model"))
    predict = model.decoder.predict

    def failing(tokens_T, *more):
        if EVIL in tokens_T.tolist():
            raise RuntimeError("a fault that was put here, in /secret")
        return predict(tokens_T, *more)

    model.decoder.predict = failing
    with Engine(model, LIMITS) as engine:
        yield engine


def bad_requests(choose):
    """Yield requests that are broken, fail under way, ask for too much, or are left."""
    bodies = {path: body | {"model": MODEL_NAME} for path, body in BODIES.items()}
    while True:
        path = choose.choice(list(bodies))
        yield path, changed(bodies[path], choose.choice(list(places(bodies[path]))), choose.choice(ODD))
        yield "/v1/completions", {**GOOD, "prompt": [1, EVIL, 2]}
        yield "/v1/embeddings", {"model": MODEL_NAME, "input": [[1, 2], [EVIL]]}
        yield "/v1/completions", {**GOOD, "prompt": [1, EVIL, 2], "stream": True}
        yield "/v1/completions", {**GOOD, "prompt": "x" * 300}
        yield "/v1/completions", {**GOOD, "n": 16, "max_tokens": 200}  # more than fits at once


def be_bad(url, is_over):
    choose = random.Random(0)
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}) as client:
        for path, body in bad_requests(choose):
            if is_over.is_set():
                return
            try:
                client.post(path, content=json.dumps(body), timeout=choose.choice([60, 0.05]))
            except httpx.TimeoutException:
                continue  # it has left


def text_of(url):
    return httpx.post(f"{url}/v1/completions", json=GOOD, timeout=300).json()["choices"][0]["text"]


def test_a_client_gets_its_answers_whatever_another_sends(engine):
    with running_server(engine) as url:
        alone, is_over = text_of(url), threading.Event()
        other = threading.Thread(target=be_bad, args=(url, is_over))
        other.start()
        beside = [text_of(url) for _ in range(NUM_GOOD)]
        is_over.set()
        other.join()
        wait_for(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        assert beside == [alone] * NUM_GOOD
        assert httpx.get(f"{url}/ready").status_code == 200
    stats = engine.stats()
    assert (stats.num_free_pages, stats.num_free_slots) == (LIMITS.num_pages, LIMITS.num_slots)


def test_a_request_that_fails_under_way_is_told_so_and_nothing_of_why(engine):
    with running_server(engine) as url:
        answer = httpx.post(f"{url}/v1/completions", json={**GOOD, "prompt": [1, EVIL]}, timeout=300)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the engine failed at this request; its log says more"
        assert text_of(url)


def test_an_engine_that_broke_is_not_healthy_and_says_so(engine, caplog):
    with running_server(engine) as url:
        assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/ready")] == [200, 200]
        engine._scheduler.pages.take(1)  # it is lost, which the engine finds as soon as it rests
        httpx.post(f"{url}/v1/completions", json=GOOD, timeout=300)
        wait_for(lambda: engine.has_failed)
        assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/ready")] == [503, 503]
        refused = httpx.post(f"{url}/v1/completions", json=GOOD)
    assert refused.status_code == 500
    assert refused.json()["error"]["message"] == "the engine broke and runs nothing more; its log says why"
    assert "is lost or owned twice" in caplog.text
