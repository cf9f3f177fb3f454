"""A conversation put together from parts: what the assistant said and called, and what tools returned, in their order.

For the dialects whose conversations are lists of blocks or items. What comes out is OpenAI's chat form, which templates
take. Not here: what a block or an item looks like.
"""

from collections.abc import Sequence
from typing import Any

from freehold.errors import BadRequest


class Turns:
    """Takes the parts of a conversation in their order.

    What the assistant reasons, says and calls without anything between is one message. Templates tell results apart by
    their order alone, so those of one message's calls are put in the order of the calls, and none may be missing.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._reasoning: list[str] = []
        self._texts: list[str] = []
        self._calls: dict[str, dict[str, Any]] = {}
        self._results: dict[str, str] = {}

    def say(self, role: str, texts: Sequence[str]) -> None:
        """Add a message of the system or the user."""
        self._close()
        self._messages.append({"role": role, "content": _parts(texts)})

    def reason(self, text: str) -> None:
        """Add reasoning of the assistant."""
        self._continue()
        self._reasoning.append(text)

    def answer(self, text: str) -> None:
        """Add a text of the assistant."""
        self._continue()
        self._texts.append(text)

    def call(self, call_id: str, name: str, arguments: Any, *, where: str) -> None:
        """Add a call by the assistant; its arguments are an object, or JSON in a string. Raises: BadRequest."""
        self._continue()
        if call_id in self._calls:
            raise BadRequest(f"{where}: a second call with the id of another")
        function = {"name": name, "arguments": arguments}
        self._calls[call_id] = {"id": call_id, "type": "function", "function": function}

    def result(self, call_id: str, text: str, *, where: str) -> None:
        """Add what a call returned. Raises: BadRequest where the message before has no such call, or has its result."""
        if call_id not in self._calls:
            raise BadRequest(f"{where}: no call with this id directly before the result")
        if call_id in self._results:
            raise BadRequest(f"{where}: a second result of the same call")
        self._results[call_id] = text

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation. Raises: BadRequest where a call has no result."""
        self._close()
        return self._messages

    def _continue(self) -> None:
        """Go on with the assistant's message, or with another one where the calls of this one have their results."""
        if self._results:
            self._close()

    def _close(self) -> None:
        if self._texts or self._reasoning or self._calls:
            self._messages.append(self._assistant())
        for call_id in self._calls:
            if call_id not in self._results:
                raise BadRequest("a call has no result directly after it", hint="results come before any text")
            self._messages.append({"role": "tool", "tool_call_id": call_id, "content": self._results[call_id]})
        self._reasoning, self._texts, self._calls, self._results = [], [], {}, {}

    def _assistant(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _parts(self._texts)}
        if self._reasoning:
            message["reasoning_content"] = "\n".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
        return message


def _parts(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """Return texts as a content: how several become one is for text/messages.py."""
    return "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]
