"""Chat templates: a conversation to the prompt that a model was trained on.

A template comes with a model and is foreign code; sandbox.py runs it. The text is, byte for byte, what Hugging Face's
apply_chat_template gives. What a conversation may look like is in messages.py; reading answers back is in answer.py.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from freehold.errors import BadRequest
from freehold.text.messages import checked_messages, checked_tools
from freehold.text.sandbox import Sandbox

# What a template finds besides switches. A switch by one of these names would change more than it says.
RESERVED_DATA = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
RESERVED = RESERVED_DATA | {"raise_exception", "strftime_now", "namespace", "range", "loop", "self"}
READS_TOOLS = re.compile(r"\btools\b")


class ChatTemplate:
    """A chat template in Jinja's language, with the special tokens that it may write."""

    def __init__(
        self, source: str, *, bos_token: str | None = None, eos_token: str | None = None, sandbox: Sandbox | None = None
    ) -> None:
        self.source = source
        self.digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self.accepts_tools = READS_TOOLS.search(source) is not None
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # A token that the model lacks is undefined for the template, not the word "None".
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._sandbox = sandbox or shared_sandbox()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        switches: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt. Switches are the template's own variables, such as enable_thinking.

        Raises: BadRequest for messages, tools or switches that cannot be rendered, BadTemplate where the template is
        broken or leaves its budget.
        """
        if tools and not self.accepts_tools:
            raise BadRequest("tools were given, but this model's chat template has no place for tools")
        if taken := RESERVED & set(switches or {}):
            raise BadRequest(f"switch {min(taken)!r} is a name that the chat template uses for something else")
        context = {
            "messages": checked_messages(messages),
            "tools": checked_tools(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
            **(switches or {}),
        }
        return self._sandbox.render(self.source, context)


@cache
def shared_sandbox() -> Sandbox:
    """Return the one sandbox of this process."""
    return Sandbox()
