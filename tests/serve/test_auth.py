"""The guard, over real sockets: nothing is answered that a key, or this machine's own user, did not ask for."""

import asyncio
import logging
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import sqlalchemy as sql
from fastapi import FastAPI, Request
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from freehold.serve.auth import OPEN_PATHS, Guard, is_loopback
from freehold.serve.configuration import PAGE
from freehold.serve.database import Database, api_keys
from freehold.serve.errors import answer_errors
from freehold.serve.keys import Keys
from freehold.serve.rates import Rates
from freehold.serve.terms import Terms
from serve.listening import exchange, listening

PATHS = ("/v1/models", "/v1/chat/completions", "/metrics", "/docs", "/openapi.json", "/nowhere", "/health/")


class Gate:
    """A request that runs until the test lets it go."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()


def make_app(guard: Guard, gate: Gate | None = None) -> FastAPI:
    app = FastAPI(middleware=[Middleware(guard.around)])
    answer_errors(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse("num_things 1\n")

    @app.api_route("/v1/models", methods=["GET", "POST"])
    def models(request: Request) -> dict[str, object]:
        caller = request.state.caller
        return {"key_id": caller.key_id, "weight": caller.weight, "scopes": sorted(caller.scopes)}

    @app.get("/slow")
    def slow() -> dict[str, str]:
        gate.entered.set()
        assert gate.opened.wait(60)
        return {}

    return app


@contextmanager
def client_of(guard: Guard, gate: Gate | None = None):
    with (
        listening(make_app(guard, gate)) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        yield client


@pytest.fixture
def keys(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'keys.db'}")
    yield Keys(database)
    database.close()


@pytest.fixture
def client(keys):
    with client_of(Guard(keys)) as client:
        yield client


@pytest.fixture(scope="module")
def open_client():
    """Return a client of a server that needs no key."""
    with client_of(Guard(None)) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def change_row(keys: Keys, **values) -> None:
    with keys.database.begin() as connection:
        connection.execute(sql.update(api_keys).values(values))


def test_no_route_answers_without_a_key(client):
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        for path in PATHS:
            assert client.request(method, path).status_code == 401, (method, path)


def test_health_and_the_page_alone_are_open_to_be_read(client):
    files = {f"/{file.name}" for file in PAGE.iterdir()}
    assert {"/health", "/", *files} == OPEN_PATHS
    assert len(files) > 10
    for path in OPEN_PATHS:
        assert client.get(path).status_code != 401
        assert client.post(path).status_code == 401


def test_health_says_nothing_but_that_the_server_lives(client):
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert client.post("/health").status_code == 401


def test_paths_that_only_look_like_health_are_not_open(keys):
    with listening(make_app(Guard(keys))) as port:
        for target in (b"/health/../v1/models", b"//health", b"/HEALTH", b"/health%2f", b"/v1/models?/health"):
            head = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            assert exchange(port, head).startswith(b"HTTP/1.1 401 "), target


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "both"])
def test_a_key_opens_with_either_header(client, keys, header):
    key, token = keys.add("a", Terms(weight=2.0, scopes=frozenset({"infer", "admin"})))
    headers = {"authorization": bearer(token), "x-api-key": {"x-api-key": token}}
    sent = headers.get(header) or bearer(token) | {"x-api-key": token}
    answer = client.get("/v1/models", headers=sent)
    assert answer.json() == {"key_id": key.id, "weight": 2.0, "scopes": ["admin", "infer"]}


def test_a_refusal_has_the_shape_of_the_api_that_was_asked(client):
    answer = client.post("/v1/chat/completions", json={})
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    answer = client.post("/v1/messages", json={})
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_wrong_keys_are_all_refused_alike(client, keys):
    _, token = keys.add("a", Terms())
    wrong_secret = token[:-2] + ("AA" if token[-2:] != "AA" else "BB")
    unknown_id = "fh-aaaaaaaaaaaa" + token[15:]
    answers = [client.get("/v1/models", headers=bearer(wrong)) for wrong in (wrong_secret, unknown_id, "sk-else")]
    bodies = {answer.text for answer in answers}
    assert {answer.status_code for answer in answers} == {401}
    assert len(bodies) == 1


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Basic TOKEN")],
        [("authorization", "TOKEN")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer TOKEN"), ("x-api-key", "fh-other")],
        [("authorization", "Bearer TOKEN"), ("authorization", "Bearer other")],
        [("x-api-key", "TOKEN x")],
        [("x-api-key", "é")],
        [("cookie", "authorization=Bearer TOKEN")],
    ],
    ids=["basic", "bare", "empty", "two-headers", "twice", "more", "not-ascii", "cookie"],
)
def test_a_key_that_is_sent_in_another_way_does_not_count(client, keys, headers):
    _, token = keys.add("a", Terms())
    sent = [(name.encode(), value.replace("TOKEN", token).encode()) for name, value in headers]
    assert client.get("/v1/models", headers=sent).status_code == 401
    assert client.get("/v1/models", params={"api_key": token}).status_code == 401


def test_revoked_and_expired_keys_open_nothing_at_once(client, keys):
    _, token = keys.add("a", Terms())
    assert client.get("/v1/models", headers=bearer(token)).status_code == 200
    change_row(keys, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    answer = client.get("/v1/models", headers=bearer(token))
    assert (answer.status_code, "has expired" in answer.text) == (401, True)
    change_row(keys, expires_at=None)
    keys.revoke("a")
    answer = client.get("/v1/models", headers=bearer(token))
    assert (answer.status_code, "was revoked" in answer.text) == (401, True)


@pytest.mark.parametrize(
    ("scope", "path", "status"),
    [
        ("infer", "/v1/models", 200),
        ("infer", "/metrics", 403),
        ("infer", "/admin/keys", 403),
        ("metrics", "/metrics", 200),
        ("metrics", "/v1/models", 403),
        ("metrics", "/nowhere", 403),
        ("admin", "/admin/keys", 404),
        ("admin", "/v1/models", 403),
    ],
)
def test_a_scope_opens_its_own_routes_and_no_others(client, keys, scope, path, status):
    _, token = keys.add("a", Terms(scopes=frozenset({scope})))
    answer = client.get(path, headers=bearer(token))
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["type"] == "permission_error"


def test_more_requests_a_minute_than_allowed_are_told_when_to_come_again(client, keys):
    _, token = keys.add("a", Terms(requests_per_minute=2))
    _, other = keys.add("b", Terms())
    answers = [client.get("/v1/models", headers=bearer(token)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert client.get("/v1/models", headers=bearer(other)).status_code == 200


def test_requests_a_minute_come_back_evenly(keys):
    now = [0.0]
    rates = Rates(lambda: now[0])
    key, _ = keys.add("a", Terms(requests_per_minute=6))
    assert [rates.enter(key) is None for _ in range(7)] == [True] * 6 + [False]
    assert rates.enter(key).retry_after_s == 10
    now[0] = 10.0
    assert [rates.enter(key) is None for _ in range(2)] == [True, False]
    now[0] = 10_000.0
    assert sum(rates.enter(key) is None for _ in range(100)) == 6


def test_more_requests_at_once_than_allowed_are_refused_until_one_ends(keys):
    gate = Gate()
    _, token = keys.add("a", Terms(concurrency=1))
    with client_of(Guard(keys), gate) as client:
        first = threading.Thread(target=client.get, args=("/slow",), kwargs={"headers": bearer(token), "timeout": 60})
        first.start()
        assert gate.entered.wait(60)
        refused = client.get("/v1/models", headers=bearer(token))
        gate.opened.set()
        first.join()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.get("/v1/models", headers=bearer(token)).status_code == 200


def test_a_refusal_is_read_also_by_who_is_still_sending(client):
    for _ in range(5):
        answer = client.post("/v1/chat/completions", content=b"x" * 8_000_000)
        assert answer.status_code == 401


def test_denials_are_logged_and_keys_never(client, keys, caplog):
    key, token = keys.add("a", Terms())
    with caplog.at_level(logging.DEBUG):
        client.get("/metrics", headers=bearer(token))
        client.get("/nowhere%0aFAKE", headers=bearer(token[:-1] + "!"))
        client.get("/v1/models", headers=bearer(token[:16] + "A" * 43))
        client.get("/v1/models", params={"key": token})
        client.get("/v1/models")
    denials = [record.getMessage() for record in caplog.records if record.name == "freehold.serve.auth"]
    assert len(denials) == 5
    assert f"key {key.id}" in denials[0]
    assert f"key {key.id} (not proven)" in denials[2]
    assert all("127.0.0.1" in line and "\n" not in line for line in denials)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("freehold")]
    assert token[16:40] not in "".join(told)


def test_where_the_database_fails_nobody_is_let_in(client, keys):
    _, token = keys.add("a", Terms())
    with keys.database.begin() as connection:
        connection.execute(sql.text("ALTER TABLE api_keys RENAME TO gone"))
    answer = client.get("/v1/models", headers=bearer(token))
    assert answer.status_code == 503
    assert "gone" not in answer.text
    assert "sqlite" not in answer.text


def test_a_websocket_is_refused(keys):
    upgrade = b"Host: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    with listening(make_app(Guard(keys))) as port:
        assert exchange(port, b"GET /v1/models HTTP/1.1\r\n" + upgrade).startswith(b"HTTP/1.1 401 ")


def test_on_loopback_no_key_is_needed_and_any_is_fine(open_client):
    everything = {"key_id": "", "weight": 1.0, "scopes": ["admin", "infer", "metrics", "priority"]}
    assert open_client.get("/v1/models").json() == everything
    assert open_client.get("/v1/models", headers=bearer("none")).json() == everything
    assert open_client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("127.8.9.1:80", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.0.7:8000", 403),
        ("0.0.0.0:8000", 403),
        ("localhost@evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_made_to_resolve_to_this_machine_gets_nothing(open_client, host, status):
    for path in ("/v1/models", "/health", "/"):
        answer = open_client.get(path, headers={"host": host})
        assert (answer.status_code == 403) == (status == 403), path


def test_a_request_without_a_host_gets_nothing():
    with listening(make_app(Guard(None))) as port:
        assert exchange(port, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost:8000.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "file://"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}, 403),
    ],
)
def test_a_page_of_another_origin_gets_nothing_from_a_server_without_keys(open_client, headers, status):
    own = {"host": "localhost:8000"}
    assert open_client.post("/v1/models", headers=own | headers).status_code == status
    assert open_client.get("/v1/models", headers=own | headers).status_code == status


def test_a_link_elsewhere_may_lead_here_but_a_form_may_not(open_client):
    visit = {"host": "localhost:8000", "sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert open_client.get("/v1/models", headers=visit).status_code == 200
    assert open_client.post("/v1/models", headers=visit).status_code == 403


def test_a_preflight_of_another_origin_is_refused(open_client):
    asking = {"origin": "https://evil.example", "access-control-request-method": "POST", "host": "localhost:8000"}
    answer = open_client.options("/v1/models", headers=asking)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_without_keys_only_the_loopback_end_of_a_server_answers():
    async def ask(server: str) -> int:
        transport = _At(make_app(Guard(None)), server)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=transport)) as client:
            return (await client.get("http://localhost:8000/v1/models")).status_code

    assert asyncio.run(ask("127.0.0.1")) == 200
    assert asyncio.run(ask("192.168.0.7")) == 403


class _At:
    """An app as it is reached through one of the machine's addresses."""

    def __init__(self, app, address: str):
        self._app, self._address = app, address

    async def __call__(self, scope, receive, send):
        await self._app({**scope, "server": (self._address, 8000)}, receive, send)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.5.5.5", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_the_rest(host, expected):
    assert is_loopback(host) is expected
