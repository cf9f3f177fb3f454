"""An error says which field is wrong and carries an id; never a path, an address, a traceback, or what was sent.

Guards against CVE-2026-22778 (vLLM: an error held a heap address, the first half of a remote code execution) and
CVE-2026-54236 (the same in its second API, which the first fix forgot). Here every API answers through one function.

What is said is where and what kind: the names of fields, types and tools, which a client has to be told, and no text.
Names of fields are told as they came, types and tools only where they are names.
"""

import re

import httpx
import pytest

from freehold.errors import BadFile, BadTemplate, EngineFailed, FreeholdError, NotFound
from freehold.serve.database import DatabaseFailed
from museum.asked import ANSWERED, STREAMS
from serve.bodies import BODIES, changed, places
from serve.scripted import ScriptedAnswers, Stage, ended, said, text
from serve.servers import running_server

CANARY = "canary 7f3a"  # no name of anything, for it has a space
INSIDE = re.compile(r"canary|0x[0-9a-f]{4,}|Traceback|File \"|/src/|site-packages|/secret|object at", re.IGNORECASE)
FAULTS = {
    "a bug": RuntimeError(f"/secret/model.gguf: <Weight object at 0x7f12ab34cd56> {CANARY}"),
    "a key": KeyError(CANARY),
    "no memory": MemoryError(CANARY),
    "a file": BadFile(f"/secret/model.gguf is cut short {CANARY}"),
    "a name": NotFound(f"no such file: /secret/{CANARY}"),
    "a database": DatabaseFailed(f"postgresql://user:{CANARY}@host/secret"),
    "a template": BadTemplate(f"the chat template fails: {CANARY}", hint=CANARY),
    "anything of ours": FreeholdError(CANARY),
}


@pytest.fixture(scope="module")
def stage():
    stage = Stage()
    with running_server(stage) as stage.url:
        yield stage


def marked(value):
    """Return a body in which every text that says nothing is the canary."""
    if isinstance(value, dict):
        return {key: marked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [marked(inner) for inner in value]
    return CANARY if value == "x" else value


@pytest.mark.parametrize("path", BODIES)
def test_no_refusal_repeats_what_was_sent(stage, path):
    stage.playing = ScriptedAnswers(ended(text("x")))
    body = marked(BODIES[path])
    num_refused = 0
    with httpx.Client(base_url=stage.url) as client:
        for place in places(body):
            for wrong in (CANARY, [CANARY], {"role": CANARY}, {"content": CANARY}, 7):
                answer = client.post(path, json=changed(body, place, wrong))
                if answer.status_code >= 400:
                    num_refused += 1
                    assert not INSIDE.search(answer.text), (place, answer.text)
                    assert answer.headers["x-request-id"].startswith("req_")
    assert num_refused > 50


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("garbage", [f'{{"a": "{CANARY}', f'"{CANARY}"', f'["{CANARY}"]', f"{CANARY}"])
def test_no_refusal_repeats_what_is_no_request(stage, path, garbage):
    answer = httpx.post(f"{stage.url}{path}", content=garbage, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert not INSIDE.search(answer.text)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", BODIES)
def test_a_fault_is_told_by_an_id_and_explained_in_the_log_alone(stage, path, fault, caplog):
    stage.playing = ScriptedAnswers(FAULTS[fault])
    for extra in ({}, {"stream": True}):
        answer = httpx.post(f"{stage.url}{path}", json=BODIES[path] | extra)
        assert answer.status_code == 500
        assert not INSIDE.search(answer.text), answer.text
        assert answer.json()["error"]["message"]
        request_id = answer.headers["x-request-id"]
        told = [record.getMessage() for record in caplog.records if request_id in record.getMessage()]
        assert told
        assert CANARY in " ".join(told)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", BODIES)
def test_a_fault_in_the_middle_of_a_stream_is_told_no_further(stage, path, fault, caplog):
    stage.playing = ScriptedAnswers(said(text("Hel")), FAULTS[fault])
    answer = httpx.post(f"{stage.url}{path}", json=BODIES[path] | {"stream": True})
    assert answer.status_code == 200
    assert "Hel" in answer.text
    assert "its log says more" in answer.text
    assert not INSIDE.search(answer.text), answer.text
    assert any(answer.headers["x-request-id"] in record.getMessage() for record in caplog.records)


def test_a_failure_of_the_engine_says_that_it_was_one(stage, caplog):
    stage.playing = ScriptedAnswers(EngineFailed("the model computed no number"))
    answer = httpx.post(f"{stage.url}/v1/messages", json=BODIES["/v1/messages"])
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "api_error"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.json()["request_id"] in caplog.text


def test_a_wrong_method_is_told_which_are_right_in_the_shape_of_each_api(witnessed):
    for path, body in ANSWERED.items():
        wrong, right = ("POST", "GET") if body is None else ("GET", "POST")
        answer = witnessed.client.request(wrong, path)
        assert (answer.status_code, right in answer.headers["allow"]) == (405, True), path
        error = answer.json()["error"]
        assert error["message"] == "Method Not Allowed"
        assert error["type"] == "invalid_request_error"
        assert ("request_id" in answer.json()) == path.startswith("/v1/messages")


def test_a_path_that_leads_nowhere_is_not_repeated(witnessed):
    for path in (f"/{CANARY}", f"/v1/{CANARY}", f"/v1/models/{CANARY}", f"/../{CANARY}", f"/{CANARY}.js"):
        answer = witnessed.client.get(path)
        assert answer.status_code == 404
        assert not INSIDE.search(answer.text)


def test_a_server_without_asserts_tells_no_more(witnessed):
    for path in STREAMS:
        for body in ({"model": CANARY}, {**ANSWERED[path], "x": CANARY}, {**ANSWERED[path], "stream": CANARY}):
            answer = witnessed.ask(path, body)
            assert answer.status_code in (400, 404)
            assert not INSIDE.search(answer.text), answer.text
