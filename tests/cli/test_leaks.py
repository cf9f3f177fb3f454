"""Nothing of the extension outlives a command: what nanobind says at the interpreter's end where it is asked to.

It is not asked to elsewhere (native/bindings.cpp): torch keeps what FSDP2 was given until after the interpreter, and
with it our functions and the kernels that these know.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest

from cli.commands import ENVIRONMENT, TIMEOUT_S, spawn
from cli.folders import write_folder
from freehold.recipes.lora import LoraRunSettings
from freehold.recipes.toml import write_settings
from freehold.train.schedule import Schedule
from models.forms import FORMS
from models.tiny import NEMOTRON
from recipes.small import BYTES, pretraining, small_data, write_data

CXX = os.environ.get("CXX", "c++")
# nanobind's modules of one version share what it counts, and whether it speaks of it.
ASKING = "#include <nanobind/nanobind.h>\nNB_MODULE(asking, module) { nanobind::set_leak_warnings(true); }\n"
START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from freehold.ops.native import extension
kernels = extension()  # first, for it says that nothing is to be said
import asking
"""
RUN = f"{START}from freehold.cli.main import main; main()"
LEAK = f"""{START}
import ctypes
ctypes.pythonapi.Py_IncRef(ctypes.py_object(kernels.forms()[0]))
"""


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """The folder of a module that has nanobind speak of leaks."""
    if not FORMS or not shutil.which(CXX):
        pytest.skip(f"there are no kernels, or no compiler {CXX}")
    nanobind = Path(pytest.importorskip("nanobind", reason="nanobind is not installed").__file__).parent
    folder = tmp_path_factory.mktemp("asking")
    source = folder / "asking.cpp"
    source.write_text(ASKING)
    include = [nanobind / "include", nanobind / "ext" / "robin_map" / "include", sysconfig.get_paths()["include"]]
    # NDEBUG: as the extension is built, for builds of the other kind count apart.
    flags = ["-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-DNDEBUG"]
    command = [CXX, *flags, *(f"-I{path}" for path in include), source, nanobind / "src" / "nb_combined.cpp"]
    subprocess.run([*command, "-o", folder / f"asking{sysconfig.get_config_var('EXT_SUFFIX')}"], check=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint of every kind of block, and runs of its kind."""
    folder = tmp_path_factory.mktemp("runs")
    model = write_folder(folder / "model", NEMOTRON | BYTES)
    write_data(folder)
    new = pretraining(folder, NEMOTRON, total=2, out=folder / "new")
    adapters = LoraRunSettings(
        out=folder / "adapters",
        model=str(model),
        threads=1,
        data=small_data(folder),
        schedule=Schedule(peak=1e-3, total=2),
    )
    (folder / "new.toml").write_text(write_settings(new))
    (folder / "adapters.toml").write_text(write_settings(adapters))
    return folder


def run(start: str, *arguments: object) -> str:
    """Return what a program that succeeds says of errors."""
    command = [sys.executable, "-c", start, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_what_is_left_would_be_said(asking):
    assert "nanobind: leaked 1 instances!" in run(LEAK, asking)


@pytest.mark.parametrize(
    "command", ["train pretrain new.toml", "train lora adapters.toml", "run model hello --max-tokens 4", "check model"]
)
def test_a_command_leaves_nothing(command, asking, folder):
    words = [str(folder / word) if (folder / word).exists() else word for word in command.split()]
    assert "leaked" not in run(RUN, asking, *words)


def test_a_server_leaves_nothing(asking, folder):
    serving = (asking, "serve", folder / "model", "--port", 0, "--memory", 2)
    with spawn(*serving, start=RUN, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        url = process.stdout.readline().strip()
        body = {"model": "model", "prompt": "hello", "max_tokens": 8}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert "leaked" not in errors
