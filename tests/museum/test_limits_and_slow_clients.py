"""Whatever a client sends, or does not take, costs a bounded amount of memory and holds nobody else up.

Guards against CVE-2025-48956 (vLLM: headers of any size), CVE-2022-21698 (Prometheus' client for Go: a label for every
method that anybody thinks of), and slowloris in its three forms: heads, bodies and readers that never get done.

Heads and bodies that are too large, too deep, ambiguous or slow: tests/serve/test_limits.py.
"""

import asyncio
import random
import socket
import threading
from types import SimpleNamespace

import httpx
from prometheus_client.parser import text_string_to_metric_families

from freehold.serve.app import build_app
from freehold.serve.configuration import ServeSettings
from freehold.serve.connection import Connection
from freehold.serve.limits import Limited, Limits
from museum.asked import ASK
from serve.listening import listening, read_to_end
from serve.scripted import ScriptedAnswers, said, text
from serve.servers import running_server

PATH = "/v1/chat/completions"


class Impatient(Connection):
    """A connection that is cut soon after its client takes nothing more."""

    stalled_s = 0.1


def post(path: str, body: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def test_a_reader_that_stops_taking_a_stream_ends_its_answer():
    answers = ScriptedAnswers(*[said(text("word " * 20_000))] * 2000)
    app = build_app(answers, settings=ServeSettings(keep_alive_s=0.05))
    body = httpx.Request("POST", "http://x", json={"model": "scripted", "messages": ASK, "stream": True}).content
    with listening(app, http=Impatient) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(post(PATH, body))
        assert answers.closed.wait(60)  # though the connection is open, and not all was said


def test_a_reader_that_stops_taking_a_whole_answer_is_cut():
    size, cut = 64 << 20, threading.Event()

    class Watched(Impatient):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            cut.set()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    with listening(app, http=Watched) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(post("/"))
        assert cut.wait(60)
        assert len(read_to_end(client)) < size


def test_a_reader_that_takes_a_little_at_a_time_is_not_cut():
    left = [100, 90, 80, 80]  # bytes, each time that somebody looks
    later, cut = [], []
    connection = Connection.__new__(Connection)
    connection.flow = SimpleNamespace(pause_writing=lambda: None)
    connection.loop = SimpleNamespace(call_later=lambda delay_s, *call: later.append(call))
    connection.transport = SimpleNamespace(get_write_buffer_size=lambda: left.pop(0), abort=lambda: cut.append(True))
    connection.pause_writing()
    for _ in range(2):
        look, *before = later.pop()
        look(*before)
        assert not cut
    look, *before = later.pop()
    look(*before)
    assert cut


async def ask(app, num_bytes: int) -> int:
    """Return the status that an app answers with to a body of so many bytes."""
    pieces = [{"type": "http.request", "body": b"x", "more_body": True}] * num_bytes + [{"type": "http.request"}]
    sent = []

    async def receive():
        return pieces.pop(0)

    async def send(message):
        sent.append(message)

    await app({"type": "http", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}, receive, send)
    return sent[0]["status"]


def test_the_bodies_of_all_requests_together_are_bounded():
    async def scenario():
        ends = asyncio.Event()

        async def app(scope, receive, send):
            await ends.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        limited = Limited(app, Limits(body_bytes=1000, all_bodies_bytes=1500))
        first = asyncio.create_task(ask(limited, 1000))
        await asyncio.sleep(0)
        assert await ask(limited, 501) == 429
        second = asyncio.create_task(ask(limited, 500))
        await asyncio.sleep(0)
        assert await ask(limited, 1) == 429
        ends.set()
        assert [await first, await second] == [200, 200]
        assert await ask(limited, 1001) == 413
        assert await ask(limited, 1000) == 200  # whatever was refused is not held

    asyncio.run(scenario())


def test_a_server_holds_as_many_bodies_as_its_owner_gave_it_memory_for():
    with running_server(ScriptedAnswers(), limits=Limits(all_bodies_bytes=10)) as url:
        assert httpx.post(f"{url}{PATH}", content=b"x" * 11).status_code == 429
        assert httpx.post(f"{url}{PATH}", content=b"x" * 10).status_code == 400


def labels_of(client: httpx.Client) -> set[tuple[str, ...]]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(sample.name, *sample.labels.values()) for family in families for sample in family.samples}


def ask_oddly(client: httpx.Client, choose: random.Random) -> None:
    odd = "".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=12))
    client.request(odd.upper(), f"/{odd}")
    client.request(odd.upper(), "/v1/chat/completions")
    client.get(f"/v1/models/{odd}")
    client.get(f"/{odd}.js?{odd}", headers={odd: odd, "user-agent": odd})
    client.post("/v1/completions", json={"model": odd, "prompt": odd, "user": odd})
    client.post("/v1/messages", json={odd: odd})


def test_no_client_can_make_metrics_grow(witnessed):
    choose = random.Random(0)
    ask_oddly(witnessed.client, choose)
    before = labels_of(witnessed.client) | labels_of(witnessed.client)
    for _ in range(20):
        ask_oddly(witnessed.client, choose)
    assert labels_of(witnessed.client) == before
