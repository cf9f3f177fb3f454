"""The project's own sources, for tests of what is written in them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "freehold"


@cache
def sources() -> dict[str, ast.Module]:
    """Return every module of the package, by its path below src/freehold."""
    return {path.relative_to(SRC).as_posix(): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield file, node


def imports() -> Iterator[tuple[str, str]]:
    """Yield each file with the full name of each module that it imports, also within functions."""
    for file, node in nodes((ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            yield file, f"{node.module}"
            if node.module == "freehold":
                yield from ((file, f"freehold.{alias.name}") for alias in node.names)
        else:
            yield from ((file, alias.name) for alias in node.names)


def folder_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def where(file: str, node: ast.AST) -> str:
    return f"{file}:{node.lineno}"
