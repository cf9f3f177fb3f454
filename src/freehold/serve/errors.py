"""How a request fails: one status and one line, in the shape of the API that was asked.

What a client reads never holds a path, an address, a prompt or a traceback; the request's id leads to the log instead.
"""

import logging
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from freehold.errors import (
    BadRequest,
    BadTemplate,
    Draining,
    EngineFailed,
    FreeholdError,
    Overloaded,
    TimedOut,
    TooLong,
)

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
ANTHROPIC_PATH = "/v1/messages"
CLIENT_GONE = 499  # nobody reads it; for the metrics
SEE_LOG = "its log says more under the request's id"
# How pydantic says that a body is missing, or is no object.
NO_OBJECT = {"missing", "model_type", "model_attributes_type", "dict_type"}

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded", 503: "unavailable", 504: "timeout"}


class Refused(BadRequest):
    """A request that is refused for one of its parameters, or with a status of its own."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a client is told. retry_after_s: when it is worth asking again. headers: further ones."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: Exception) -> Failure:
    """Return what a client is told of an error; of what is nobody's request's fault only that it happened."""
    match error:
        case Refused():
            return Failure(status=error.status, message=error.message, param=error.param, code=error.code)
        case Overloaded():
            return Failure(
                status=429, message=_line(error), code=CODES[429], retry_after_s=getattr(error, "retry_after_s", 1)
            )
        case Draining():
            return Failure(status=503, message=_line(error), code=CODES[503], retry_after_s=5)
        case TimedOut():
            return Failure(status=504, message=_line(error), code=CODES[504])
        case BadRequest():
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            return Failure(status=400, message=_line(error), code=code)
        case BadTemplate():
            return Failure(status=500, message=f"this model's chat template fails at these messages; {SEE_LOG}")
        case EngineFailed():
            return Failure(status=500, message=_line(error))
        case RequestValidationError():
            return _failure_of_validation(error)
        case HTTPException():
            code = CODES.get(error.status_code)
            return Failure(
                status=error.status_code, message=str(error.detail), code=code, headers=dict(error.headers or {})
            )
    return Failure(status=500, message=f"the server failed at this request; {SEE_LOG}")


def error_body(path: str, failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the JSON of a failure: Anthropic's under its path, OpenAI's elsewhere."""
    message, param = _printable(failure.message), _printable(failure.param)
    fallback = "invalid_request_error" if failure.status < 500 else None
    if path.startswith(ANTHROPIC_PATH):
        kind = ANTHROPIC_TYPES.get(failure.status) or fallback or "api_error"
        error = {"type": kind, "message": message}
        return {"type": "error", "error": error, "request_id": request_id}
    kind = OPENAI_TYPES.get(failure.status) or fallback or "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": failure.code}}


def _printable(text: str | None) -> str | None:
    """Return a text without halves of characters, which no answer could hold: keys of a body may have them."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def error_response(scope: MutableMapping[str, Any], failure: Failure) -> JSONResponse:
    """Return a failure as the response to a request. Mutates: scope, which the log of requests reads it from."""
    request_id = request_id_of(scope)
    scope["state"]["failure"] = failure
    headers = {**failure.headers, REQUEST_ID_HEADER: request_id}
    if failure.retry_after_s is not None:
        headers["retry-after"] = str(failure.retry_after_s)
    return JSONResponse(error_body(scope["path"], failure, request_id), failure.status, headers)


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """Return the id of a request. Mutates: scope, which gets one where it has none."""
    state = scope.setdefault("state", {})
    request_id: str = state.setdefault("request_id", f"req_{uuid.uuid4().hex}")
    return request_id


def answer_errors(app: FastAPI) -> None:
    """Have every error of an app answered in the shape of the API. Mutates: app."""

    async def respond(request: Request, error: Exception) -> Response:
        failure = failure_of(error)
        if failure.status == 500:
            logger.error("request %s failed: %r", request_id_of(request.scope), error)
        return error_response(request.scope, failure)

    async def respond_to_nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    # What nobody raised on purpose is answered like the rest, and raised again, so that it is logged as a whole.
    for kind in (FreeholdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(ClientDisconnect, respond_to_nobody)


def _line(error: FreeholdError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _failure_of_validation(error: RequestValidationError) -> Failure:
    """Return the complaint that goes deepest, without the input: of a union, that is the form that was meant."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return Failure(status=400, message="the body is not JSON")
    if len(errors[0]["loc"]) == 1 and errors[0]["type"] in NO_OBJECT:
        return Failure(status=400, message="the body has to be a JSON object, sent as application/json")
    places = [_place(each["loc"][1:], error.body) for each in errors]
    deepest = max(places, key=len)
    told = [each for each, place in zip(errors, places, strict=True) if place == deepest]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in deepest).lstrip(".")[:100]
    unknown = [each for each in told if each["type"] == "extra_forbidden"]
    if unknown:
        return Failure(status=400, message=f"{param} is not supported", param=param, code="unsupported_parameter")
    messages = dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in told)
    return Failure(status=400, message=f"{param or 'the body'}: {' or '.join(messages)}", param=param or None)


def _place(location: Sequence[str | int], body: Any) -> tuple[str | int, ...]:
    """Return a location without the names of a union's members, which stand between the keys and places of the body."""
    place: list[str | int] = []
    for index, step in enumerate(location):
        is_place = isinstance(step, int) and isinstance(body, list) and step < len(body)
        if is_place or (isinstance(body, Mapping) and step in body):
            body = body[step]
            place.append(step)
        elif isinstance(step, str) and isinstance(body, Mapping) and index == len(location) - 1:
            place.append(step)  # what is missing
    return tuple(place)
