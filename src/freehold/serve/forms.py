"""What the dialects of the API say of an answer's form: calls that have to be made, a schema to keep to."""

from collections.abc import Mapping
from typing import Any

from freehold.text.answer_grammar import Form

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def form_of(
    choice: str | None,
    *,
    name: str | None = None,
    is_parallel: bool = True,
    is_strict: bool = False,
    schema: Mapping[str, Any] | None = None,
) -> Form:
    """Return the form of an answer.

    choice: none, auto or required, in OpenAI's words. name: of the one function that has to be called, whatever the
    choice. is_strict: whether a tool is.
    """
    if name is not None:
        return Form(calls="one", name=name)
    if choice == "required":
        return Form(calls="some" if is_parallel else "one")
    return Form(holds_calls=is_strict and choice != "none", schema=schema)
