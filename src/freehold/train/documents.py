"""Files of rows: JSONL, Parquet and plain text, read one row after the other and refused at the first that is broken.

Belongs here: file formats, and which keys a row has. Not here: what becomes of a text or a conversation (tokenized.py).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from freehold.errors import BadFile, NotFound, UnsupportedModel

SUFFIXES = (".jsonl", ".parquet", ".txt")
PARQUET_ROWS = 256  # read at once


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A document of running text. where: file and row, for errors."""

    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A conversation, as a file has it: not checked. where: file and row, for errors."""

    where: str
    messages: Any
    tools: Any = None


Row = TextRow | ChatRow


def read_rows(file: Path, *, ignored: frozenset[str] = frozenset()) -> Iterator[tuple[Row, float]]:
    """Yield the rows of a file, each with the share of the file that is read by then.

    A row of JSONL or Parquet has `text`, or `messages` and perhaps `tools`; of other keys only `ignored` ones may be
    there. A .txt file is one document.
    Raises: NotFound, BadFile, UnsupportedModel.
    """
    check_format(file)
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".txt": _text_rows}
    rows = readers[file.suffix](file)
    for where, content, share in rows:
        yield _row(where, content, ignored), share


def check_format(file: Path) -> None:
    """Refuse what is no file, or of no known format. Raises: NotFound, BadFile."""
    if not file.is_file():
        raise NotFound(f"there is no file {file}")
    if file.suffix not in SUFFIXES:
        raise BadFile(f"{file.name} is none of {', '.join(SUFFIXES)}", hint="the suffix says what a file holds")


def _text_rows(file: Path) -> Iterator[tuple[str, Any, float]]:
    yield file.name, {"text": _decoded(file.read_bytes(), file.name)}, 1.0


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any, float]]:
    size, done = file.stat().st_size, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            done += len(line)
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            try:
                content = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise BadFile(f"{where}, column {error.colno}: no JSON ({error.msg})") from None
            except (ValueError, RecursionError):
                raise BadFile(f"{where}: JSON that is nested too deep, or with too long a number") from None
            yield where, content, done / size


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any, float]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UnsupportedModel(
            f"{file.name}: reading Parquet takes pyarrow", hint="pip install 'freehold[parquet]'"
        ) from None
    number = 0
    try:
        with ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=PARQUET_ROWS):
                for content in batch.to_pylist():
                    number += 1
                    where = f"{file.name}, row {number}"
                    given = {key: value for key, value in content.items() if value is not None}
                    _refuse_structs(where, given)
                    yield where, given, number / opened.metadata.num_rows
    except (ArrowException, OSError) as error:
        raise BadFile(f"{file.name} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


def _refuse_structs(where: str, content: Mapping[str, Any]) -> None:
    """Refuse arguments and tools as structs: Parquet gives every row the keys of all, so what was absent is null."""
    fields = [("tools", content.get("tools"))]
    calls = [call for message in _structs(content.get("messages")) for call in _structs(message.get("tool_calls"))]
    for function in _structs([call.get("function") for call in calls]):
        fields.append(("function.arguments", function.get("arguments")))
    for name, value in fields:
        if value is not None and not isinstance(value, str):
            raise BadFile(f"{where}: {name} is a {type(value).__name__} where JSON in a text is wanted, in Parquet")


def _structs(found: Any) -> list[dict[str, Any]]:
    """Return the structs of a list; none of what is something else, which is refused where it is read."""
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _row(where: str, content: Any, ignored: frozenset[str]) -> Row:
    if not isinstance(content, dict):
        raise BadFile(f"{where}: a {type(content).__name__} where an object is wanted")
    given = {key: value for key, value in content.items() if key not in ignored}
    if unknown := sorted(given.keys() - {"text", "messages", "tools"}):
        raise BadFile(
            f"{where}: unknown key {unknown[0]!r}; known are text, or messages and tools",
            hint=f"--ignore {unknown[0]} leaves it out where nothing is to be learnt from it",
        )
    if given.keys() == {"text"} and isinstance(given["text"], str):
        return TextRow(where=where, text=given["text"])
    if "messages" in given and "text" not in given:
        return ChatRow(where=where, messages=given["messages"], tools=_read_tools(where, given.get("tools")))
    _refuse(where, given)


def _read_tools(where: str, tools: Any) -> Any:
    """Return tools, also where they are JSON in a text, as data sets keep them whose columns have types."""
    if not isinstance(tools, str):
        return tools or None
    try:
        return json.loads(tools) or None
    except (ValueError, RecursionError):
        raise BadFile(f"{where}: tools is a text that is no JSON") from None


def _refuse(where: str, given: Mapping[str, Any]) -> NoReturn:
    if "text" in given and len(given) == 1:
        raise BadFile(f"{where}: text is a {type(given['text']).__name__} where a text is wanted")
    keys = ", ".join(sorted(given)) or "no key"
    raise BadFile(f"{where}: {keys} where text, or messages and perhaps tools, is wanted")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{where}: byte {error.start} is not UTF-8") from None
