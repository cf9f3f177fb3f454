"""A conversation as a model's own chat template writes it, and which of its tokens are trained on.

What an answer is, is found by rendering: the prompt that serving would give the model before the answer, and the same
conversation with the answer in it. What the second adds to the first is the answer. No mark is searched for in a text,
so nothing depends on which marks a template has.

Templates leave reasoning out of earlier turns. An answer that a later rendering does not hold as it was given becomes
an example of its own: the conversation up to it, as serving had it at that time.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from freehold.errors import BadRequest
from freehold.text.chat import ChatTemplate
from freehold.text.dialect import Dialect
from freehold.text.messages import checked_messages
from freehold.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
# The switch by which the families' templates end a prompt without room for reasoning.
THINKING_SWITCH = "enable_thinking"


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What of an assistant's turns is trained on besides what it says: its reasoning, its turns that call tools."""

    reasoning: bool = True
    tool_calls: bool = True


@dataclass(frozen=True, kw_only=True)
class ChatExample:
    """One conversation in tokens, up to the last that is trained on.

    trained: for each id, whether it is trained on. num_answers: answers among them. num_joined: answers before which
    serving would have given other ids, for the tokenizer joins the prompt's end with the answer's beginning; what is
    joined is not trained on. num_inner_ends: tokens that end a turn, written inside of answers. num_unwritten: answers
    whose reasoning the template does not write.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    num_answers: int
    num_joined: int
    num_inner_ends: int
    num_unwritten: int


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """One turn of the assistant. full: the conversation with it; learnt: from where to where in it is trained on."""

    prompt: str
    full: str
    learnt: tuple[int, int]
    writes_reasoning: bool


class ChatRenderer:
    """Turns conversations into examples for one model."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, supervision: Supervision) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._supervision = supervision
        self._switches: list[dict[str, Any]] = [{}]
        if THINKING_SWITCH in template.source:
            self._switches.append({THINKING_SWITCH: False})

    def examples(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> list[ChatExample]:
        """Return the examples of a conversation; none where nothing in it is trained on.

        Raises: BadRequest, BadTemplate for what cannot be rendered, or not told apart.
        """
        checked = checked_messages(messages)
        answers = [
            self._answer(checked, index, tools) for index, message in enumerate(checked) if self._is_learnt(message)
        ]
        examples = []
        while answers:
            full = answers[-1].full
            held = [answer for answer in answers if full.startswith(answer.full)]
            answers = [answer for answer in answers if answer not in held]
            examples.append(self._example(full, held))
        return examples[::-1]

    def _is_learnt(self, message: Mapping[str, Any]) -> bool:
        calls = "tool_calls" in message
        return message["role"] == "assistant" and (self._supervision.tool_calls or not calls)

    def _answer(self, messages: Messages, index: int, tools: Sequence[Mapping[str, Any]] | None) -> _Answer:
        where, message = f"messages[{index}]", messages[index]
        if index == 0:
            raise BadRequest(f"{where} is the assistant's, and nothing was asked before it")
        full = self._render(messages[: index + 1], tools)
        prompts = [self._render(messages[:index], tools, prompted=True, switches=s) for s in self._switches]
        # Where two fit, the longer one left less to the answer: without room for reasoning, there is none to learn.
        prompt = max((prompt for prompt in prompts if full.startswith(prompt)), key=len, default=None)
        if prompt is None:
            raise BadRequest(
                f"{where}: the chat template begins an answer with {prompts[0][-24:]!r}, and has no such place in the "
                "conversation that holds the answer"
            )
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in full[len(prompt) :]:
                raise BadRequest(f"{where}.tool_calls: this model's chat template has no place for calls")
        start, reasoning = len(prompt), message.get("reasoning_content", "")
        if reasoning and not self._supervision.reasoning:
            start = max(start, self._reasoning_end(messages, index, tools, full))
        if not self._supervision.reasoning and Dialect.think_close in message["content"]:
            raise BadRequest(f"{where}: reasoning inside of content; to leave it out it must be in reasoning_content")
        is_written = reasoning.strip() in full[len(prompt) :]
        return _Answer(prompt=prompt, full=full, learnt=(start, len(full)), writes_reasoning=is_written)

    def _reasoning_end(self, messages: Messages, index: int, tools: Any, full: str) -> int:
        """Return where the reasoning of a turn ends in its rendering, by rendering it with another text in its place.

        0 where the template writes no reasoning.
        """
        sentinel = hashlib.sha256(full.encode("utf-8", "surrogatepass")).hexdigest()
        replaced = {**messages[index], "reasoning_content": sentinel}
        before, found, after = self._render([*messages[:index], replaced], tools).partition(sentinel)
        if not found:
            return 0
        end = len(full) - len(after)
        held = full[len(before) : end]
        is_same = full.startswith(before) and full.endswith(after)
        if not is_same or held.strip() != messages[index]["reasoning_content"].strip():
            raise BadRequest(f"messages[{index}]: the chat template changes more than the reasoning with the reasoning")
        return end

    def _render(
        self, messages: Messages, tools: Any, *, prompted: bool = False, switches: Mapping[str, Any] | None = None
    ) -> str:
        return self._template.render(messages, tools=tools, add_generation_prompt=prompted, switches=switches)

    def _example(self, full: str, answers: Sequence[_Answer]) -> ChatExample:
        ids = self._tokenizer.encode_rendered(full)
        ends = list(accumulate(map(len, map(self._tokenizer.token_bytes, ids)), initial=0))
        cuts = sorted({0, len(full)} | {edge for a in answers for edge in (len(a.prompt), *a.learnt)})
        bytes_before = self._bytes_before(full, cuts, ids)
        trained, num_joined, num_inner_ends = [False] * len(ids), 0, 0
        for answer in answers:
            first, end = (self._tokens_before(ends, bytes_before[edge]) for edge in answer.learnt)
            if ends[first] != bytes_before[answer.learnt[0]]:
                first += 1  # joined with what is not trained on
            stops = [at for at in range(first, end) if ids[at] in self._tokenizer.stop_ids]
            if not stops:
                raise BadRequest("the chat template ends an answer with no token that ends an answer in this model")
            trained[first : stops[-1] + 1] = [True] * (stops[-1] + 1 - first)
            num_inner_ends += len(stops) - 1
            prompt_ids = self._tokenizer.encode_rendered(answer.prompt)
            num_joined += ids[: self._tokens_before(ends, bytes_before[len(answer.prompt)])] != prompt_ids
        length = len(ids) - trained[::-1].index(True)
        return ChatExample(
            ids=tuple(ids[:length]),
            trained=tuple(trained[:length]),
            num_answers=len(answers),
            num_joined=num_joined,
            num_inner_ends=num_inner_ends,
            num_unwritten=sum(not answer.writes_reasoning for answer in answers),
        )

    def _bytes_before(self, full: str, cuts: Sequence[int], ids: Sequence[int]) -> dict[int, int]:
        """Return how many bytes of the tokens lie before each place of a text. A tokenizer may normalise its text."""
        parts = [self._tokenizer.normalized(full[start:end]).encode() for start, end in pairwise(cuts)]
        if b"".join(parts) != b"".join(map(self._tokenizer.token_bytes, ids)):
            raise BadRequest("the tokenizer changes the conversation's text, so its answers cannot be told apart in it")
        return dict(zip(cuts, accumulate(map(len, parts), initial=0), strict=True))

    @staticmethod
    def _tokens_before(ends: Sequence[int], num_bytes: int) -> int:
        """Return how many tokens lie before a place wholly; `ends[n]` is where the first n of them end."""
        return bisect_right(ends, num_bytes) - 1
