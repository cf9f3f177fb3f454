"""What a server logs, from a real process: a line for each request with what it took, and never what was said."""

import json
import signal
import subprocess
from contextlib import contextmanager

import httpx
import pytest

from cli.commands import TIMEOUT_S, spawn
from cli.folders import write_folder
from freehold.serve.database import Database
from freehold.serve.keys import Keys, Terms
from models.tiny import LLAMA

SECRET = "a secret that no log may hold"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LLAMA | {"vocab_size": 256}
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", config)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A database with a key that may ask once a minute: its URL, the key and its secret."""
    url = f"sqlite:///{tmp_path_factory.mktemp('keys') / 'keys.db'}"
    database = Database(url)
    key, token = Keys(database).add("test", Terms(requests_per_minute=4))
    database.close()
    return url, key, token


def logged_for(answers, lines):
    """Return the one line of JSON that each answer has, in the order of the answers.

    A line is written when its answer has gone out: that of the next request may come before it.
    """
    logged = {line["request"]: line for line in map(json.loads, lines)}
    assert len(logged) == len(lines) == len(answers)
    return [logged[answer.headers["x-request-id"]] for answer in answers]


@contextmanager
def logging_server(folder, *options):
    """Yield a client of a server, and a list that has the lines of its log when it has ended."""
    lines: list[str] = []
    command = ("serve", folder, "--port", 0, "--memory", 1, *options)
    with spawn(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            yield client, lines
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert SECRET not in errors
    lines += [line for line in errors.splitlines() if not line.startswith(("memory:", "note:", "64 requests", "8 "))]


def test_each_request_has_a_line_of_json_with_what_it_took(folder):
    with logging_server(folder, "--log", "json") as (client, lines):
        whole = client.post("/v1/chat/completions", json=HELLO)
        streamed = client.post("/v1/messages", json=HELLO | {"stream": True})
        wrong = client.post("/v1/completions", json={"model": "other", "prompt": SECRET})
        embedded = client.post("/v1/embeddings", json={"model": "tiny", "input": ["abc", "defg"]})
        assert client.get("/health").status_code == 200
    logged = logged_for([whole, streamed, wrong, embedded], lines)
    assert [line["status"] for line in logged] == [200, 200, 404, 200]
    first, second, third, fourth = logged
    usage = whole.json()["usage"]
    assert (first["prompt_tokens"], first["answer_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (first["route"], first["model"], first["key"]) == ("/v1/chat/completions", "tiny", None)
    assert (first["finish"], second["finish"], third["finish"], fourth["prompt_tokens"]) == (
        "length",
        "length",
        None,
        7,
    )
    assert all(first[name] >= 0 and fourth[name] >= 0 for name in ("queue_ms", "prefill_ms", "decode_ms"))
    assert "there is no such model" in third["error"]


def test_a_client_that_leaves_is_logged_with_what_it_took(folder):
    with logging_server(folder, "--log", "json") as (client, lines):
        body = HELLO | {"stream": True, "max_tokens": 100}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
    (line,) = map(json.loads, lines)
    assert line["finish"] == "cancelled" or line["answer_tokens"] == 100
    assert 1 <= line["answer_tokens"] <= 100


def test_denials_are_logged_with_the_id_of_the_key_and_never_the_key(folder, keyed):
    url, key, token = keyed
    with logging_server(folder, "--log", "json", "--require-keys", "--database", url) as (client, lines):
        bearer = {"authorization": f"Bearer {token}"}
        answers = [client.get("/v1/models"), client.get("/metrics", headers=bearer)]
        answers += [client.post("/v1/chat/completions", json=HELLO, headers=bearer) for _ in range(5)]
    logged = logged_for(answers, lines)
    assert [line["status"] for line in logged] == [401, 403, 200, 200, 200, 200, 429]
    assert [line["key"] for line in logged] == ["none", *[key.id] * 6]
    assert [line["level"] for line in logged] == ["warning", "warning", *["info"] * 4, "warning"]
    assert token.rpartition("_")[2] not in "".join(lines)


def test_lines_are_for_people_unless_asked_and_quiet_leaves_out_what_went_well(folder):
    with logging_server(folder) as (client, lines):
        answer = client.post("/v1/chat/completions", json=HELLO)
    (line,) = lines
    assert f"INFO request={answer.headers['x-request-id']} method=POST route=/v1/chat/completions status=200" in line
    with logging_server(folder, "--log", "quiet") as (client, lines):
        client.post("/v1/chat/completions", json=HELLO)
        client.get("/v1/models", headers={"host": "elsewhere.example"})
    (line,) = lines
    assert "WARNING denied req_" in line
