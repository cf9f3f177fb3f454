"""Whatever is asked, within what /openapi.json says of requests or without, is answered as it says of answers."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import event, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cli.folders import write_folder
from freehold.serve.app import build_app
from models.tiny import NEMOTRON
from serve.scripted import ScriptedAnswers
from serve.servers import MODEL_NAME, running_server

OPERATIONS = [
    (method.upper(), path)
    for path, operations in build_app(ScriptedAnswers()).openapi()["paths"].items()
    for method in operations
]
VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    (*operation, mode)
    for operation in OPERATIONS
    for mode in (VALID, INVALID)
    if mode is VALID or operation[0] == "POST"  # what a GET has is only its path
]
CHECKS = (
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
# Of each case. The profile's number is for properties that cost no request.
NUM_EXAMPLES = settings().max_examples // 5
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
NEEDED = {"model", "messages", "prompt", "input", "max_tokens", "tokens"}
LONGEST = 4  # tokens of an answer
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[Any]:
    folder = write_folder(tmp_path_factory.mktemp("models") / "tiny", NEMOTRON | {"vocab_size": 256})
    with running_server(folder) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def brief(body: dict[str, Any], path: str, kept: set[str]) -> dict[str, Any]:
    """Return a body for the model that is served and for a short answer, with its needed fields and those to be kept.

    With all fields at once, which any body may have, nearly every one contradicts another.
    """
    body = {name: value for name, value in body.items() if name in NEEDED | kept}
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    has_own = body.get("max_completion_tokens") is not None  # which max_tokens may not contradict
    short = {name: min(body.get(name) or LONGEST, LONGEST)} if path in GENERATING and not has_own else {}
    return body | short | ({"model": MODEL_NAME} if body.get("model") is not None else {})


@pytest.mark.parametrize(
    ("method", "path", "mode"), CASES, ids=[f"{mode.value} {at} {path}" for at, path, mode in CASES]
)
@settings(max_examples=NUM_EXAMPLES)
@given(data=st.data())
def test_every_answer_is_as_documented(api, method, path, mode, data):
    case = data.draw(api[path][method].as_strategy(generation_mode=mode))
    if mode is VALID and method == "POST":  # what is refused needs no help, and could be healed by it
        kept = data.draw(st.sets(st.sampled_from(sorted(case.body) or ["model"]), max_size=3))
        case.body = brief(case.body, path, kept)
        if "messages" in case.body and data.draw(st.booleans()):  # few random conversations are in an order that is one
            case.body["messages"] = [{"role": "user", "content": "Hello"}]
    response = case.call_and_validate(checks=list(CHECKS), timeout=TIMEOUT_S)
    event(f"status {response.status_code}")  # for --hypothesis-show-statistics
