"""The child process that renders chat templates: one JSON request a line in, one JSON reply a line out.

Only this file runs the code of a template. It is started by its path, knows nothing of the rest of Freehold, and gives
up memory and files before it reads its first request. Templates are written for Jinja2; where minijinja parts from it,
the filters and tests here follow Jinja2. One difference stays: outside of tojson, floats below 1e-4 or from 1e16 on are
written without an exponent.
"""

import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from io import BufferedWriter
from typing import Any

from minijinja import Environment, TemplateError

# Only a trainer's mask wants to know what lies between these tags. `with` has their scope and their whitespace.
GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class _Refusal(Exception):
    """What a template says through raise_exception."""


def main() -> None:
    """Answer requests until the other side closes the pipe. The first line is the budget."""
    with os.fdopen(0, "rb") as requests, os.fdopen(1, "wb") as replies:
        budget = json.loads(requests.readline())
        _give_up_resources(budget["memory_bytes"])
        environment = _make_environment(steps=budget["steps"])
        _reply(replies, {"ready": True})
        for line in requests:
            signal.setitimer(signal.ITIMER_PROF, budget["time_s"])  # when it is over, the kernel ends this process
            reply = _answer(environment, line, output_chars=budget["output_chars"])
            signal.setitimer(signal.ITIMER_PROF, 0)
            _reply(replies, reply)


def _give_up_resources(memory_bytes: int) -> None:
    """From here on: no memory past the budget, no core file, and not one more file or socket."""
    # What is loaded on first use is loaded now: the time zone, and minijinja's own error class.
    time.localtime()
    with suppress(TemplateError):
        Environment(debug=False).render_str("{{")
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _make_environment(*, steps: int) -> Environment:
    return Environment(
        fuel=steps,
        debug=False,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_escape_callback=lambda name: False,
        filters={"tojson": _to_json},
        tests={"iterable": _is_iterable, "sequence": _is_sequence},
        globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, str | list | tuple | dict)


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _answer(environment: Environment, line: bytes, *, output_chars: int) -> dict[str, str]:
    """Return {"text"}, {"refusal"}, {"broken"} with a message, or {"budget"} with its name."""
    try:
        request = json.loads(line)
        source = GENERATION_TAG.sub(lambda tag: f"{tag[1]}{tag[2] or ''}with{tag[3]}", request["source"])
        text = environment.render_str(source, "template", **request["context"])
    except _Refusal as error:
        return {"refusal": str(error)}
    except TemplateError as error:
        return {"budget": "steps"} if error.kind == "OutOfFuel" else {"broken": error.message}
    except MemoryError:
        return {"budget": "memory"}
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    return {"text": text} if len(text) <= output_chars else {"budget": "output"}


def _reply(replies: BufferedWriter, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
