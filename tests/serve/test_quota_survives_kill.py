"""What a key used is still used after the server was killed in the middle of an answer."""

import asyncio
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from freehold.serve.caller import Caller
from freehold.serve.database import Database
from freehold.serve.keys import DayUsage, Keys
from freehold.serve.quota import DatabaseQuotas, QuotaSpent
from freehold.serve.terms import Terms
from serve.databases import KINDS, new_database

TESTS = Path(__file__).parent.parent
WATCHDOG_S = 120.0

# A server that reserves what a request may take, settles one that it answers whole, and never ends another.
SERVER = """
import asyncio, sys
from fastapi import FastAPI, Request
from starlette.middleware import Middleware
from starlette.responses import StreamingResponse
from freehold.serve.auth import Guard
from freehold.serve.database import Database
from freehold.serve.keys import Keys
from freehold.serve.quota import DatabaseQuotas
from serve.listening import listening

database = Database(sys.argv[1])
quotas = DatabaseQuotas(database)
app = FastAPI(middleware=[Middleware(Guard(Keys(database)).around)])

@app.post("/whole")
async def whole(request: Request):
    held = await quotas.reserve(request.state.caller, 300)
    await quotas.settle(held, 10, 15)

@app.post("/endless")
async def endless(request: Request):
    await quotas.reserve(request.state.caller, 600)
    async def pieces():
        yield b"data: first"
        await asyncio.sleep(1e6)
    return StreamingResponse(pieces())

with listening(app) as port:
    print(port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def serving(url: str):
    """Yield a server as a process of its own, and a client of it."""
    environment = {"PYTHONPATH": str(TESTS), "PATH": ""}
    command = [sys.executable, "-W", "error", "-c", SERVER, url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        watchdog = threading.Timer(WATCHDOG_S, process.kill)
        watchdog.start()
        try:
            port = int(process.stdout.readline())
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
                yield process, client
        finally:
            watchdog.cancel()
            process.kill()


@pytest.fixture(params=KINDS)
def url(request, tmp_path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def database(url):
    database = Database(url)
    yield database
    database.close()


def test_what_a_killed_server_had_reserved_counts_as_used(url, database):
    keys, quotas = Keys(database), DatabaseQuotas(database)
    key, token = keys.add("a", Terms(tokens_per_day=1000))
    client_key = {"x-api-key": token}

    with serving(url) as (process, client):
        assert client.post("/whole", headers=client_key).status_code == 200
        with client.stream("POST", "/endless", headers=client_key) as answer:
            pieces = answer.iter_bytes()
            assert next(pieces) == b"data: first"
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(httpx.RemoteProtocolError):
                next(pieces)

    usage = keys.usage_on(datetime.now(UTC).date())[key.id]
    assert usage == DayUsage(num_requests=2, prompt_tokens=10, completion_tokens=15, reserved_tokens=600)
    with pytest.raises(QuotaSpent, match="375 left"):
        asyncio.run(quotas.reserve(Caller(key_id=key.id), 376))

    with serving(url) as (_, client):  # and a new server goes on from there
        assert client.post("/whole", headers=client_key).status_code == 200
    assert keys.usage_on(datetime.now(UTC).date())[key.id].num_tokens == 650
