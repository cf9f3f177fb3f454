"""Nothing that a file or a request holds is ever run: no pickle, no code of a model, no program but one.

Guards against unpickling (vLLM CVE-2025-32444, CVE-2025-47277; SGLang CVE-2026-3059; PyTorch CVE-2025-32434, whose
`weights_only` was no protection) and against code in a model's folder (vLLM CVE-2025-66448, CVE-2026-22807,
CVE-2026-27893: three times the same `auto_map`, twice past a switch that forbade it). There is no such switch here.
"""

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import assert_refused, call
from cli.folders import change_config, write_folder
from museum.asked import ANSWERED, ELSEWHERE, STREAMS
from museum.conftest import Harm
from museum.witness import HOOK, RUNS_CODE, STARTS_PROGRAMS, acts_in
from sources import imports, nodes, where

FORBIDDEN_IMPORTS = {
    *("pickle", "_pickle", "cPickle", "marshal", "dill", "shelve", "cloudpickle", "joblib"),
    *("runpy", "imp", "code", "codeop", "pty", "multiprocessing", "ctypes", "cffi"),
    "jinja2",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "execfile"}
FORBIDDEN_ATTRIBUTES = {
    *("torch.load", "torch.jit", "torch.hub", "torch.package", "torch.ops.load_library", "numpy.load", "np.load"),
    *("os.system", "os.popen", "os.forkpty", "os.posix_spawn", "os.posix_spawnp", "yaml.load"),
    *("importlib.reload", "importlib.machinery", "builtins.exec", "builtins.eval"),
}
# The few that start a program or find a module by a name, each from constants of its own.
# pip, when the user fetches; the children that render templates and try schemas.
MAY_START_PROGRAMS = {"checkpoint/fetch.py", "text/sandbox.py", "text/grammar.py"}
MAY_FORK = {"text/grammar_worker.py"}  # itself a child: a fork of it for each schema
MAY_IMPORT_BY_NAME = {
    "ops/native/__init__.py",
    "text/sandbox.py",
    "text/grammar.py",
    "cli/serve.py",
    "cli/starting.py",
}  # kernels; where the children's libraries lie; a server's own modules, sooner
MAY_LOAD_LIBRARIES = {"cli/starting.py: ctypes"}  # torch's own, from where torch lies


def test_no_source_can_run_data():
    imported = {f"{file}: {name}" for file, name in imports() if name.split(".")[0] in FORBIDDEN_IMPORTS}
    imported -= MAY_LOAD_LIBRARIES
    called = {
        f"{where(file, node)}: {node.func.id}"
        for file, node in nodes(ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS
    }
    reached = {
        f"{where(file, node)}: {ast.unparse(node)}"
        for file, node in nodes(ast.Attribute)
        if ast.unparse(node) in FORBIDDEN_ATTRIBUTES or node.attr.startswith(("spawnv", "spawnl", "execv", "execl"))
    }
    assert imported | called | reached == set()


def test_few_sources_start_programs_fork_or_import_by_name_and_they_are_known():
    assert {file for file, name in imports() if name in ("subprocess", "asyncio.subprocess")} <= MAY_START_PROGRAMS
    assert {file for file, node in nodes(ast.Attribute) if ast.unparse(node) == "os.fork"} <= MAY_FORK
    by_name = ("importlib", "importlib.util", "importlib.machinery", "pkgutil")
    assert {file for file, name in imports() if name in by_name} <= MAY_IMPORT_BY_NAME


def test_a_witness_would_see_it(tmp_path):
    """What the tests below do not find is not there; so the witness has to be one."""
    log, program = tmp_path / "acts", tmp_path / "harm.py"
    program.write_text("pass")
    acts = {
        "exec": "exec('1')",
        "compile": "compile('1', 'here', 'eval')",
        "import": "sys.path.insert(0, os.path.dirname(sys.argv[1])); import harm",
        "marshal.loads": "import marshal; marshal.loads(marshal.dumps(1))",
        "pickle.find_class": "import pickle; pickle.loads(pickle.dumps(OSError))",
        "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
        "os.system": "os.system('true')",
        "os.posix_spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
        "socket.connect": "import socket; socket.socket().connect_ex(('127.0.0.1', 9))",
        "socket.getaddrinfo": "import socket; socket.getaddrinfo('127.0.0.1', 9)",
        "open": "open(sys.argv[1]).close()",
    }
    code = "\n".join([HOOK, *acts.values()])
    subprocess.run([sys.executable, "-I", "-c", code, log, program], check=True)
    assert {act.event for act in acts_in(log)} >= set(acts)


def test_a_model_that_brings_code_is_served_without_it(witnessed):
    assert witnessed.ask("/v1/completions", ANSWERED["/v1/completions"]).status_code == 200
    acts = witnessed.acts()
    told = {act.event for act in acts if any(str(witnessed.folder) in value for value in act.values)}
    assert told == {"open"}
    opened = {
        Path(ast.literal_eval(act.values[0])).name
        for act in acts
        if act.event == "open" and str(witnessed.folder) in act.values[0]
    }
    assert not {name for name in opened if name.endswith((".py", ".bin", ".pt"))}
    assert not (witnessed.folder.parent / "harm").exists()
    assert "auto_map names code of its own: ignored" in witnessed.notes.read_text()


def test_the_only_program_that_a_server_starts_is_the_one_that_renders_templates(witnessed):
    assert witnessed.ask("/v1/chat/completions", ANSWERED["/v1/chat/completions"]).status_code == 200
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}, "strict": True}}
    held = witnessed.ask("/v1/chat/completions", {**ANSWERED["/v1/chat/completions"], "response_format": schema})
    assert held.status_code == 400  # this model has no stop token; of others, a child tries the schema
    started = [act for act in witnessed.acts() if act.event in STARTS_PROGRAMS]
    assert {act.event for act in started} == {"subprocess.Popen"}
    programs = [re.findall(r"/freehold/text/(\w+)\.py", act.values[1]) for act in started]
    assert programs == [["sandbox_worker"]]


def ask_everything(witnessed):
    for path, body in ANSWERED.items():
        assert witnessed.ask(path, body).status_code == 200, path
    for path in STREAMS:
        assert witnessed.ask(path, ANSWERED[path] | {"stream": True}).status_code == 200, path
    for path, body in ELSEWHERE.values():
        assert witnessed.ask(path, body).status_code in (400, 404), body


def test_requests_run_no_code_import_nothing_and_open_no_file_but_the_page(witnessed):
    ask_everything(witnessed)  # what is loaded on first use has been loaded then
    before = len(witnessed.acts())
    ask_everything(witnessed)
    done = witnessed.acts()[before:]
    assert [act for act in done if act.event in RUNS_CODE or act.event in STARTS_PROGRAMS] == []
    assert [act for act in done if act.event == "open" and "/serve/static/" not in act.values[0]] == []


def test_a_config_that_asks_to_be_trusted_is_refused(tmp_path):
    folder = change_config(write_folder(tmp_path / "model"), trust_remote_code=True)
    assert_refused(call("inspect", folder), "UnsupportedModel")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_pickle_by_another_name_is_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Harm(f"open({str(tmp_path / 'harm')!r}, 'w')")))
    assert_refused(call("inspect", tmp_path / name), "BadFile")
    assert not (tmp_path / "harm").exists()


def test_a_folder_with_nothing_but_pickles_has_no_model(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(f"open({str(tmp_path / 'harm')!r}, 'w')")))
    ended = call("run", folder, "hi")
    assert ended.code == 2
    assert not (tmp_path / "harm").exists()
