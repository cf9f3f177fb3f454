"""The AVX-512 forms where the machine has none: built with their intrinsics emulated, they run the tests of the ops."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.forms import FORMS

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"
CXX = os.environ.get("CXX", "c++")

# -O1: half the time to compile, and fast enough. The emulation's vectors are no one's interface, hence -Wno-psabi.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-I{NATIVE}"]
EMULATED = ["-mavx2", "-mfma", "-mf16c", "-include", str(Path(__file__).with_name("avx512_emulated.h"))]
FORM_FLAGS = {"portable": [], "avx512": EMULATED, "avx512vnni": [*EMULATED, "-DFREEHOLD_VNNI"]}
KERNELS = (
    "attention attention_mixer kernels linear_packed linear_plain mamba2 mamba2_mixer mlp moe rows"  # as CMakeLists.txt
).split()
SHARED = ["pack", "pool", "program", "scratch"]

# In the place of native/cpu.cpp: a machine that runs the AVX-512 forms, and takes the portable one for AVX2.
CPU = """
#include "cpu.h"
#include "kernels.h"
namespace freehold {
namespace portable { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels() { return portable::kernels(); } }
bool runs_avx2() { return false; }
bool runs_avx512() { return true; }
bool runs_avx512vnni() { return true; }
}
"""

# What compares forms, bit for bit.
TESTS = [
    ("ops/test_norm.py", "same_bits"),
    ("ops/test_linear.py", "same_bits or nowhere_else"),
    ("ops/test_mixers.py", "test_a_block_has or (packed_block_has and bfloat16)"),
]


def compile_all(sources: list[tuple[Path, list[str]]], folder: Path) -> None:
    """Compile each source with its own flags, and link all to folder/_kernels.so."""

    def compile_one(numbered: tuple[int, tuple[Path, list[str]]]) -> str:
        number, (source, flags) = numbered
        out = str(folder / f"{number}.o")
        done = subprocess.run([CXX, *FLAGS, *flags, "-c", str(source), "-o", out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, enumerate(sources)))
    subprocess.run([CXX, "-shared", "-pthread", "-o", str(folder / "_kernels.so"), *objects], check=True)


def build(folder: Path, nanobind: Path) -> Path:
    """Return the extension, built with the portable form and the two of AVX-512, emulated."""
    (folder / "cpu.cpp").write_text(CPU)
    include = [sysconfig.get_paths()["include"], nanobind / "include", nanobind / "ext" / "robin_map" / "include"]
    binding = ["-DFREEHOLD_X86", "-fno-strict-aliasing", *(f"-I{path}" for path in include)]
    sources = [
        (NATIVE / f"{name}.cpp", [*flags, f"-DFREEHOLD_FORM={form}"])
        for name in KERNELS
        for form, flags in FORM_FLAGS.items()
    ]
    sources += [(NATIVE / "bindings.cpp", binding), (nanobind / "src" / "nb_combined.cpp", binding)]
    sources += [(NATIVE / f"{name}.cpp", []) for name in SHARED] + [(folder / "cpu.cpp", [])]
    compile_all(sources, folder)
    return folder / "_kernels.so"


def test_the_avx512_forms_pass_the_tests_of_the_ops(tmp_path):
    if "avx512vnni" in FORMS:
        pytest.skip("this machine runs them itself")
    if "avx2" not in FORMS:
        pytest.skip("the emulation is made of AVX2, which this machine has not, or there are no kernels")
    if not shutil.which(CXX):
        pytest.skip(f"there is no compiler {CXX}")
    nanobind = Path(pytest.importorskip("nanobind", reason="nanobind is not installed").__file__).parent
    environment = os.environ | {"FREEHOLD_TEST_KERNELS": str(build(tmp_path, nanobind)), "FREEHOLD_NATIVE": "avx512"}
    for file, chosen in TESTS:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / file),
            "-k",
        ]
        done = subprocess.run([*command, chosen], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
