"""POST /v1/embeddings: texts or ids in, one vector each out: the mean of its hidden states, of length 1."""

import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from freehold.serve.answers import Answers
from freehold.serve.asking import caller_of, check_model
from freehold.serve.openai_completions import read_prompt
from freehold.serve.schema import EmbeddingRequest, several
from freehold.serve.shapes import ERRORS, Embedding, Embeddings, EmbeddingUsage
from freehold.serve.sse import while_connected


def routes(answers: Answers) -> APIRouter:
    """Return the route of embeddings."""
    router = APIRouter(tags=["OpenAI"])
    responses: dict[int | str, dict[str, Any]] = {200: {"model": Embeddings}, **ERRORS}

    @router.post("/v1/embeddings", responses=responses, response_class=JSONResponse)
    async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
        check_model(body.model, request, answers)
        return JSONResponse(await while_connected(request, embeddings_of(answers, request, body)))

    return router


async def embeddings_of(answers: Answers, request: Request, body: EmbeddingRequest) -> Embeddings:
    """Return a vector for each text, all computed together."""
    caller = caller_of(request)
    prompts = [await read_prompt(answers, given) for given in several(body.input)]
    vectors = await answers.embed(prompts, caller)
    num_tokens = sum(len(prompt.ids) for prompt in prompts)
    return Embeddings(
        object="list",
        data=[
            Embedding(object="embedding", index=index, embedding=_written(vector, body.encoding_format))
            for index, vector in enumerate(vectors)
        ],
        model=body.model,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def _written(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    """Return a vector in either form; both hold the same float32 numbers."""
    layout = f"<{len(vector)}f"
    packed = struct.pack(layout, *vector)
    return base64.b64encode(packed).decode("ascii") if encoding == "base64" else list(struct.unpack(layout, packed))
