"""Limits of what a request may be, over real sockets: what is larger, deeper or slower is refused."""

import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from freehold.serve.connection import Connection
from freehold.serve.limits import Limited, Limits, refuse_shape
from serve.listening import exchange, listening, read_to_end

LIMITS = Limits(body_bytes=1000, json_depth=4, json_values=50, num_headers=20, header_bytes=2000, target_bytes=200)
POST = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
NO_LIMIT = 10**9


class Impatient(Connection):
    """A connection with a short deadline, for tests that wait for it; others would miss it on a busy machine."""

    head_s = 0.3
    discard_s = 0.3


def make_app(limits: Limits) -> Limited:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"num_bytes": len(await request.body())}

    return Limited(app, limits)


@contextmanager
def client_with(limits: Limits, http: type[Connection]) -> Iterator[httpx.Client]:
    with (
        listening(make_app(limits), http=http, timeout_keep_alive=1000) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with client_with(LIMITS, Connection) as client:
        yield client


@pytest.fixture(scope="module")
def hurried() -> Iterator[httpx.Client]:
    """A client of a server with short deadlines."""
    with client_with(replace(LIMITS, body_s=0.3), Impatient) as client:
        yield client


def port_of(client: httpx.Client) -> int:
    return client.base_url.port


def chunked(body: bytes) -> Iterator[bytes]:
    yield from (body[start : start + 100] for start in range(0, len(body), 100))


def send_without_end(sender: socket.socket, piece: bytes, *, pause_s: float = 0.0) -> None:
    while True:
        sender.sendall(piece)
        time.sleep(pause_s)


def test_a_body_at_the_limit_passes_whole(client):
    for content in (b"x" * 1000, chunked(b"x" * 1000)):
        assert client.post("/echo", content=content).json() == {"num_bytes": 1000}
    assert client.post("/echo").json() == {"num_bytes": 0}


@pytest.mark.parametrize("content", [lambda: b"x" * 1001, lambda: chunked(b"x" * 1001)], ids=["length", "chunked"])
def test_a_body_above_the_limit_is_refused_and_the_connection_goes_on(client, content):
    answer = client.post("/echo", content=content())
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.post("/echo", content=b"x").status_code == 200


def test_the_refusal_has_the_shape_of_the_api_that_was_asked(client):
    assert client.post("/v1/messages", content=b"x" * 1001).json()["error"]["type"] == "request_too_large"


def test_an_announced_body_is_refused_before_it_comes(client):
    with socket.create_connection(("127.0.0.1", port_of(client)), timeout=60) as sender:
        sender.sendall(POST + b"Content-Length: 99999999999\r\n\r\n")
        assert sender.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_who_waits_for_100_continue_gets_the_refusal_instead(client):
    with socket.create_connection(("127.0.0.1", port_of(client)), timeout=60) as sender:
        sender.sendall(POST + b"Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n")
        assert sender.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_an_endless_body_is_cut(hurried):
    with socket.create_connection(("127.0.0.1", port_of(hurried)), timeout=60) as sender:
        sender.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"400\r\n" + b"x" * 1024 + b"\r\n"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_without_end(sender, piece)


def test_a_body_that_does_not_come_is_given_up(hurried):
    answer = exchange(port_of(hurried), POST + b"Content-Length: 10\r\n\r\n", b"123")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


def test_a_body_in_drops_is_given_up_too(hurried):
    with socket.create_connection(("127.0.0.1", port_of(hurried)), timeout=0.02) as sender:
        sender.sendall(POST + b"Content-Length: 900\r\n\r\n")
        answer = b""
        while not answer:  # ends with the answer: each drop comes long before a deadline that only idling would pass
            sender.sendall(b"x")
            try:
                answer = sender.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("drops", [b"", b"GET / HT", b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX-A: "])
def test_a_head_that_does_not_end_is_cut(hurried, drops):
    assert exchange(port_of(hurried), drops) == b""


def test_a_head_in_drops_is_cut_too(hurried):
    with socket.create_connection(("127.0.0.1", port_of(hurried)), timeout=60) as sender:
        sender.sendall(b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_without_end(sender, b"x", pause_s=0.02)


def test_slow_clients_do_not_keep_others_waiting():
    class Calm(Connection):
        head_s = 2.0  # what is sent right after connecting comes before it, on a busy machine too

    slow = []
    with client_with(replace(LIMITS, body_s=2.0), Calm) as client:
        for index in range(100):
            slow.append(socket.create_connection(("127.0.0.1", port_of(client)), timeout=60))
            slow[-1].sendall(POST + (b"Content-Length: 10\r\n\r\n1" if index % 2 else b"X-A: "))
        assert client.post("/echo", content=b"x").json() == {"num_bytes": 1}
        for index, sender in enumerate(slow):
            assert read_to_end(sender).startswith(b"HTTP/1.1 408 ") == bool(index % 2)
            sender.close()


def test_a_second_request_on_a_connection_has_a_deadline_of_its_own(hurried):
    whole = POST + b"Content-Length: 1\r\n\r\nx"
    answers = exchange(port_of(hurried), whole + whole, POST)
    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert answers.count(b"HTTP/1.1 ") == 2


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/echo", {f"x-{index}": "1" for index in range(21)}, 431),
        ("/echo", {"x-long": "a" * 2001}, 431),
        ("/echo?" + "a" * 200, {}, 414),
        ("/" + "a" * 200, {}, 414),
    ],
    ids=["count", "size", "query", "path"],
)
def test_heads_that_are_too_large_are_refused(client, path, headers, status):
    assert client.post(path, headers=headers).status_code == status


@pytest.mark.parametrize(
    "begun",
    [
        POST + b"X-A: ",
        b"POST /",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: ",
    ],
    ids=["header", "path", "extension", "trailer"],
)
def test_what_is_no_body_is_not_read_for_ever(client, begun):
    with socket.create_connection(("127.0.0.1", port_of(client)), timeout=60) as sender:
        sender.sendall(begun)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_without_end(sender, b"a" * 1000)


def test_trailers_are_no_headers(hurried):
    trailers = b"0\r\n" + b"X-A: a\r\n" * 50 + b"\r\n"
    answer = exchange(port_of(hurried), POST + b"Transfer-Encoding: chunked\r\n\r\n" + trailers, POST)
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_requests_before_any_answer_are_few(client):
    answers = exchange(port_of(client), (POST + b"Content-Length: 0\r\n\r\n") * 20)
    assert answers.count(b"HTTP/1.1 400 ") == 1


def test_line_ends_between_requests_do_not_hold_a_connection(hurried):
    with socket.create_connection(("127.0.0.1", port_of(hurried)), timeout=60) as sender:
        sender.sendall(POST + b"Content-Length: 0\r\n\r\n")
        assert sender.recv(65536).startswith(b"HTTP/1.1 200 ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_without_end(sender, b"\r\n", pause_s=0.02)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 1e3\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFFF\r\n",
    ],
    ids=["two-lengths", "length-and-chunked", "negative", "exponent", "huge-chunk"],
)
def test_bodies_whose_length_is_in_doubt_are_refused_and_end_the_connection(client, head):
    answers = exchange(port_of(client), POST + head)
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert answers.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 900,
        b'{"a":' * 180,
        b"[[[[[]]]]]",
        b'{"a":[{"b":[{}]}]}',
        b"[" + b"1," * 60 + b"1]",
        b"[" + b"[]," * 60 + b"1]",
        b'{"' + b'a":1,"' * 60 + b'b":1}',
        b'["' + b'","' * 60 + b'"]',
        json.dumps({"a": 1}).encode("utf-16"),
        json.dumps({"a": 1}).encode("utf-32-le"),
        b'["\\\\",[[[["\\""]]]]]',
        b'["\\\\\\"",[[[[1]]]]]',
    ],
    ids="arrays objects five mixed many many-arrays many-names many-texts utf-16 utf-32 backslashes escapes".split(),
)
def test_json_that_is_too_deep_or_too_much_is_refused(client, body):
    answer = client.post("/echo", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b'["[[[[[[[[[["]', b'["\\"[[[[[[[[["]', b'["\\\\\\"[[[[[[["]', b"[[[[1]]]]", b'{"a":"' + b"," * 500 + b'"}', b"x"],
)
def test_what_stands_in_a_text_is_not_counted(client, body):
    assert client.post("/echo", content=body).status_code == 200


