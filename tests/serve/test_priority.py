"""Who comes before whom: what clients may ask, and what a key permits."""

from collections.abc import Iterator

import httpx
import pytest

from freehold.serve.auth import Guard
from freehold.serve.database import Database
from freehold.serve.keys import Keys
from freehold.serve.terms import Terms
from serve.scripted import SCRIPTS, ScriptedAnswers
from serve.servers import running_server

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": {**CHAT, "max_tokens": 4},
    "/v1/responses": {"input": "Hello"},
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('keys') / 'keys.db'}")
    yield Keys(database)
    database.close()


def ask(keys: Keys | None, path: str, priority: int | None, scopes: str = "infer") -> tuple[httpx.Response, list[int]]:
    """Return the answer, and the engine's priority of what was asked, which has higher before lower."""
    answers = ScriptedAnswers(*SCRIPTS["text"])
    token = keys.add("a", Terms(scopes=frozenset(scopes.split())))[1] if keys else ""
    with running_server(answers, guard=Guard(keys)) as url:
        body = {"model": "scripted", "priority": priority, **BODIES[path]}
        answer = httpx.post(f"{url}{path}", json=body, headers={"x-api-key": token})
    return answer, [options.priority for options in answers.options]


@pytest.mark.parametrize("path", BODIES)
def test_anybody_may_let_others_go_first(keys, path):
    answer, asked = ask(keys, path, 3)
    assert (answer.status_code, asked) == (200, [-3])
    assert ask(keys, path, None)[1] == [0]


@pytest.mark.parametrize("path", BODIES)
def test_only_a_key_with_the_scope_goes_ahead_of_others(keys, path):
    refused, asked = ask(keys, path, -1)
    assert (refused.status_code, asked) == (403, [])
    assert "'priority'" in refused.json()["error"]["message"]
    answer, asked = ask(keys, path, -1, "infer priority")
    assert (answer.status_code, asked) == (200, [1])


def test_the_owner_of_the_machine_needs_no_scope():
    assert ask(None, "/v1/chat/completions", -1)[1] == [1]
