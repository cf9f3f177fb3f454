"""The process that tries schemas: one JSON request a line in, one JSON reply a line out.

It is started by its path and knows nothing of the rest of Freehold. Each request has a child of its own, which the
kernel ends where it leaves its budget of time and memory. What is tried is what takes long or much for a hostile
schema: making a grammar of it, and the first step of that. Bytes stand for the tokens, so this takes no model.
"""

import json
import os
import resource
from typing import Any, NoReturn

from llguidance import LLMatcher, LLParserLimits, LLTokenizer


def main() -> None:
    """Answer requests until the other side closes the pipe: {}, {"schema", "reason"} for one that cannot be used, or
    {"signal"} that ended the child."""
    vocabulary = LLTokenizer("byte")
    with os.fdopen(0, "rb") as requests, os.fdopen(1, "wb") as replies:
        for line in requests:
            replies.write(_in_a_child(line, vocabulary) + b"\n")
            replies.flush()


def _in_a_child(line: bytes, vocabulary: LLTokenizer) -> bytes:
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        _reply(json.loads(line), vocabulary, sending)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        reply = pipe.read()
    status = os.waitpid(child, 0)[1]
    signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return json.dumps({"signal": signal}).encode() if status else reply


def _reply(request: dict[str, Any], vocabulary: LLTokenizer, sending: int) -> NoReturn:
    """Write the reply to a pipe, and end this process, which is a child."""
    try:
        limits = LLParserLimits(**request["limits"])
        _give_up_resources(time_s=request["time_s"], memory_bytes=request["memory_bytes"])
        os.write(sending, json.dumps(_first_refused(request["schemas"], vocabulary, limits)).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _give_up_resources(*, time_s: int, memory_bytes: int) -> None:
    """From here on: no time or memory past the budget, no core file, and not one more file or socket."""
    resource.setrlimit(resource.RLIMIT_CPU, (time_s, time_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _first_refused(schemas: dict[str, str], vocabulary: LLTokenizer, limits: LLParserLimits) -> dict[str, str]:
    for name, schema in schemas.items():
        matcher = LLMatcher(vocabulary, f"start: %json {schema}", log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return {"schema": name, "reason": matcher.get_error()[:4000]}
    return {}


if __name__ == "__main__":
    main()
