"""What fields of several dialects have in common, for pydantic: values told apart by their type, and values refused.

What is not supported is refused by its name. A tag is a type and a noun, such as "text block": tags stand in an error's
place between the keys of the body, and a type alone could be one of these keys.
"""

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field
from pydantic_core import PydanticCustomError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # what of a request is repeated: no text, but what it is called


def tag_by(key: str, noun: str, *, default: str | None = None) -> Discriminator:
    """Return what finds the tag of a value: what stands at its key, and the noun."""

    def tag_of(value: Any) -> str:
        return f"{_type_of(value, key) or default} {noun}"

    return Discriminator(tag_of, custom_error_type="type", custom_error_message=f"this is no {noun} that has a {key}")


def refuse_others(key: str, noun: str, *types: str) -> BeforeValidator:
    """Return what refuses values of other types."""

    def check(value: Any) -> Any:
        found = _type_of(value, key)
        if found is not None and found not in types:
            is_name = isinstance(found, str) and NAME.fullmatch(found)
            which = {"which": f"the {key} {found}" if is_name else f"such a {key}", "types": ", ".join(types)}
            message = f"{noun}s with {{which}} are not supported here, only {{types}}"
            raise PydanticCustomError("unsupported", message, which)
        return value

    return BeforeValidator(check)


def refuse_true(message: str) -> BeforeValidator:
    """Return what refuses true, and says why."""

    def check(value: Any) -> Any:
        if value is True:
            raise PydanticCustomError("unsupported", message)
        return value

    return BeforeValidator(check)


def _refuse_all(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unsupported", "this is not supported")
    return value


# A field that clients send as null, where it asks for nothing.
Unsupported = Annotated[None, BeforeValidator(_refuse_all)]


def _type_of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else getattr(value, key, None)


def _check_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return what can be sent back as it came: Python's parser takes NaN, and halves of characters."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise PydanticCustomError("json", "this is not JSON: NaN, half a character, or nested too deep") from None
    return value


# Of an answer, as in vLLM: a lower one comes before a higher one, and 0 is everybody's.
Priority = Annotated[int, Field(ge=-1000, le=1000, description="Lower is earlier. Below 0 a key needs a scope for it.")]
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_json)]
