"""Text that arrives token by token: whole characters only, and stop strings that may lie across tokens.

What comes out, joined, is what comes out of the whole text at once. What the text means is for answer.py.
"""

import codecs
from collections.abc import Sequence

from freehold.errors import BadRequest
from freehold.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text, one at a time. The joined text is `decode` of all ids.

    The last bytes of a character that is not complete yet are kept back, so no piece ends inside one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Return the text that this id completes, often that of the id itself, sometimes none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD if the ids ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Ends a text before the stop string that is complete first; of several complete at once, before the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise BadRequest("a stop string is empty; it would end every answer at once")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Return what can be shown: all but an end that may begin a stop string, and nothing after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        shown = len(text) - held_length(text, self._stops)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return what was kept back in vain."""
        held, self._held = self._held, ""
        return held


def held_length(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest end of the text that begins a marker without completing it."""
    longest = max((len(marker) - 1 for marker in markers), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(marker) > length and marker.startswith(end) for marker in markers):
            return length
    return 0
