"""Rendering of untrusted templates in a child process, within a budget of steps, time, memory and output.

minijinja counts steps and cannot reach files or Python objects, but one step may ask for gigabytes or a long while.
So it runs in a child that the kernel keeps small, and that is ended when its time is over. What a template may see, and
what its messages look like, is in chat.py; what happens inside the child is in sandbox_worker.py.
"""

import atexit
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freehold.errors import BadRequest, BadTemplate

WORKER = Path(__file__).with_name("sandbox_worker.py")
# For a child on a machine that has other things to do; its own time is counted while it has the processor.
PATIENCE_S = 60.0
# How native code ends when an allocation fails, when recursion reaches the end of the stack, and by its timer.
DEATHS = {-signal.SIGABRT: "memory", -signal.SIGSEGV: "stack", -signal.SIGPROF: "time"}
HINT = "the template is part of the model's files; take the model from a source that you trust"


@dataclass(frozen=True, kw_only=True)
class TemplateBudget:
    """What one rendering may use; time_s is the processor's, which does not pass while others have it.

    A prompt of 600,000 characters takes about 170,000 steps and 2 ms.
    """

    steps: int = 20_000_000
    time_s: float = 2.0
    memory_bytes: int = 512 << 20
    output_chars: int = 16 << 20


class _Ended(Exception):
    """The child closed its side of the pipes."""


class Sandbox:
    """A child process that renders templates. It starts when first needed and again after it had to be ended."""

    def __init__(self, budget: TemplateBudget | None = None) -> None:
        self.budget = budget or TemplateBudget()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, source: str, context: Mapping[str, Any]) -> str:
        """Return the text of a template. Any number of threads may ask; they are served one by one.

        Raises: BadTemplate where the template is broken or leaves its budget, BadRequest where it refuses the context.
        """
        request = _request_line(source, context)
        if len(request) > self.budget.memory_bytes // 8:
            raise BadRequest(f"messages and tools of {len(request):,} bytes are more than a template can be given")
        with self._lock:
            reply = self._ask(request)
        if "text" in reply:
            return reply["text"]
        if "refusal" in reply:
            raise BadRequest(f"the chat template refuses these messages{_own_words(reply['refusal'], source)}")
        if "budget" in reply:
            raise BadTemplate(f"the chat template leaves its budget: {self._budget_line(reply['budget'])}", hint=HINT)
        raise BadTemplate(f"the chat template fails: {_one_line(reply['broken'])}", hint=HINT)

    def close(self) -> None:
        """End the child, if there is one. A later render starts another."""
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, str]:
        child = self._child or self._start()
        try:
            reply = _exchange(child, request)
        except TimeoutError:
            reply = {"budget": "time"}
        except _Ended:
            code = child.wait()
            reply = {"budget": DEATHS[code]} if code in DEATHS else {"broken": f"its process ended with {code}"}
        except BaseException:  # Ctrl-C: the reply that was not read must not be taken for the next one
            self._end()
            raise
        if reply.get("budget") in ("time", "memory") or child.poll() is not None:
            self._end()
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        origin = getattr(importlib.util.find_spec("minijinja"), "origin", None)
        assert origin, "minijinja is a declared dependency"
        # -I and -S: neither the environment, nor the working directory, nor site packages but this one's folder.
        start = "import runpy, sys; sys.path.append(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
        command = [sys.executable, "-I", "-S", "-c", start, str(WORKER), str(Path(origin).parent.parent)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        # Its own session: Ctrl-C in a terminal is meant for the answer, not for this child.
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True)
        try:
            _exchange(self._child, json.dumps(asdict(self.budget)).encode() + b"\n")
        except (TimeoutError, _Ended):
            self._end()
            raise BadTemplate("the process that renders chat templates does not start here") from None
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        child.wait()

    def _budget_line(self, name: str) -> str:
        limits = {
            "steps": f"more than {self.budget.steps:,} steps",
            "time": f"more than {self.budget.time_s:g} s of the processor",
            "memory": f"more memory than {self.budget.memory_bytes >> 20} MiB",
            "stack": "nesting deeper than its stack",
            "output": f"output longer than {self.budget.output_chars:,} characters",
        }
        return limits[name]


def _request_line(source: str, context: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps({"source": source, "context": context}, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise BadRequest("messages hold half a surrogate pair where Unicode text is wanted") from None
    except RecursionError:
        raise BadRequest("messages or tools are nested too deeply to be written as JSON") from None
    except (TypeError, ValueError) as error:
        raise BadRequest(f"messages or tools cannot be written as JSON: {_one_line(str(error))}") from None


def _exchange(child: subprocess.Popen[bytes], request: bytes) -> dict[str, Any]:
    """Return the child's reply to one line. Raises: TimeoutError where none comes, _Ended where the child has gone."""
    assert child.stdin, "the child was started with a pipe to it"
    assert child.stdout, "the child was started with a pipe from it"
    deadline = time.monotonic() + PATIENCE_S
    os.set_blocking(child.stdin.fileno(), False)
    unsent, received = memoryview(request), bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        ready.register(child.stdin, selectors.EVENT_WRITE)
        while not received.endswith(b"\n"):
            events = ready.select(max(0.0, deadline - time.monotonic()))
            if not events:
                raise TimeoutError
            for key, _ in events:
                if key.fileobj is child.stdout:
                    received += _read(child.stdout.fileno())
                else:
                    unsent = unsent[_write(child.stdin.fileno(), unsent) :]
                    if not unsent:
                        ready.unregister(child.stdin)
    reply: dict[str, Any] = json.loads(received)
    return reply


def _read(descriptor: int) -> bytes:
    chunk = os.read(descriptor, 1 << 20)
    if not chunk:
        raise _Ended
    return chunk


def _write(descriptor: int, unsent: memoryview) -> int:
    try:
        return os.write(descriptor, unsent)
    except BrokenPipeError:
        raise _Ended from None


def _own_words(refusal: str, source: str) -> str:
    """Return what a template says of itself, and nothing where it puts parts of the messages into its words."""
    return f": {_one_line(refusal)}" if refusal in source else ""


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:300]} ..."
