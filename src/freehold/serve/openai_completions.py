"""POST /v1/completions: texts or ids in, their continuations out, whole or as chunks. Both are made of the same deltas.

Each prompt is continued as if it were alone in its request: its choices have the same seeds.
"""

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from freehold.serve.answers import Answers, AnswerUsage, Delta, Options, Prompt, TokenText
from freehold.serve.asking import (
    FINGERPRINT,
    Head,
    caller_of,
    check_model,
    head_of,
    sampling_of,
    settings_of,
    with_priority,
    with_seed,
)
from freehold.serve.schema import CompletionRequest
from freehold.serve.shapes import (
    ERRORS,
    STREAMABLE,
    Completion,
    CompletionChoice,
    FinishReason,
    LegacyScores,
    usage_in_chunk,
    usage_of,
)
from freehold.serve.sse import DONE, EventStream, data_line, while_connected
from freehold.text.answer import TextPiece

DEFAULT_MAX_TOKENS = 16


def routes(answers: Answers) -> APIRouter:
    """Return the route of completions."""
    router = APIRouter(tags=["OpenAI"])
    responses: dict[int | str, dict[str, Any]] = {200: {"model": Completion, "content": STREAMABLE}, **ERRORS}

    @router.post("/v1/completions", responses=responses, response_class=JSONResponse)
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        check_model(body.model, request, answers)
        options = with_priority(options_of(body, answers), body.priority, request)
        head = head_of("cmpl", body)
        asked: list[tuple[Prompt, Options]] = []
        choices: list[_Choice] = []
        for given in body.prompts:
            prompt = await read_prompt(answers, given)
            echoed = await _echoed(answers, given) if body.echo else ""
            for choice in range(body.num_choices):
                asked.append((prompt, with_seed(options, head.seed + choice)))
                choices.append(_Choice(echoed=echoed, body=body))
        deltas = answers.stream(asked, caller_of(request))
        if body.stream:
            return EventStream(chunk_lines(deltas, head, choices, body), settings=settings_of(request))
        return JSONResponse(await while_connected(request, whole(deltas, head, choices, body)))

    return router


async def read_prompt(answers: Answers, given: str | list[int]) -> Prompt:
    """Return a text or ids as a prompt."""
    return await answers.read_text(given) if isinstance(given, str) else answers.read_ids(given)


async def _echoed(answers: Answers, given: str | list[int]) -> str:
    return given if isinstance(given, str) else await asyncio.to_thread(answers.text_of, given)


def options_of(body: CompletionRequest, answers: Answers) -> Options:
    """Return what a request says of its continuations, but for their seeds."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    return Options(
        sampling=sampling_of(body, answers, max_tokens=max_tokens),
        num_logprobs=body.logprobs,
        scores_prompt=bool(body.echo) and body.logprobs is not None,
    )


@dataclass(kw_only=True)
class _Choice:
    """One continuation, as far as it has come.

    echoed: the prompt, where it is wanted. Where no token is, one is computed all the same, since that is how a prompt
    gets read, and left out.
    """

    echoed: str
    body: CompletionRequest
    text: list[str] = field(default_factory=list)
    scores: LegacyScores = field(
        default_factory=lambda: LegacyScores(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    )
    finish_reason: FinishReason = "stop"
    usage: AnswerUsage = field(default_factory=AnswerUsage)
    _is_begun: bool = False
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    _num_chars: int = 0

    def take(self, delta: Delta) -> tuple[str, LegacyScores | None]:
        """Return the text and the scores that a delta adds. Mutates: itself, which then holds them too."""
        is_prompt_all = self.body.max_tokens == 0
        text = "" if self._is_begun else self.echoed
        self._is_begun = True
        if not is_prompt_all:
            text += "".join(piece.text for piece in delta.pieces if isinstance(piece, TextPiece))
        scores = None
        if self.body.logprobs is not None:
            ends = [delta.end_score] if delta.end_score else []
            scores = self._scores([*delta.prompt_scores, *([] if is_prompt_all else [*delta.scores, *ends])])
            for kept, added in zip(self.scores.values(), scores.values(), strict=True):
                kept += added  # type: ignore[operator]
        self.text.append(text)
        self.usage = replace(delta.usage, completion_tokens=0) if is_prompt_all else delta.usage
        if delta.finish_reason:
            self.finish_reason = "length" if is_prompt_all else delta.finish_reason
        return text, scores

    def _scores(self, tokens: Sequence[TokenText]) -> LegacyScores:
        return LegacyScores(
            tokens=[_shown(token.text, token.token_bytes) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_top(token) for token in tokens],
            text_offset=[self._offset(token) for token in tokens],
        )

    def _offset(self, token: TokenText) -> int:
        """Return how many characters stand before a token."""
        before = self._num_chars
        self._num_chars += len(self._decoder.decode(token.token_bytes))
        return before

    def finished(self, index: int) -> CompletionChoice:
        """Return the whole continuation."""
        scores = self.scores if self.body.logprobs is not None else None
        return CompletionChoice(index=index, text="".join(self.text), logprobs=scores, finish_reason=self.finish_reason)


async def whole(
    deltas: AsyncGenerator[tuple[int, Delta], None], head: Head, choices: list[_Choice], body: CompletionRequest
) -> Completion:
    """Return all continuations when they are done."""
    async with aclosing(deltas):
        async for index, delta in deltas:
            choices[index].take(delta)
    finished = [choice.finished(index) for index, choice in enumerate(choices)]
    return Completion(**_head(head), choices=finished, usage=usage_of(body, _usages(choices)))  # type: ignore[typeddict-item]


async def chunk_lines(
    deltas: AsyncGenerator[tuple[int, Delta], None], head: Head, choices: list[_Choice], body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    """Yield continuations as the events of a stream, as they come."""
    async with aclosing(deltas):
        async for index, delta in deltas:
            text, scores = choices[index].take(delta)
            is_last = delta.finish_reason is not None
            if not (text or is_last or (scores and scores["tokens"])):
                continue
            reason = choices[index].finish_reason if is_last else None
            chunk = CompletionChoice(index=index, text=text, logprobs=scores, finish_reason=reason)
            yield data_line({**_head(head), "choices": [chunk], **usage_in_chunk(body, _usages(choices))})
    if body.includes_usage:
        yield data_line({**_head(head), "choices": [], "usage": usage_of(body, _usages(choices))})
    yield DONE


def _head(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": FINGERPRINT,
        "seed": head.seed,
    }


def _usages(choices: Sequence[_Choice]) -> list[AnswerUsage]:
    return [choice.usage for choice in choices]


def _top(token: TokenText) -> dict[str, float] | None:
    """Return the likeliest and the token itself, which need not be among them."""
    if token.logprob is None:
        return None
    top = {_shown(text, raw): logprob for text, raw, logprob in token.top}
    return {_shown(token.text, token.token_bytes): token.logprob, **top}


def _shown(text: str, raw: bytes) -> str:
    """Return a token as the keys of OpenAI's API name it: part of a character by its bytes, so that names differ."""
    if "\N{REPLACEMENT CHARACTER}" not in text or text.encode() == raw:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
