"""A server listens, and never calls: whatever a request or a model names, it fetches nothing.

Guards against server-side request forgery (vLLM CVE-2025-6242, open by default again in vllm#57157; TGI CVE-2026-0599;
LMDeploy CVE-2026-33626) and against telemetry and updates that leave a network that nothing may leave.
"""

from museum.asked import ANSWERED, ELSEWHERE, STREAMS, URL
from museum.witness import REACHES_OUT

# Beside the listening socket of the server and the pipes of its child there is nothing to talk to.
LISTENING = "('127.0.0.1', 0)"


def test_nothing_is_looked_up_or_connected_to_from_the_start_to_the_last_answer(witnessed):
    for path, body in ANSWERED.items():
        assert witnessed.ask(path, body).status_code == 200, path
    for path in STREAMS:
        assert witnessed.ask(path, ANSWERED[path] | {"stream": True}).status_code == 200, path
    for what, (path, body) in ELSEWHERE.items():
        refused = witnessed.ask(path, body)
        assert refused.status_code in (400, 404), what
        assert URL not in refused.text, what
    acts = witnessed.acts()
    assert [act for act in acts if act.event in REACHES_OUT] == []
    assert [act.values[1] for act in acts if act.event == "socket.bind"] == [LISTENING]
