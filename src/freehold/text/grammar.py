"""Grammars that answers are held to: which ids may come next. The parsing is llguidance's; no other file imports it.

A schema comes with a request and may be hostile, so it is tried in a child process with a budget before anything is
built of it here (grammar_worker.py). What a grammar says is in answer_grammar.py; what is drawn, in the engine.
"""

import atexit
import importlib.util
import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from freehold.errors import BadRequest
from freehold.text.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("grammar_worker.py")
# Programs send the same tools again and again: so many compiled grammars are kept, each of a few megabytes at most.
MAX_KEPT = 32
# Of a grammar, and of one step of it. They count and do not time, so what is refused is refused on every machine.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# How a child ends that the kernel stops, and when an allocation fails, and when recursion reaches the end of the stack.
DEATHS = {
    signal.SIGXCPU: "takes too long to be made a grammar",
    signal.SIGKILL: "takes too long to be made a grammar",
    signal.SIGABRT: "takes too much memory to be made a grammar",
    signal.SIGSEGV: "is nested too deep",
}


@dataclass(frozen=True, kw_only=True)
class SchemaBudget:
    """What trying the schemas of one request may use. time_s: of a processor."""

    chars: int = 1 << 20
    time_s: int = 2
    memory_bytes: int = 512 << 20


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, inner: LLMatcher):
        self._inner = inner

    @property
    def is_complete(self) -> bool:
        """Whether only ids that end the answer can follow."""
        return self._inner.is_stopped()

    def allowed(self) -> bytes:
        """Return a byte for each id of the vocabulary, zero where it may not come next.

        Raises: BadRequest where the grammar has become too complex to go on with.
        """
        mask = self._inner.compute_logit_bias()
        if self._inner.is_error():
            raise BadRequest(f"the grammar is too complex to go on with: {_reason(self._inner.get_error())}")
        return mask

    def accept(self, token: int) -> None:
        """Go on by an id of the answer, one that was allowed."""
        self._inner.consume_token(token)


class Grammar:
    """A compiled grammar."""

    def __init__(self, inner: LLMatcher):
        self._inner = inner

    def start(self) -> Matcher:
        """Return the place at the beginning of an answer."""
        return Matcher(self._inner.deep_copy())


class Grammars:
    """The grammars of one tokenizer, for one thread at a time. The vocabulary is read when it is first needed."""

    def __init__(self, tokenizer: Tokenizer, *, budget: SchemaBudget | None = None):
        self._tokenizer = tokenizer
        self._budget = budget or SchemaBudget()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, text: str, schemas: Mapping[str, Any]) -> Grammar:
        """Return the grammar of a text in llguidance's dialect of Lark.

        schemas: all that a client wrote of it, by the names that errors call them.
        Raises: BadRequest for what is no schema, is not supported, or leaves its budget.
        """
        if not self._tokenizer.stop_ids:
            raise BadRequest("this model has no token that ends an answer, so no answer can be held to a form")
        if kept := self._kept.get(text):
            self._kept.move_to_end(text)
            return kept
        try_schemas(schemas, self._budget)
        inner = LLMatcher(self._vocabulary, text, log_level=0, limits=LLParserLimits(**LIMITS))
        if inner.is_error():
            raise BadRequest(f"the schemas cannot be used together: {_reason(inner.get_error())}")
        grammar = self._kept[text] = Grammar(inner)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return grammar

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)), eos_token=sorted(self._tokenizer.stop_ids))


class _Vocabulary:
    """A tokenizer as llguidance wants one. No added token is text: it is itself, whatever spells it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.added_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text)


def try_schemas(schemas: Mapping[str, Any], budget: SchemaBudget) -> None:
    """Raises: BadRequest for the first schema of which no grammar can be made within the budget."""
    try:
        written = {name: json.dumps(schema) for name, schema in schemas.items()}
    except RecursionError:
        raise BadRequest(f"{_together(schemas)} is nested too deep") from None
    if (length := sum(map(len, written.values()))) > budget.chars:
        raise BadRequest(f"the schemas have {length:,} characters, more than {budget.chars:,}")
    request = {"schemas": written, "limits": LIMITS, "time_s": budget.time_s, "memory_bytes": budget.memory_bytes}
    reply = _shared_trials().ask(request)
    if "signal" in reply:
        raise BadRequest(f"{_together(schemas)} {DEATHS.get(reply['signal'], 'cannot be made a grammar')}")
    if reply:
        raise BadRequest(f"{reply['schema']} is not supported: {_reason(reply['reason'])}")


class _Trials:
    """The process in which schemas are tried. It starts when it is first needed, and again where it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a request. It comes in time, for the kernel ends what takes too long."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._process = _start()
            asking, replies = self._process.stdin, self._process.stdout
            assert asking, "the process was started with a pipe to it"
            assert replies, "the process was started with a pipe from it"
            asking.write(json.dumps(request).encode() + b"\n")
            asking.flush()
            reply: dict[str, Any] = json.loads(replies.readline() or '{"signal": 0}')
        return reply

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@cache
def _shared_trials() -> _Trials:
    return _Trials()


def _start() -> subprocess.Popen[bytes]:
    origin = getattr(importlib.util.find_spec("llguidance"), "origin", None)
    assert origin, "llguidance is a declared dependency"
    # -I and -S, as in sandbox.py: neither the environment, nor the working directory, nor site packages but this one's.
    start = "import runpy, sys; sys.path.append(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", start, str(WORKER), str(Path(origin).parent.parent)]
    pipe = subprocess.PIPE
    # Its own session: Ctrl-C in a terminal is meant for the answer, not for this process.
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)


def _together(schemas: Mapping[str, Any]) -> str:
    return min(schemas) if len(schemas) == 1 else f"one of {', '.join(schemas)}"[:200]


def _reason(error: str) -> str:
    """Return an error of llguidance as one line, without where it stands in a text that no client wrote."""
    reason = " ".join(error.partition("\n<")[0].partition("\n   1 |")[0].split())
    reason = reason.rpartition("failed to compile JSON schema: ")[2]
    reason = "no text fits it" if reason.startswith("NoExtension") else reason
    return reason if len(reason) <= 300 else f"{reason[:300]} ..."
