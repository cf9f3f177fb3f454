"""The house rules that a program can check: ranks, sizes, names, who may read, print and open, what docs must list."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT, SRC, folder_of, imports, nodes, sources, where

RANKS = {
    **dict.fromkeys(("errors", "settings"), 0),
    **dict.fromkeys(("ops", "text", "trust"), 1),
    "models": 2,
    **dict.fromkeys(("checkpoint", "quantize", "adapt", "parallel"), 3),
    **dict.fromkeys(("engine", "train"), 4),
    **dict.fromkeys(("recipes", "evaluate"), 5),
    "serve": 6,
    "cli": 7,
}
ALLOWED_IN_RANK = {("checkpoint", "quantize"), ("settings", "errors")}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAME = re.compile(r"^(do|process|handle)_|^Base[A-Z]|Manager|(^|_)(utils?|common|helpers?)(_|$)|Helper")
WITNESSES = {"transformers", "llama_cpp", "vllm"}  # in tests and benchmarks, never suppliers
# What turns a file of weights into bytes or tensors. Writing is free; fetch moves bytes without looking at them.
READS_FILES = {"mmap", "read_bytes", "safe_open", "GGUFReader", "memmap", "fromfile", "from_file"}
MAY_READ_FILES = {"checkpoint/source.py", "checkpoint/fetch.py", "checkpoint/text_side.py"}
WITHOUT_TORCH = (
    "text",
    "engine/request.py",
    "engine/scheduler.py",
    "serve/schema.py",
    "serve/anthropic_schema.py",
    "serve/responses_schema.py",
    "cli/main.py",
    "checkpoint/fetch.py",
)
# Run as a program (python -m pip), and what uvicorn imports for us: not imported.
RUN_NOT_IMPORTED = {"pip", "httptools"}
HOST_WORDS = re.compile(r"index[-_]url|find[-_]links|trusted-host|/(?:opt|root|work)/")


def texts() -> list[Path]:
    """Return every file of the project that a person writes."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for name in ("src", "native", "tests", "bench", "examples", "docs", ".ci"):
        files += [path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path for path in files if path.suffix in (".py", ".md", ".toml", ".txt", ".h", ".cpp", ".lock", "")]


def public_definitions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for file, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                yield file, node


def test_imports_go_to_lower_ranks():
    wrong = []
    for file, name in imports():
        mine, parts = folder_of(file), name.split(".")
        if mine in ("__init__", "__main__") or parts[0] != "freehold" or len(parts) == 1:
            continue
        other = parts[1]
        assert mine in RANKS, f"{file}: its folder has no rank"
        lower = RANKS.get(other, 99) < RANKS[mine]
        if not (other == mine or lower or (mine, other) in ALLOWED_IN_RANK or other == "__version__"):
            wrong.append(f"{file} imports {name}")
    assert wrong == []


def test_files_are_short():
    counts = {path: len(path.read_text().splitlines()) for path in texts() if path.suffix in (".py", ".cpp", ".h")}
    assert {path.name: count for path, count in counts.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short():
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    long = {f"{where(file, node)} {node.name}": node.end_lineno - node.lineno + 1 for file, node in functions}
    assert {name: count for name, count in long.items() if count > MAX_FUNCTION_LINES} == {}


def test_names_say_what_a_thing_is():
    names = [(file, Path(file).stem) for file in sources()]
    names += [
        (where(file, node), node.name) for file, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    assert [f"{place} {name}" for place, name in names if FORBIDDEN_NAME.search(name)] == []


def test_only_settings_reads_the_environment():
    found = {file for file, node in nodes(ast.Attribute) if node.attr in ("environ", "environb", "getenv")}
    found |= {file for file, node in nodes(ast.alias) if node.name in ("environ", "environb", "getenv")}
    assert found <= {"settings.py"}


def test_only_the_command_line_prints():
    called = {where(file, node) for file, node in nodes(ast.Name) if node.id == "print" and folder_of(file) != "cli"}
    written = {
        where(file, node)
        for file, node in nodes(ast.Attribute)
        if node.attr in ("stdout", "stderr") and ast.unparse(node.value) == "sys" and folder_of(file) != "cli"
    }
    imported = {
        file for file, name in imports() if name.split(".")[0] in ("rich", "typer") and folder_of(file) != "cli"
    }
    assert called | written | imported == set()


def test_only_the_source_opens_weight_files():
    def reads(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            writes = any(isinstance(mode, str) and re.fullmatch(r"[wxa][bt+]*", mode) for mode in modes)
            return name == "open" and not writes
        return (
            isinstance(node, ast.Name | ast.Attribute) and getattr(node, "id", getattr(node, "attr", "")) in READS_FILES
        )

    folders = {"ops", "models", "checkpoint", "quantize", "adapt", "parallel", "engine"}
    found = nodes((ast.Call, ast.Name, ast.Attribute))
    assert {where(f, n) for f, n in found if folder_of(f) in folders and f not in MAY_READ_FILES and reads(n)} == set()


def test_witnesses_are_no_suppliers():
    assert [f"{file}: {name}" for file, name in imports() if name.split(".")[0] in WITNESSES] == []


def test_modules_that_promise_to_live_without_torch_do_not_load_it():
    files = [file for file in sources() if file.startswith(WITHOUT_TORCH)]
    modules = ["freehold." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC.parent)}).returncode == 0


def test_what_is_public_is_described():
    missing = [file for file, tree in sources().items() if not ast.get_docstring(tree)]
    missing += [
        f"{where(file, node)} {node.name}" for file, node in public_definitions() if not ast.get_docstring(node)
    ]
    assert missing == []


def test_public_functions_take_named_arguments_only():
    taking = [
        f"{where(file, node)} {node.name}"
        for file, node in public_definitions()
        if hasattr(node, "args") and node.args.kwarg
    ]
    assert taking == []


def test_dependencies_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    written = [*project["dependencies"], *optional["hub"], *optional["parquet"], *optional["tensorboard"]]
    declared = {plain(re.split(r"[<>=!~\[; ]", requirement)[0]) for requirement in written}
    distributions = importlib.metadata.packages_distributions()
    top = {name.split(".")[0] for _, name in imports()} - set(sys.stdlib_module_names) - {"freehold"}
    imported = {plain(distributions.get(name, [name])[0]) for name in top}
    assert imported == declared - RUN_NOT_IMPORTED


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_file_names_a_registry_or_a_machine():
    found = {
        path.name: match[0]
        for path in texts()
        if path != Path(__file__) and (match := HOST_WORDS.search(path.read_text()))
    }
    assert found == {}


def test_the_map_names_every_source_file():
    text = (ROOT / "docs" / "map.md").read_text()
    files = [file for file in sources() if not file.endswith("__init__.py")]
    files += [f"native/{path.name}" for path in sorted((ROOT / "native").iterdir())]
    assert [file for file in files if file not in text] == []


def test_the_command_line_is_documented_as_it_is():
    from freehold.cli.reference import render

    assert (ROOT / "docs" / "cli.md").read_text() == render(), "python -m freehold.cli.reference > docs/cli.md"


def test_every_link_in_the_docs_leads_somewhere():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
