"""A recipe's file: TOML to frozen settings, strictly, and settings to a file that explains its keys.

Belongs here: keys, types and what no number may be. Not here: which keys there are; each recipe's settings say that.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from freehold.errors import BadInput
from freehold.train.schedule import Schedule

Settings = TypeVar("Settings")

WIDTH = 100  # of the comments in an example


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is known of a key beside its type and default: the annotation of a field.

    says: its comment. least: what its numbers are at least; most: its whole numbers at most. example: its value in an
    example where it has no default.
    """

    says: str
    least: int = 0
    most: int = 2**63 - 1  # of torch's seeds and sizes; no number that means something is larger
    example: Any = None


def read_settings(text: str, kind: type[Settings], *, changes: Sequence[str] = ()) -> Settings:
    """Return the settings that a file's text gives, with what `table.key=value` changes.

    Raises: BadInput, with one line that names the key.
    """
    tables = _parsed(text, "the file")
    for change in changes:
        name, found, value = change.partition("=")
        if not found:
            raise BadInput(f"{change!r:.80} changes nothing", hint="--set schedule.total=100")
        *path, last = name.strip().split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise BadInput(f"`{name.strip()}`: `{part}` is no table")
        table[last] = _value_of(value.strip())
    settings = _settings(kind, tables, "")
    assert isinstance(settings, kind), "that is what was asked for"
    return settings


def _parsed(text: str, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # one of TOML, or of a number with thousands of digits
        raise BadInput(f"{what} is no TOML: {error}") from None


def _value_of(text: str) -> Any:
    """Return a value as TOML reads it; what is no TOML is a text, so that a shell needs no second quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A field of a settings class: its name, its type, what its annotation says, and its default or MISSING."""

    name: str
    wanted: Any
    key: Key
    default: Any

    @property
    def shown(self) -> Any:
        """Its value in an example."""
        return self.key.example if self.default is MISSING else self.default


def _entries(kind: type[Any]) -> dict[str, _Entry]:
    hints, found = get_type_hints(kind, include_extras=True), {}
    for entry in fields(kind):
        hint, key = hints[entry.name], Key(says="")
        if get_origin(hint) is Annotated:
            hint, key = get_args(hint)
        found[entry.name] = _Entry(name=entry.name, wanted=hint, key=key, default=entry.default)
    return found


def _settings(kind: type[Any], table: Mapping[str, Any], where: str, base: Any = None) -> Any:
    """Return a dataclass made of a table; what the table does not say is as in `base`, or the class's default."""
    known = _entries(kind)
    for name in table:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise BadInput(f"`{where}{name}` is no key", hint=f"the nearest is `{where}{near[0]}`")
    values = {name: _checked(known[name], value, where) for name, value in table.items()}
    if isinstance(base, Schedule):
        base = base.scaled(values.get("total", base.total))
    if base is not None:
        return replace(base, **values)
    for name, entry in known.items():
        if name not in table and entry.default is MISSING:
            raise BadInput(f"`{where}{name}` is missing", hint=entry.key.says)
    return kind(**values)


def _checked(entry: _Entry, value: Any, where: str) -> Any:
    name = f"{where}{entry.name}"
    if is_dataclass(entry.wanted):
        if not isinstance(value, dict):
            raise BadInput(f"`{name}` is {value!r:.60}, wanted a table")
        assert isinstance(entry.wanted, type), "annotations are classes"
        return _settings(entry.wanted, value, f"{name}.", None if entry.default is MISSING else entry.default)
    converted = _converted(entry.wanted, value)
    if converted is None:
        raise BadInput(f"`{name}` is {value!r:.60}, wanted {_words(entry.wanted)}")
    numbers = [number for number in _listed(converted) if type(number) in (int, float)]
    if not all(number >= entry.key.least for number in numbers):  # NaN is not, either
        raise BadInput(f"`{name}` is {value!r:.60}, wanted {entry.key.least} or more")
    if math.inf in numbers:
        raise BadInput(f"`{name}` is {value!r:.60}, wanted a number with an end")
    if any(type(number) is int and number > entry.key.most for number in numbers):
        raise BadInput(f"`{name}` is {value!r:.60}, wanted {entry.key.most} or less")
    return converted


def _converted(wanted: Any, value: Any) -> Any:
    """Return a value as its annotation wants it, None where it cannot be that."""
    if get_origin(wanted) in (Union, UnionType):
        found = [_converted(one, value) for one in get_args(wanted) if one is not type(None)]
        return next((one for one in found if one is not None), None)
    if get_origin(wanted) is Literal:
        return value if value in get_args(wanted) else None
    if get_origin(wanted) is tuple:
        return _converted_tuple(get_args(wanted), value)
    if get_origin(wanted) is dict:
        return value if isinstance(value, dict) and _is_json(value) else None
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is Path:
        return Path(value) if isinstance(value, str) and value else None
    return value if type(value) is wanted and value != "" else None


def _converted_tuple(parts: tuple[Any, ...], value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, list | tuple):
        return None
    kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
    if len(kinds) != len(value):
        return None
    converted = tuple(_converted(kind, one) for kind, one in zip(kinds, value, strict=True))
    return None if None in converted else converted


def _is_json(value: Any) -> bool:
    """Return whether a table is what JSON knows, too: dates and times are not."""
    try:
        json.dumps(value)
    except (TypeError, RecursionError):
        return False
    return True


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else [value]


def _words(wanted: Any) -> str:
    """Return in words what an annotation wants."""
    if get_origin(wanted) in (Union, UnionType):
        return " or ".join(_words(one) for one in get_args(wanted) if one is not type(None))
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(get_args(wanted))
    if get_origin(wanted) is tuple:
        parts = get_args(wanted)
        return f"a list of {_words(parts[0])}" if parts[-1] is Ellipsis else f"a list of {len(parts)} numbers"
    if get_origin(wanted) is dict:
        return "a table without dates"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    return names[wanted]


def write_example(kind: type[Any]) -> str:
    """Return a file that `read_settings` takes: every key with its default, or an example, and what it means."""
    return _written({name: (entry, entry.shown) for name, entry in _entries(kind).items()})


def write_settings(settings: Any) -> str:
    """Return the file that gives these settings, with what its keys mean."""
    return _written({name: (entry, getattr(settings, name)) for name, entry in _entries(type(settings)).items()})


def _written(shown: Mapping[str, tuple[_Entry, Any]]) -> str:
    """Return a file of keys, then of tables: a TOML file's own keys end where its first table begins."""
    tables = {
        name: (entry, value) for name, (entry, value) in shown.items() if is_dataclass(value) or type(value) is dict
    }
    lines = [line for name, (entry, value) in shown.items() if name not in tables for line in _key_lines(entry, value)]
    for name, (entry, value) in tables.items():
        lines += ["", *_comment(entry.key.says), f"[{name}]", *_table_lines(value)]
    return "\n".join(lines) + "\n"


def _table_lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name} = {_toml(one)}" for name, one in value.items()]
    entries = _entries(type(value))
    return [line for name, entry in entries.items() for line in _key_lines(entry, getattr(value, name))]


def _key_lines(entry: _Entry, value: Any) -> list[str]:
    return [*_comment(entry.key.says), f"# {entry.name} =" if value is None else f"{entry.name} = {_toml(value)}"]


def _comment(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case tuple() | list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{ {', '.join(f'{json.dumps(name)} = {_toml(one)}' for name, one in value.items())} }}"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)  # a basic string of TOML
        case _:
            return str(value)
