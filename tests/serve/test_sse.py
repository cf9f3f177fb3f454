"""Streams over real sockets: what keeps them open, and where they end."""

import httpx
import pytest

from freehold.serve.sse import KEEP_ALIVE
from serve.scripted import ScriptedAnswers, ended, said, text
from serve.servers import running_server

BODY = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
PATH = "/v1/chat/completions"


def test_a_stream_in_which_nothing_happens_is_kept_open_by_comments():
    answers = ScriptedAnswers(None)
    with running_server(answers, keep_alive_s=0.02) as url, httpx.stream("POST", f"{url}{PATH}", json=BODY) as answer:
        lines = answer.iter_raw()
        assert [next(lines) for _ in range(3)] == [KEEP_ALIVE] * 3
        assert answer.headers["content-type"].startswith("text/event-stream")
    assert answers.closed.wait(60)


def test_a_stream_is_whole_events_up_to_done():
    with running_server(ScriptedAnswers(said(text("Hel")), ended(text("lo")))) as url:
        received = httpx.post(f"{url}{PATH}", json=BODY).text
    assert all(event.startswith(("data: ", ": ")) for event in received.rstrip("\n").split("\n\n"))
    assert received.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}], ids=["none", "text"])
def test_a_body_that_is_not_sent_as_json_is_refused_with_what_to_do(headers):
    with running_server(ScriptedAnswers()) as url:
        refused = httpx.post(f"{url}{PATH}", content=b"{}", headers=headers)
    assert refused.status_code == 400
    assert "application/json" in refused.json()["error"]["message"]
