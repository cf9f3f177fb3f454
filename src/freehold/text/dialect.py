"""How the models of a family mark reasoning and tool calls in what they write. One description drives every parser.

The marks arrive as text. How calls are read is in calls.py, how an answer is split in answer.py.
"""

from dataclasses import dataclass, replace
from typing import Literal

CallFormat = Literal["xml", "json", "bare json"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The marks of one family. `reasons` says whether <think> ... </think> may come first."""

    name: str
    call_format: CallFormat
    call_open: str
    call_close: str | None  # None: a call goes on to the end of the answer
    reasons: bool
    think_open: str = "<think>"
    think_close: str = "</think>"

    def is_reasoning_after(self, prompt: str) -> bool:
        """Return whether the prompt has opened the reasoning already, so that the answer begins inside it."""
        return self.reasons and prompt.rstrip().endswith(self.think_open)


# <tool_call>\n<function=NAME>\n<parameter=P>\nVALUE\n</parameter>\n</function>\n</tool_call>
# A VALUE is written as it is: one with </tool_call>, or with </parameter> on a line of its own, cannot be told from the
# end. JSON can hold its marks in strings, and they end nothing there.
NEMOTRON = Dialect(name="nemotron", call_format="xml", call_open="<tool_call>", call_close="</tool_call>", reasons=True)
# <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>
QWEN = Dialect(name="qwen", call_format="json", call_open="<tool_call>", call_close="</tool_call>", reasons=True)
# {"name": NAME, "parameters": {...}} as the whole answer, or after <|python_tag|>, there also NAME.call(P=VALUE)
LLAMA = Dialect(name="llama", call_format="bare json", call_open="<|python_tag|>", call_close=None, reasons=False)

DIALECTS = {dialect.name: dialect for dialect in (NEMOTRON, QWEN, LLAMA)}


def dialect_for(family: str, template: str | None) -> Dialect:
    """Return the dialect of a model: that of its family, corrected by what its chat template shows.

    A family is an architecture, and its models may be trained on another's format. So a template that writes
    `<function=` is read as Nemotron's, else one with `<tool_call>` as Qwen's, else one with `<|python_tag|>` or the
    role `ipython` as Llama's. Reasoning is looked for where the template names `<think>`. A template without any of
    these, such as SmolLM2's ChatML, has no format for calls: ChatTemplate.accepts_tools is false then, and without
    tools each dialect leaves the answer as it is. Without a template the family alone decides.
    """
    assert family in DIALECTS, f"no dialect for family {family!r}"
    if template is None:
        return DIALECTS[family]
    if "<function=" in template:
        dialect = NEMOTRON
    elif "<tool_call>" in template:
        dialect = QWEN
    elif "<|python_tag|>" in template or "ipython" in template:
        dialect = LLAMA
    else:
        dialect = DIALECTS[family]
    return replace(dialect, reasons="<think>" in template)
