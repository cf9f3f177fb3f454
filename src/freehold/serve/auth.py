"""Who may ask what: every request passes here first, and what is not allowed is refused.

With keys, each route but OPEN_PATHS needs one. Without keys, only this machine may ask: the server's end of the
connection is a loopback address, the Host header names one (that of a foreign page whose name was made to resolve to
127.0.0.1 does not), and a browser asks for pages of our own. Not here: what a key is (keys.py), tokens (quota.py).
"""

import ipaddress
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.errors import DatabaseFailed
from freehold.serve.caller import Caller
from freehold.serve.configuration import PAGE_PATHS
from freehold.serve.errors import CODES, Failure, error_response, request_id_of
from freehold.serve.rates import Rates
from freehold.serve.terms import TOKEN, Key

if TYPE_CHECKING:  # without keys no database is opened, and half a second of imports saved
    from freehold.serve.keys import Keys

logger = logging.getLogger(__name__)

# Answer anybody: whether the server lives, and the page, which asks for the key itself and knows nothing without it.
OPEN_PATHS = frozenset({"/health", *PAGE_PATHS})
# Routes that ask for another scope than "infer", with all below them.
SCOPES_OF_PATHS = {"/metrics": "metrics", "/admin": "admin"}
HOST = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
WEBSOCKET_REFUSED = 1008
MAX_LOGGED = 200


class Guard:
    """Lets requests pass that may. keys: None where no key is needed, which is only ever so on loopback."""

    def __init__(self, keys: "Keys | None"):
        self._keys = keys
        self._rates = Rates()

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return an app behind this guard; `add_middleware` takes this method."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await app(scope, receive, send)
            elif scope["type"] == "http":
                await self._answer(app, scope, receive, send)
            else:  # no route of ours is a websocket
                await send({"type": "websocket.close", "code": WEBSOCKET_REFUSED})

        return guarded

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys is None:
            passed = _refuse_strangers(scope)
            key = None
        elif _is_open(scope):
            passed, key = Caller(scopes=frozenset()), None
        else:
            passed, key = await self._check_key(self._keys, scope)
        if isinstance(passed, Failure):
            await _deny(passed, key, scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = replace(passed, request_id=request_id_of(scope))
        try:
            await app(scope, receive, send)
        finally:
            if key is not None:
                self._rates.leave(key)

    async def _check_key(self, keys: "Keys", scope: Scope) -> tuple[Caller | Failure, Key | None]:
        """Return the caller, whose request counts as running from now on, or the refusal, and the key if one fits."""
        token = _token(scope)
        if token is None:
            hint = "send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            return _unknown(f"an API key is needed ({hint})"), None
        try:
            key = await keys.database.call(keys.find, token)
        except DatabaseFailed as error:
            logger.error("no key could be checked: %s", error.message)
            return Failure(status=503, message="keys cannot be checked at the moment", code=CODES[503]), None
        if key is None:
            return _unknown("this is no API key of this server"), None
        state = key.state(datetime.now(UTC))
        if state != "active":  # said only to who has the whole secret
            return _unknown(f"this API key {'has expired' if state == 'expired' else 'was revoked'}"), key
        wanted = _scope_of(scope["path"])
        if wanted not in key.terms.scopes:
            return _forbidden(f"this API key lacks the scope {wanted!r}"), key
        if failure := self._rates.enter(key):
            return failure, key
        return Caller(key_id=key.id, weight=key.terms.weight, scopes=key.terms.scopes), key


def is_loopback(host: str) -> bool:
    """Return whether a host, a name or an address, is this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _refuse_strangers(scope: Scope) -> Caller | Failure:
    """Return the caller of a server without keys, or why it is not one on this machine asking for itself."""
    server = scope.get("server")
    if not server or not is_loopback(server[0]):
        return _forbidden("without API keys this server answers on loopback only")
    hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
    match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None or not is_loopback(match[1]):
        return _forbidden("without API keys this server answers only to a Host that is localhost or a loopback address")
    own = {f"http://{hosts[0]}".lower(), f"https://{hosts[0]}".lower()}
    if any(origin.lower() not in own for origin in origins) or _comes_from_another_site(scope):
        return _forbidden("without API keys this server answers no page of another origin")
    return Caller()


def _comes_from_another_site(scope: Scope) -> bool:
    """Return whether a browser says that a page elsewhere asks; to be led here by a link is fine."""
    sites = _headers(scope, b"sec-fetch-site")
    is_visit = scope["method"] == "GET" and _headers(scope, b"sec-fetch-dest") == ["document"]
    return any(site in ("cross-site", "same-site") for site in sites) and not is_visit


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD")


def _scope_of(path: str) -> str:
    """Return the scope that a path needs."""
    return next(
        (wanted for prefix, wanted in SCOPES_OF_PATHS.items() if path == prefix or path.startswith(f"{prefix}/")),
        "infer",
    )


def _token(scope: Scope) -> str | None:
    """Return the key that was sent, None where there is none, or where there are several that differ."""
    found = set(_headers(scope, b"x-api-key"))
    for value in _headers(scope, b"authorization"):
        scheme, _, rest = value.partition(" ")
        found.add(rest.strip() if scheme.lower() == "bearer" else "")
    return found.pop() if len(found) == 1 else None


def _headers(scope: Scope, name: bytes) -> Sequence[str]:
    return [value.decode("latin-1").strip() for header, value in scope["headers"] if header == name]


def _unknown(message: str) -> Failure:
    return Failure(status=401, message=message, code=CODES[401])


def _forbidden(message: str) -> Failure:
    return Failure(status=403, message=message, code="forbidden")


async def _deny(failure: Failure, key: Key | None, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with a refusal, and log it with the id of the key, which is no secret, and never the key."""
    match = TOKEN.fullmatch(_token(scope) or "")
    fields = {
        "request": request_id_of(scope),
        "status": failure.status,
        "error": failure.message,
        "method": scope["method"],
        "path": scope["path"][:MAX_LOGGED],
        "client": (scope.get("client") or ("unknown",))[0],
        "key": key.id if key else f"{match[1]} (not proven)" if match else "none",
    }
    line = "denied %(request)s: %(status)d %(error)s; %(method)s %(path)r by %(client)s, key %(key)s"
    logger.warning(line, fields, extra={"fields": fields})
    response = error_response(scope, failure)
    if failure.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)
