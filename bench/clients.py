"""Clients of a server under load: each asks for one thing in one dialect, and stays, leaves, stalls or vanishes.

Belongs here: what is asked, how a client behaves, and whether what came back is right. Not here: when clients come, and
the server (load.py).
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

PATIENCE_S = 300.0  # of who stays; a longer wait is a failure
REFUSALS = (429, 503)  # designed ones, and only with Retry-After
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset
# How a stream that went well ends, by its route.
ENDS = {
    "/v1/chat/completions": (b"data: [DONE]",),
    "/v1/completions": (b"data: [DONE]",),
    "/v1/messages": (b'"type":"message_stop"',),
    "/v1/responses": (b'"type":"response.completed"', b'"type":"response.incomplete"'),
}
LAST_CHUNK = b"0\r\n\r\n"
ERROR = b'"error":{'  # in a string of the model's the quotes would be escaped

Fate = Literal["stays", "leaves", "stalls", "vanishes"]
# A third leaves midway; few hold their connection and take nothing, or are cut off.
FATES: Mapping[Fate, float] = {"stays": 0.55, "leaves": 0.33, "stalls": 0.05, "vanishes": 0.07}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request, and how its client behaves.

    num_events, patience_s: who leaves or vanishes does so after that much of a stream, and after that time in any case;
    who stalls keeps the connection for that time.
    """

    route: str
    body: Mapping[str, Any]
    fate: Fate
    num_events: int
    patience_s: float

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a request: done, refused by design, left, stalled, vanished, or failed, and then why."""

    ask: Ask
    kind: Literal["done", "refused", "left", "stalled", "vanished", "failed"]
    why: str = ""
    first_s: float | None = None
    total_s: float = 0.0


class Asking:
    """Makes requests by a seed: all dialects, streamed and whole, greedy and drawn, with prompts out of a text."""

    def __init__(self, text: str, *, model: str, seed: int, prompt_chars: int, answer_tokens: int):
        self._text, self._model, self._choose = text, model, Random(seed)
        self._prompt_chars, self._answer_tokens = prompt_chars, answer_tokens

    def next(self) -> Ask:
        """Return the next request."""
        choose = self._choose
        fate = choose.choices(list(FATES), list(FATES.values()))[0]
        route, body = choose.choice([self._chat, self._completion, self._messages, self._responses, self._embedding])()
        if route in ENDS:
            body |= {"temperature": choose.choice([0.0, 0.8]), "stream": choose.random() < 0.6}
        patience_s = choose.uniform(1.0, 20.0) if fate == "stalls" else choose.expovariate(1 / 5.0)
        return Ask(
            route=route,
            body={"model": self._model, **body},
            fate=fate,
            num_events=choose.randint(1, self._answer_tokens),
            patience_s=patience_s,
        )

    def _chat(self) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"messages": self._messages_of_text(), "max_tokens": self._num_tokens()}
        if self._choose.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 5}
        if self._choose.random() < 0.2:
            body |= {"n": 2, "frequency_penalty": 0.5}
        return "/v1/chat/completions", body

    def _completion(self) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"prompt": self._excerpt(), "max_tokens": self._num_tokens()}
        if self._choose.random() < 0.2:
            body |= {"echo": True, "logprobs": 2}
        return "/v1/completions", body

    def _messages(self) -> tuple[str, dict[str, Any]]:
        return "/v1/messages", {"messages": self._messages_of_text(), "max_tokens": self._num_tokens()}

    def _responses(self) -> tuple[str, dict[str, Any]]:
        return "/v1/responses", {"input": self._excerpt(), "max_output_tokens": self._num_tokens()}

    def _embedding(self) -> tuple[str, dict[str, Any]]:
        return "/v1/embeddings", {"input": [self._excerpt() for _ in range(self._choose.randint(1, 3))]}

    def _messages_of_text(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._excerpt()}]

    def _excerpt(self) -> str:
        """Return a piece of the text; most are short, some have up to `prompt_chars`."""
        length = max(1, int(self._prompt_chars * self._choose.random() ** 3))
        begin = self._choose.randrange(max(1, len(self._text) - length))
        return self._text[begin : begin + length]

    def _num_tokens(self) -> int:
        return self._choose.randint(1, self._answer_tokens)


async def meet(port: int, ask: Ask) -> Outcome:
    """Return what comes of a request to 127.0.0.1."""
    loop, start_s = asyncio.get_running_loop(), time.perf_counter()
    with socket.socket() as client:
        client.setblocking(False)
        if ask.fate == "stalls":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # so that little fits in between
        try:
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, _request(ask))
            if ask.fate == "stalls":
                await asyncio.sleep(ask.patience_s)
                return Outcome(ask=ask, kind="stalled")
            received, first_s, is_over = await _receive(client, ask)
        except OSError as error:
            return Outcome(ask=ask, kind="failed", why=f"the connection: {error}")
        if not is_over and ask.fate == "vanishes":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    total_s = time.perf_counter() - start_s
    if not is_over and ask.fate == "stays":
        return Outcome(ask=ask, kind="failed", why=f"no end after {total_s:.0f} s", total_s=total_s)
    if not is_over:
        kind: Literal["vanished", "left"] = "vanished" if ask.fate == "vanishes" else "left"
        return Outcome(ask=ask, kind=kind, total_s=total_s)
    refused, why = _judge(ask, received)
    return Outcome(
        ask=ask,
        kind="failed" if why else "refused" if refused else "done",
        why=why,
        first_s=None if first_s is None else first_s - start_s,
        total_s=total_s,
    )


def _request(ask: Ask) -> bytes:
    body = json.dumps(ask.body).encode()
    head = f"POST {ask.route} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _receive(client: socket.socket, ask: Ask) -> tuple[bytes, float | None, bool]:
    """Return what came, when its first part did, and whether it came to its end before the client had enough."""
    loop, received, first_s = asyncio.get_running_loop(), bytearray(), None
    try:
        async with asyncio.timeout(PATIENCE_S if ask.fate == "stays" else ask.patience_s):
            while piece := await loop.sock_recv(client, 65536):
                first_s = first_s or time.perf_counter()
                received += piece
                if ask.fate != "stays" and ask.streams and received.count(b"data: ") > ask.num_events:
                    return bytes(received), first_s, False
    except TimeoutError:
        return bytes(received), first_s, False
    return bytes(received), first_s, True


def _judge(ask: Ask, received: bytes) -> tuple[bool, str]:
    """Return whether a response is a refusal by design, and what is wrong with it, nothing where it is right."""
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
    if status in REFUSALS and b"\r\nretry-after:" in head.lower():
        return True, ""
    if status != 200:
        return False, f"status {status}: {body[:200]!r}"
    if not ask.streams:
        try:
            json.loads(body)
        except ValueError:
            return False, f"no JSON: {body[:200]!r}"
        return False, ""
    if ERROR in body:
        return False, f"an error in the stream: {body[body.index(ERROR) :][:200]!r}"
    if not body.endswith(LAST_CHUNK) or not any(end in body for end in ENDS[ask.route]):
        return False, f"the stream broke off: {body[-200:]!r}"
    return False, ""
