"""What a server writes about itself: a line for each request at its end, and what goes wrong. Never what was said.

A line is for people, or one JSON object for programs; both have the id that the client was given.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from starlette.types import Scope

from freehold.serve.caller import Caller, Spent
from freehold.serve.errors import Failure, request_id_of

logger = logging.getLogger(__name__)

Form = Literal["text", "json", "quiet"]

# Asked again and again by whoever watches a server; a line where they fail.
WATCHED = frozenset({"/health", "/ready", "/metrics"})


class JsonLines(logging.Formatter):
    """Writes each record as one line of JSON, with the fields that it has beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower()}
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        line |= fields or {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def written(form: Form, stream: TextIO) -> Iterator[None]:
    """Have everything that is logged meanwhile written to a stream; quiet leaves out requests that went well."""
    writer = logging.StreamHandler(stream)
    writer.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.root.addHandler(writer)
    logger.setLevel(logging.WARNING if form == "quiet" else logging.INFO)
    try:
        yield
    finally:
        logging.root.removeHandler(writer)


def log_request(scope: Scope, *, route: str, status: int, model: str) -> None:
    """Write the line of a request that has ended and that the guard let pass; what it refused it has logged itself."""
    caller: Caller | None = scope.get("state", {}).get("caller")
    failure: Failure | None = scope["state"].get("failure")
    if caller is None:
        return
    failed_with = failure.status if failure else status
    level = logging.ERROR if failed_with >= 500 else logging.WARNING if failed_with == 429 else logging.INFO
    if route in WATCHED and level == logging.INFO:
        return
    fields = {
        "request": request_id_of(scope),
        "key": caller.key_id or None,
        "method": scope["method"],
        "route": route,
        "status": status,
        "model": model,
        **_fields_of(caller.spent),
        "error": failure.message if failure else None,
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    logger.log(level, "%s", text, extra={"fields": fields})


def _fields_of(spent: Spent) -> dict[str, Any]:
    times = {"queue_ms": spent.queue_s, "prefill_ms": spent.prefill_s, "decode_ms": spent.decode_s}
    return {
        "prompt_tokens": spent.prompt_tokens,
        "answer_tokens": spent.answer_tokens,
        **{name: None if time_s is None else round(time_s * 1000, 1) for name, time_s in times.items()},
        "finish": spent.finish,
    }
