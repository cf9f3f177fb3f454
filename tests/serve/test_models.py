"""What is served, token ids, health, errors without a route, and the description of the API, over a real socket."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from freehold.engine.engine import Engine
from inputs import smollm2_gguf
from serve.servers import CONTEXT, MODEL_NAME, engine_of, openai_client, running_server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(smollm2_gguf(), aliases=("org/other",)) as address:
        yield address


def test_models_are_listed_by_all_their_names(url):
    with openai_client(url) as client:
        listed = {model.id: model for model in client.models.list()}
        assert list(listed) == [MODEL_NAME, "org/other"]
        assert listed["org/other"].model_extra["root"] == MODEL_NAME
        assert listed[MODEL_NAME].model_extra["max_model_len"] == CONTEXT
        assert client.models.retrieve("org/other") == listed["org/other"]
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("nowhere")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("text", ["Hello world", "Grüße € 🙂", "<|im_start|>user\n", ""])
def test_a_text_comes_back_from_its_ids(url, text):
    made = httpx.post(f"{url}/tokenize", json={"model": MODEL_NAME, "prompt": text}).json()
    assert made["tokens"] == engine_of(smollm2_gguf()).model.tokenizer.encode(text)
    assert (made["count"], made["max_model_len"]) == (len(made["tokens"]), CONTEXT)
    assert httpx.post(f"{url}/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": text}
    bare = httpx.post(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == engine_of(smollm2_gguf()).model.tokenizer.encode_rendered(text)


def test_a_client_without_a_tokenizer_learns_the_marks_and_the_template(url):
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert info["chat_template"] == engine_of(smollm2_gguf()).model.text.template.source


def test_a_conversation_has_the_ids_that_its_answer_is_charged_for(url):
    messages = [{"role": "user", "content": "Hello"}]
    count = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["count"]
    with openai_client(url) as client:
        usage = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=1).usage
    assert usage.prompt_tokens == count


def test_ids_of_no_token_are_refused(url):
    for tokens in ([-1], [10**6], [10**20], ["a"]):
        assert httpx.post(f"{url}/detokenize", json={"tokens": tokens}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/nowhere"), ("GET", "/v1/chat/completions"), ("POST", "/v1/models")]
)
def test_what_has_no_route_fails_in_the_shape_of_the_api(url, method, path):
    answer = httpx.request(method, f"{url}{path}")
    assert answer.status_code in (404, 405)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")


def test_errors_below_anthropics_path_have_its_shape(url):
    answer = httpx.get(f"{url}/v1/messages")
    assert answer.json()["type"] == "error"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_every_response_has_an_id_of_its_own(url):
    ids = [httpx.get(f"{url}{path}").headers["x-request-id"] for path in ("/health", "/health", "/metrics", "/x")]
    assert len(set(ids)) == 4


def test_the_api_is_described_without_a_page_that_loads_from_elsewhere(url):
    described = httpx.get(f"{url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"} <= set(described["paths"])
    assert "ChatCompletion" in described["components"]["schemas"]
    assert [httpx.get(f"{url}{path}").status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_a_server_is_ready_while_its_engine_takes_requests_and_says_so_when_it_drains():
    shared = engine_of(smollm2_gguf())
    engine = Engine(shared.model, shared.limits)
    with running_server(engine) as url:
        assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/ready")] == [200, 503]
        engine.start()
        assert httpx.get(f"{url}/ready").status_code == 200
        assert engine.drain(60)
        assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/ready")] == [200, 503]
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hello"}]}
        for stream in (False, True):
            refused = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": stream})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        engine.close()
