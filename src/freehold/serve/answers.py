"""From a conversation to an answer as it comes: what every dialect of the API is built on.

Templates and tokenizers run in threads beside the event loop, the model in the engine's. Streamed and whole answers are
made of the same deltas. Not here: what a request or an answer looks like in JSON.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from freehold.engine.engine import Engine
from freehold.engine.model import Model
from freehold.engine.request import Event, ReasoningBudget, Request, SamplingParams, Score
from freehold.errors import BadRequest
from freehold.serve.caller import Caller, Quotas
from freehold.serve.submission import Mailbox, Submission
from freehold.text.answer import AnswerParser, Piece, TextPiece, ToolCallPiece
from freehold.text.answer_grammar import FREE, Form, write_grammar
from freehold.text.grammar import Grammar, Grammars
from freehold.text.stream import Detokenizer, StopStrings

READING_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation with its tools in OpenAI's form, and the switches of the model's template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    switches: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Ids that are ready to be submitted.

    text: what a template made, None for a text to be continued, whose answer has no parts. tools: what may be called.
    """

    ids: tuple[int, ...]
    text: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request says of its answer.

    num_logprobs, scores_prompt, priority, deadline_s: as in engine.request. reasoning_tokens: how many an answer may
    reason, None for no limit. parallel_tool_calls: False ends an answer after its first call. form: what the answer is
    held to.
    """

    sampling: SamplingParams
    num_logprobs: int | None = None
    scores_prompt: bool = False
    reasoning_tokens: int | None = None
    parallel_tool_calls: bool = True
    form: Form = FREE
    priority: int = 0
    deadline_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A token's text, the bytes it stands for, its log-probability, and the same of the likeliest in its place."""

    text: str
    token_bytes: bytes
    logprob: float | None
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerUsage:
    """Tokens read, written, and written before the answer itself."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What came of an answer. The last one, and no other, has a finish_reason.

    usage: up to here. end_score: of the stop id that ended the answer; it is a token of it, but none of its text.
    """

    pieces: tuple[Piece, ...] = ()
    scores: tuple[TokenText, ...] = ()
    prompt_scores: tuple[TokenText, ...] = ()
    end_score: TokenText | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    stop_sequence: str | None = None
    usage: AnswerUsage = AnswerUsage()


