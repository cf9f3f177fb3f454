"""What clients ask: every route of the server with a request that it answers, and everything that would be fetched."""

MODEL = "tiny"
ASK = [{"role": "user", "content": "Hello"}]
SHORT = {"model": MODEL, "max_tokens": 4}

# The body of each POST, None for a GET.
ANSWERED = {
    "/v1/chat/completions": {**SHORT, "messages": ASK},
    "/v1/completions": {**SHORT, "prompt": "Hello"},
    "/v1/embeddings": {"model": MODEL, "input": "Hello"},
    "/v1/messages": {**SHORT, "messages": ASK},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": ASK},
    "/v1/responses": {"model": MODEL, "max_output_tokens": 4, "input": "Hello"},
    "/tokenize": {"messages": ASK},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/models": None,
    f"/v1/models/{MODEL}": None,
    "/health": None,
    "/ready": None,
    "/metrics": None,
    "/openapi.json": None,
    "/": None,
}
STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")

URL = "http://169.254.169.254/latest/meta-data"


def _said(path: str, *parts: object) -> tuple[str, dict[str, object]]:
    key = "input" if path == "/v1/responses" else "messages"
    return path, {"model": MODEL, "max_tokens": 4, key: [{"role": "user", "content": list(parts)}]}


# Asks for something that lies elsewhere; a server that fetched it would reach into its owner's network.
ELSEWHERE = {
    "an image": _said("/v1/chat/completions", {"type": "image_url", "image_url": {"url": URL}}),
    "audio": _said("/v1/chat/completions", {"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}}),
    "a video": _said("/v1/chat/completions", {"type": "video_url", "video_url": {"url": URL}}),
    "a file": _said("/v1/chat/completions", {"type": "file", "file": {"file_id": URL}}),
    "an image for messages": _said("/v1/messages", {"type": "image", "source": {"type": "url", "url": URL}}),
    "a document": _said("/v1/messages", {"type": "document", "source": {"type": "url", "url": URL}}),
    "an image for responses": _said("/v1/responses", {"type": "input_image", "image_url": URL}),
    "a file for responses": _said("/v1/responses", {"type": "input_file", "file_url": URL}),
    "a connector": (
        "/v1/responses",
        {"model": MODEL, "input": "x", "tools": [{"type": "mcp", "server_label": "x", "server_url": URL}]},
    ),
    "a search": ("/v1/messages", {**SHORT, "messages": ASK, "tools": [{"type": "web_search_20250305", "name": "s"}]}),
    "a stored response": ("/v1/responses", {"model": MODEL, "input": "x", "previous_response_id": "resp_1"}),
    "another model": ("/v1/chat/completions", {"model": URL, "messages": ASK}),
    "a call home": ("/v1/chat/completions", {**SHORT, "messages": ASK, "webhook": URL}),
}
