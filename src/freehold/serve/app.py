"""The whole server as one ASGI app: routes, what stands before them, and the page.

Not here: the socket and its deadlines (connection.py), how the engine starts and drains (the command line).
"""

import os

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold import __version__
from freehold.serve import anthropic, embeddings, metrics, models, openai_chat, openai_completions, responses
from freehold.serve.answers import Answers
from freehold.serve.auth import Guard
from freehold.serve.configuration import PAGE, PAGE_PATHS, ServeSettings
from freehold.serve.errors import REQUEST_ID_HEADER, answer_errors, request_id_of
from freehold.serve.limits import Limited
from freehold.serve.log import log_request
from freehold.serve.metrics import Meters, metered

DIALECTS = (openai_chat, openai_completions, embeddings, models, anthropic, responses)
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
DESCRIPTION = "One open-weights model on its owner's hardware, under the APIs of OpenAI and Anthropic."


def build_app(answers: Answers, *, guard: Guard | None = None, settings: ServeSettings | None = None) -> FastAPI:
    """Return the server of some answers. Without a guard it answers only this machine's own user, on loopback."""
    meters = Meters(answers.engine, answers.model_name)
    settings = settings or ServeSettings()
    outside_in = [
        Middleware(Numbered, meters=meters),
        Middleware((guard or Guard(None)).around),
        Middleware(Limited, limits=settings.limits),
    ]
    app = FastAPI(
        title="Freehold",
        description=DESCRIPTION,
        version=__version__,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        middleware=outside_in,
    )
    app.state.settings = settings
    answer_errors(app)
    measured = metered(answers, meters)
    for dialect in DIALECTS:
        app.include_router(dialect.routes(measured))
    app.include_router(metrics.routes(meters))
    page = Page(directory=PAGE, html=True)
    # Each file by its path: a page for every path would take what other routes refuse by their method.
    app.routes.extend(Route(path, page, methods=["GET"]) for path in PAGE_PATHS)
    return app


class Page(StaticFiles):
    """The chat page, which may load and ask nothing but what this server has."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Return a file with the headers that bind a browser."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(PAGE_HEADERS)
        return response


class Numbered:
    """An app whose every response says the request's id, and whose requests are counted and logged."""

    def __init__(self, app: ASGIApp, meters: Meters):
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, status = request_id_of(scope), 500

        async def send_numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_numbered)
        finally:
            self._meters.count_request(_route_of(scope), status)
            log_request(scope, route=_route_of(scope), status=status, model=self._meters.model_name)


def _route_of(scope: Scope) -> str:
    """Return the route that took a request, as it was declared."""
    route = scope.get("route")
    return getattr(route, "path", "") or "none"
