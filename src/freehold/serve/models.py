"""What is served and how it is: /v1/models, /tokenize, /detokenize, /tokenizer_info, /health and /ready."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from freehold.serve.answers import Answers, Chat
from freehold.serve.asking import check_model, names_of, settings_of
from freehold.serve.schema import DetokenizeRequest, TokenizeRequest
from freehold.serve.shapes import ERRORS, Detokenized, ModelCard, ModelList, Status, TokenizerInfo, Tokens


def routes(answers: Answers) -> APIRouter:
    """Return the routes about the model and the server."""
    router = APIRouter()
    _add_models(router, answers)
    _add_tokens(router, answers)
    _add_status(router, answers)
    return router


def _add_models(router: APIRouter, answers: Answers) -> None:
    created = int(time.time())

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=created,
            owned_by="freehold",
            root=answers.model_name,
            max_model_len=answers.longest,
        )

    @router.get("/v1/models", responses=_with(ModelList), response_class=JSONResponse, tags=["OpenAI"])
    async def list_models(request: Request) -> Response:
        cards = [card(name) for name in names_of(answers, settings_of(request))]
        return JSONResponse(ModelList(object="list", data=cards))

    @router.get("/v1/models/{name:path}", responses=_with(ModelCard), response_class=JSONResponse, tags=["OpenAI"])
    async def retrieve_model(request: Request, name: str) -> Response:
        check_model(name, request, answers)
        return JSONResponse(card(name))


def _add_tokens(router: APIRouter, answers: Answers) -> None:
    @router.post("/tokenize", responses=_with(Tokens), response_class=JSONResponse)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        if body.model is not None:
            check_model(body.model, request, answers)
        ids = await _ids_of(answers, body)
        return JSONResponse(Tokens(tokens=ids, count=len(ids), max_model_len=answers.longest))

    @router.post("/detokenize", responses=_with(Detokenized), response_class=JSONResponse)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        if body.model is not None:
            check_model(body.model, request, answers)
        return JSONResponse(Detokenized(prompt=await asyncio.to_thread(answers.text_of, body.tokens)))

    @router.get("/tokenizer_info", responses=_with(TokenizerInfo), response_class=JSONResponse)
    async def tokenizer_info() -> Response:
        """What a client with no tokenizer of its own needs beside /tokenize and /detokenize."""
        text, tokenizer = answers.engine.model.text, answers.engine.model.tokenizer

        def mark(token: int | None) -> str | None:
            return None if token is None else tokenizer.token_text(token)

        template = text.template.source if text.template else None
        info = TokenizerInfo(bos_token=mark(tokenizer.bos_id), eos_token=mark(tokenizer.eos_id), chat_template=template)
        return JSONResponse(info)


async def _ids_of(answers: Answers, body: TokenizeRequest) -> list[int]:
    if body.prompt is None:
        messages = [message.for_template() for message in body.messages or ()]
        tools = [tool.given for tool in body.tools or ()]
        chat = Chat(messages=messages, tools=tools, switches=body.chat_template_kwargs or {})
        return list((await answers.read_chat(chat)).ids)
    if body.add_special_tokens:
        return list((await answers.read_text(body.prompt)).ids)
    return await asyncio.to_thread(answers.engine.model.tokenizer.encode_rendered, body.prompt)


def _add_status(router: APIRouter, answers: Answers) -> None:
    responses: dict[int | str, dict[str, Any]] = {200: {"model": Status}, 503: {"model": Status}}

    @router.get("/health", responses=responses, response_class=JSONResponse)
    async def health() -> Response:
        """Whether this process can answer: not once its engine has broken, which only a new start mends."""
        return _status("failed", 503) if answers.engine.has_failed else _status("ok", 200)

    @router.get("/ready", responses=responses, response_class=JSONResponse)
    async def ready() -> Response:
        """Whether a request would be taken in now: not before the engine runs, and not while the server drains."""
        return _status("ready", 200) if answers.engine.is_accepting else _status("not ready", 503)


def _status(text: str, status: int) -> JSONResponse:
    return JSONResponse(Status(status=text), status)


def _with(shape: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": shape}, **ERRORS}
