"""How much a request may be, measured before anything reads it: headers, body, time, and the shape of its JSON.

A body is taken in whole, up to its limit, and then handed on: the app behind never meets a slow or an endless one. The
shape is counted with few passes over the bytes, each in C, and never by recursion.
"""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.serve.errors import CLIENT_GONE, CODES, Failure, error_response

BRACKETS = b"[]{}"
NOT_BRACKETS = bytes(set(range(256)) - set(BRACKETS))
AMBIGUOUS = "ambiguous_length"
BUSY = Failure(
    status=429,
    message="the requests that run have as large bodies as this server holds at once; try again later",
    code=CODES[429],
    retry_after_s=1,
)
GONE = Failure(status=CLIENT_GONE, message="the client is gone")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may have at most, and with all_bodies_bytes what all that run may have together.

    body_s: from its headers to the end of its body. json_values: numbers, texts, names and so on, containers included.
    header_bytes: names and values together; target_bytes: path and query.
    """

    body_bytes: int = 4 * 2**20
    all_bodies_bytes: int = 256 * 2**20
    body_s: float = 30.0
    json_depth: int = 64
    json_values: int = 2**18
    num_headers: int = 100
    header_bytes: int = 16 * 2**10
    target_bytes: int = 4 * 2**10


class Limited:
    """An app that meets only requests within limits; others are refused with 400, 408, 413, 414, 429 or 431."""

    def __init__(self, app: ASGIApp, limits: Limits | None = None):
        self._app = app
        self._limits = limits or Limits()
        self._held_bytes = 0  # bodies of all requests that have not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = self._refuse_head(scope) or await self._read(receive)
        if isinstance(body, Failure):
            await _refuse(body, scope, receive, send)
            return
        try:
            if failure := refuse_shape(body, self._limits):
                await _refuse(failure, scope, receive, send)
            else:
                await self._app(scope, _replayed(body, receive), send)
        finally:
            self._held_bytes -= len(body)

    def _refuse_head(self, scope: Scope) -> Failure | None:
        """Return what is too large in a request's head, the length of the body that it announces included."""
        limits, headers = self._limits, scope["headers"]
        if len(scope["raw_path"]) + len(scope["query_string"]) > limits.target_bytes:
            return Failure(status=414, message=f"path and query have more than {limits.target_bytes} bytes")
        if len(headers) > limits.num_headers:
            return Failure(status=431, message=f"the request has more than {limits.num_headers} headers")
        if sum(len(name) + len(value) for name, value in headers) > limits.header_bytes:
            return Failure(status=431, message=f"the headers have more than {limits.header_bytes} bytes")
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:  # a proxy before us may have read it otherwise
            return Failure(status=400, message="Content-Length and Transfer-Encoding contradict", code=AMBIGUOUS)
        lengths = [value for name, value in headers if name == b"content-length"]
        if any(not value.isdigit() or len(value) > 18 or int(value) > limits.body_bytes for value in lengths):
            return self._too_large()
        return None

    async def _read(self, receive: Receive) -> bytes | Failure:
        """Return a body, which counts as held from then on, or why it is not taken."""
        body, is_whole = bytearray(), False
        try:
            async with asyncio.timeout(self._limits.body_s):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return GONE
                    piece = message.get("body", b"")
                    body += piece
                    self._held_bytes += len(piece)
                    if len(body) > self._limits.body_bytes:
                        return self._too_large()
                    if self._held_bytes > self._limits.all_bodies_bytes:
                        return BUSY
                    is_whole = not message.get("more_body", False)
                return bytes(body)
        except TimeoutError:
            return Failure(status=408, message=f"the body was not there within {self._limits.body_s:g} s")
        finally:
            if not is_whole:
                self._held_bytes -= len(body)

    def _too_large(self) -> Failure:
        return Failure(status=413, message=f"the body has more than {self._limits.body_bytes} bytes")


def refuse_shape(body: bytes, limits: Limits) -> Failure | None:
    """Return why a body is not to be parsed: too deep, too many values, or bytes that no JSON in UTF-8 has.

    Whether it is JSON at all is for the parser to say: what is counted here is right for all JSON, and some number for
    anything else. A zero byte is refused since parsers take UTF-16 and UTF-32 too, where quotes are not what they seem.
    """
    if b"\0" in body:
        return Failure(status=400, message="the body has a zero byte, so it is no JSON in UTF-8")
    too_many = Failure(status=400, message=f"the body has more than {limits.json_values} values")
    # Escapes away, first the escaped backslashes: what quotes remain begin and end texts.
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    if bare.count(b'"') > 2 * limits.json_values:
        return too_many
    outside = b"".join(bare.split(b'"')[::2])
    num_opened = outside.count(b"[") + outside.count(b"{")
    if num_opened + outside.count(b",") + outside.count(b":") > limits.json_values:
        return too_many
    if _depth(outside, limits.json_depth) > limits.json_depth:
        return Failure(status=400, message=f"the body is nested more than {limits.json_depth} deep")
    return None


async def _refuse(failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(scope, failure)
    if failure.status == 408 or failure.code == AMBIGUOUS:  # what follows may be no request
        response.headers["connection"] = "close"
    await response(scope, receive, send)


def _depth(outside: bytes, limit: int) -> int:
    """Return how deep brackets are nested, or the first depth above a limit; after as many closed as opened, 0."""
    depth = deepest = 0
    for bracket in outside.translate(None, NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > limit or depth < 0:
            break
    return deepest


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the body in one piece, and then what else the server has to say."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return rest.pop() if rest else await receive()

    return replay
