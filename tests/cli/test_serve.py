"""`freehold serve` as a process: it says where it listens, ends what runs before it stops, and refuses in a line."""

import signal
import socket
import subprocess

import httpx
import pytest

from cli.commands import TIMEOUT_S, call, spawn
from cli.folders import write_folder
from freehold.serve.database import Database
from freehold.serve.keys import Keys
from freehold.serve.terms import Terms
from models.tiny import NEMOTRON

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = NEMOTRON | {"vocab_size": 256, "max_position_embeddings": 4096}
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", config)


def serving(*arguments: object):
    return spawn("serve", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def address_of(process) -> str:
    """Return what a server prints when it listens."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_server_says_where_it_is_answers_and_stops_when_told(folder):
    with serving(folder, "--port", 0, "--memory", 2, "--alias", "gpt-4o", "--alias", "ours") as process:
        url = address_of(process)
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            assert client.get("/ready").status_code == 200
            assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "gpt-4o", "ours"]
            for name in ("tiny", "gpt-4o", "ours"):
                answer = client.post("/v1/chat/completions", json={"model": name, "max_tokens": 8} | HELLO)
                assert answer.json()["usage"]["completion_tokens"] == 8
            assert client.post("/v1/chat/completions", json={"model": "theirs"} | HELLO).status_code == 404
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "memory: weights" in errors
    assert "64 requests at once, up to 4,096 tokens each" in errors
    assert "Traceback" not in errors


def test_an_answer_that_runs_ends_before_the_server_does_and_a_new_one_is_refused(folder):
    with serving(folder, "--port", 0, "--memory", 2) as process:
        url = address_of(process)
        # Long enough for the requests within it, on a busy machine too.
        body = {"model": "tiny", "max_tokens": 2000, "stream": True} | HELLO
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            assert client.get("/ready").status_code == 200
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                while client.get("/ready").status_code == 200:
                    pass
                refused = client.post("/v1/chat/completions", json={"model": "tiny"} | HELLO)
                rest = list(lines)
        assert refused.status_code == 503
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"content"' in line for line in rest) > 100
        assert process.wait(TIMEOUT_S) == 0


def test_an_answer_that_does_not_end_in_time_is_cut_with_an_error_in_its_stream(folder):
    with serving(folder, "--port", 0, "--memory", 2, "--drain", 0) as process:
        url = address_of(process)
        body = {"model": "tiny", "max_tokens": 4000, "stream": True} | HELLO
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert any("the server stopped before the answer was done" in line for line in lines)
        assert process.wait(TIMEOUT_S) == 0


def test_beyond_this_machine_every_request_needs_a_key(folder, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.db'}"
    database = Database(url)
    _, token = Keys(database).add("test", Terms())
    database.close()
    with serving(folder, "--port", 0, "--memory", 2, "--host", "0.0.0.0", "--database", url) as process:
        port = address_of(process).rpartition(":")[2]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/").status_code == 200  # the page, which asks for the key
            assert client.get("/v1/models", headers={"authorization": f"Bearer {token}"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def test_a_port_that_is_taken_is_told_in_one_line_before_anything_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = call("serve", folder, "--port", taken.getsockname()[1])
    assert ended.code == 2
    assert "cannot listen on 127.0.0.1" in ended.err


def test_memory_that_holds_no_state_is_told_with_the_numbers(folder):
    ended = call("serve", folder, "--port", 0, "--memory", 0.5)
    assert ended.code == 2
    assert "0.5 GB of memory hold the weights" in ended.err