class Answers:
    """Answers from one engine."""

    def __init__(self, engine: Engine, *, model_name: str, quotas: Quotas | None = None):
        self.engine = engine
        self.model_name = model_name
        self._model: Model = engine.model
        self._quotas = quotas
        self._mailbox: Mailbox | None = None
        self._threads = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="freehold-reading")
        # One of its own: schemas that take long are waited for by schemas alone.
        self._grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="freehold-grammars")

    @property
    def reasons(self) -> bool:
        """Whether the model may reason before it answers."""
        return self._model.text.dialect.reasons

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer can have together."""
        return self.engine.limits.longest

    async def read_chat(self, chat: Chat) -> Prompt:
        """Return the prompt of a conversation. Raises: BadRequest."""

        def read() -> Prompt:
            text = self._model.render(chat.messages, tools=chat.tools, switches=chat.switches)
            return Prompt(ids=tuple(self._model.tokenizer.encode_rendered(text)), text=text, tools=chat.tools)

        return await asyncio.get_running_loop().run_in_executor(self._threads, read)

    async def read_text(self, text: str) -> Prompt:
        """Return the prompt of a text to be continued."""
        encode = self._model.tokenizer.encode
        return Prompt(ids=tuple(await asyncio.get_running_loop().run_in_executor(self._threads, encode, text)))

    def read_ids(self, ids: Sequence[int]) -> Prompt:
        """Return the prompt of ids."""
        return Prompt(ids=tuple(ids))

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Raises: BadRequest where one is none of the model's."""
        for token in ids:
            if not 0 <= token < self._model.decoder.spec.vocab_size:
                raise BadRequest(f"the id {token} is none of this model's")
        return self._model.tokenizer.decode(ids)

    async def stream(
        self, asked: Sequence[tuple[Prompt, Options]], caller: Caller
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield the answers to one request as they come, each delta with its answer's place.

        All are taken in before any work, or none. Closing the iterator ends them in the engine at once; one's failure
        ends all.
        Raises: BadRequest, Overloaded, Draining before the first delta; EngineFailed, TimedOut at any time.
        """
        requests = [await self._request(prompt, options, caller) for prompt, options in asked]
        writings = [_Writing(self._model, prompt, options) for prompt, options in asked]
        async with self._submission(requests, caller) as submission:
            async for place, event in submission:
                submission.num_written += len(event.tokens)
                delta = writings[place].take(event)
                if delta.finish_reason:
                    caller.spent.finish = delta.finish_reason
                    submission.end(place)
                if delta.finish_reason or delta.pieces or delta.scores or delta.prompt_scores:
                    yield place, delta

    async def _request(self, prompt: Prompt, options: Options, caller: Caller) -> Request:
        return Request(
            prompt=prompt.ids,
            id=caller.request_id,
            sampling=options.sampling,
            stop_ids=self._model.tokenizer.stop_ids,
            tenant=caller.key_id,
            weight=caller.weight,
            priority=options.priority,
            deadline_s=options.deadline_s,
            num_logprobs=options.num_logprobs,
            scores_prompt=options.scores_prompt,
            reasoning=await self._reasoning_budget(prompt, options),
            grammar=await self._grammar(prompt, options),
        )

    async def embed(self, prompts: Sequence[Prompt], caller: Caller) -> list[tuple[float, ...]]:
        """Return the mean of each prompt's hidden states, of length 1."""
        requests = [
            Request(prompt=prompt.ids, id=caller.request_id, embeds=True, tenant=caller.key_id, weight=caller.weight)
            for prompt in prompts
        ]
        vectors: dict[int, tuple[float, ...]] = {}
        async with self._submission(requests, caller) as submission:
            async for place, event in submission:
                vectors[place] = event.embedding
        return [vectors[place] for place in range(len(prompts))]

    def close(self) -> None:
        """Let the threads go."""
        for threads in (self._threads, self._grammar_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    def _submission(self, requests: Sequence[Request], caller: Caller) -> Submission:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return Submission(self.engine, requests, caller, quotas=self._quotas, mailbox=self._mailbox)

    async def _reasoning_budget(self, prompt: Prompt, options: Options) -> ReasoningBudget | None:
        if options.reasoning_tokens is None:
            return None
        dialect = self._model.text.dialect
        if not self.reasons or prompt.text is None:
            raise BadRequest("this model does not reason, so there is nothing that a budget could limit")
        newlines = await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._newline_ids)
        return ReasoningBudget(
            num_tokens=options.reasoning_tokens,
            open_ids=self._ids_of(dialect.think_open),
            close_ids=self._ids_of(dialect.think_close),
            newline_ids=newlines,
            is_open=dialect.is_reasoning_after(prompt.text),
        )

    async def _grammar(self, prompt: Prompt, options: Options) -> Grammar | None:
        if options.form.is_free:
            return None
        if options.sampling.ignore_eos:
            raise BadRequest("ignore_eos contradicts an answer that is held to a form, which ends with it")
        tokenizer, dialect = self._model.tokenizer, self._model.text.dialect

        def compile_grammar() -> Grammar:
            written = write_grammar(
                options.form, dialect, tools=prompt.tools, prompt=prompt.text or "", token_id=tokenizer.token_id
            )
            return self._grammars.compile(written.text, written.schemas)

        return await asyncio.get_running_loop().run_in_executor(self._grammar_thread, compile_grammar)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._model.tokenizer)

    def _ids_of(self, mark: str) -> tuple[int, ...]:
        token = self._model.tokenizer.token_id(mark)
        return (token,) if token is not None else tuple(self._model.tokenizer.encode_plain(mark))

    @cached_property
    def _newline_ids(self) -> frozenset[int]:
        tokenizer = self._model.tokenizer
        return frozenset(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).endswith(b"\n"))


