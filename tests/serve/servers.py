"""The whole server behind a real socket, for tests: one engine for each model file, kept for all tests of a run."""

import atexit
import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai import OpenAI

from freehold.engine.engine import Engine
from freehold.engine.model import load
from freehold.engine.scheduler import Limits
from freehold.serve.answers import Answers
from freehold.serve.app import build_app
from freehold.serve.auth import Guard
from freehold.serve.configuration import ServeSettings
from serve.listening import listening

CONTEXT = 512
MODEL_NAME = "small"


@cache
def engine_of(path: Path) -> Engine:
    """Return the engine of a model file, running: eight sequences of up to CONTEXT tokens."""
    limits = Limits(num_slots=8, num_pages=128, page_size=32, budget_tokens=256, max_positions=CONTEXT)
    engine = Engine(load(path), limits)
    engine.start()
    atexit.register(engine.close)
    return engine


@contextmanager
def running_server(model: Path | Engine | Answers, *, guard: Guard | None = None, **settings: object) -> Iterator[str]:
    """Yield the address of a server; what is given by name goes into its ServeSettings."""
    answers = model
    if isinstance(model, Path | Engine):
        engine = engine_of(model) if isinstance(model, Path) else model
        answers = Answers(engine, model_name=MODEL_NAME)
    app = build_app(answers, guard=guard, settings=ServeSettings(**settings))
    with listening(app) as port:
        yield f"http://127.0.0.1:{port}"
    if answers is not model:
        answers.close()


@contextmanager
def openai_client(url: str) -> Iterator[OpenAI]:
    """Yield OpenAI's client of a server; what fails is not tried again."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds that is about to, and fail where it never does."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to hold")


def ask_and_leave(url: str, body: dict[str, Any], *, has_begun: Callable[[], bool]) -> None:
    """Ask for an answer, and go away as soon as it has begun, without waiting for anything of it."""
    address = urlsplit(url)
    client = http.client.HTTPConnection(address.netloc, timeout=60)
    client.request("POST", address.path, json.dumps(body), {"Content-Type": "application/json"})
    wait_for(has_begun)
    client.close()