def depth_of(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def size_of(value: object) -> int:
    """Return the number of values, and of names."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(size_of, value.values()))
    return 1 + sum(map(size_of, value)) if isinstance(value, list) else 1


LEAVES = st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[]{},:\n\0é\u225b') | st.floats()
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text('a"\\[{'), inner), max_leaves=30)


def test_an_app_behind_the_limits_hears_that_its_client_is_gone():
    gone = threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with listening(Limited(app)) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as sender:
        sender.sendall(POST + b"Content-Length: 1\r\n\r\nx")
        assert sender.recv(65536)
        sender.close()
        assert gone.wait(60)


@given(TREES, st.booleans(), st.integers(0, 6))
def test_depth_is_counted_as_a_parser_would(value, is_ascii, limit):
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    refused = refuse_shape(body, Limits(json_depth=limit, json_values=NO_LIMIT)) is not None
    assert refused == (depth_of(value) > limit)


@given(TREES)
def test_no_more_values_pass_than_the_limit_and_a_name(value):
    body = json.dumps(value).encode()
    assert refuse_shape(body, Limits(json_depth=NO_LIMIT, json_values=2 * size_of(value))) is None
    if size_of(value) > 2:
        few = Limits(json_depth=NO_LIMIT, json_values=(size_of(value) - 1) // 4)
        assert refuse_shape(body, few) is not None


@given(st.binary())
def test_any_bytes_are_counted_without_an_error(body):
    refuse_shape(body, LIMITS)


@pytest.mark.parametrize("unit", [b"[", b'{"":', b'"', b'",', b"\\", b'\\"', b"[]", b"]", b",", b"[{}],", b'"\\\\",'])
def test_the_largest_bodies_take_little_memory_beside_themselves(unit):
    limits = Limits()
    body = unit * (limits.body_bytes // len(unit))
    tracemalloc.start()
    refuse_shape(body, limits)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 * limits.body_bytes