class _Writing:
    """An answer while it is written: events in, deltas out."""

    def __init__(self, model: Model, prompt: Prompt, options: Options):
        self._tokenizer, self._prompt, self._options = model.tokenizer, prompt, options
        self._text, self._stops = Detokenizer(model.tokenizer), StopStrings(options.sampling.stop)
        self._parser: AnswerParser | None = None
        if prompt.text is not None:
            self._parser = AnswerParser(model.text.dialect, tools=prompt.tools, prompt=prompt.text)
        self._num_tokens = self._num_reasoning = 0
        self._has_called = False

    def take(self, event: Event) -> Delta:
        """Return what an event adds."""
        ends = event.finish is not None and event.finish.reason == "stop"
        shown = event.tokens[:-1] if ends else event.tokens  # a stop id is no part of the text
        pieces: list[Piece] = []
        for place, token in enumerate(shown, start=self._num_tokens):
            text = self._text.add(token)
            pieces += self._parsed(text if place < self._options.sampling.min_tokens else self._stops.feed(text))
        self._num_tokens += len(event.tokens)
        if self._parser is not None and self._parser.is_reasoning:
            self._num_reasoning += len(event.tokens)
        is_cut = self._cuts_calls(pieces)
        reason = None
        if event.finish or is_cut or self._stops.matched is not None:
            if not is_cut:
                pieces += self._rest()
            was_cut_short = event.finish is not None and event.finish.reason == "length" and not self._stops.matched
            reason = "length" if was_cut_short else "tool_calls" if self._has_called else "stop"
        prompt_scores = [
            self._scored(score) if score else self._token_text(self._prompt.ids[0], None)
            for score in event.prompt_scores
        ]
        scores = [self._scored(score) for score in event.scores]
        return Delta(
            pieces=tuple(pieces),
            end_score=scores.pop() if ends and scores else None,
            scores=tuple(scores),
            prompt_scores=tuple(prompt_scores),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_sequence=self._stops.matched,
            usage=self._usage(),
        )

    def _parsed(self, text: str) -> list[Piece]:
        if self._parser is not None:
            return self._parser.feed(text)
        return [TextPiece(text=text)] if text else []

    def _rest(self) -> list[Piece]:
        """Return what was held back while more could come."""
        last = "" if self._stops.matched else self._stops.feed(self._text.finish()) + self._stops.finish()
        return self._parsed(last) + (self._parser.finish() if self._parser is not None else [])

    def _cuts_calls(self, pieces: list[Piece]) -> bool:
        """Leave out what follows the first call where only one is wanted; return whether the answer ends there."""
        calls = [index for index, piece in enumerate(pieces) if isinstance(piece, ToolCallPiece)]
        self._has_called = self._has_called or bool(calls)
        if not calls or self._options.parallel_tool_calls:
            return False
        del pieces[calls[0] + 1 :]
        return True

    def _scored(self, score: Score) -> TokenText:
        top = tuple((*self._texts_of(token), logprob) for token, logprob in score.top)
        return self._token_text(score.id, score.logprob, top)

    def _token_text(
        self, token: int, logprob: float | None, top: tuple[tuple[str, bytes, float], ...] = ()
    ) -> TokenText:
        text, token_bytes = self._texts_of(token)
        return TokenText(text=text, token_bytes=token_bytes, logprob=logprob, top=top)

    def _texts_of(self, token: int) -> tuple[str, bytes]:
        return self._tokenizer.token_text(token), self._tokenizer.token_bytes(token)

    def _usage(self) -> AnswerUsage:
        return AnswerUsage(
            prompt_tokens=len(self._prompt.ids),
            completion_tokens=self._num_tokens,
            reasoning_tokens=self._num_reasoning,
        )
