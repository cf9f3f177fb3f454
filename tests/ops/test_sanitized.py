"""The kernels built with sanitizers, and with the AVX-512 forms also where the machine has none: their intrinsics are
emulated there. They run the tests of the ops, where an access out of bounds or an undefined operation ends the process.
"""

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

# -O1: half the time to compile, and fast enough; registers are given out the quick way, which halves it once more for
# the unrolled tiles of quantized products. The emulation's vectors are no one's interface, hence -Wno-psabi.
OPTIMIZE = ["-O1", "-fira-algorithm=priority", "-fira-region=one", "-fno-ira-share-spill-slots"]
FLAGS = ["-std=c++20", *OPTIMIZE, "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-I{NATIVE}"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
HAS_AVX512 = "avx512vnni" in FORMS
AVX512 = (
    [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    if HAS_AVX512
    else [*AVX2, "-include", str(Path(__file__).with_name("avx512_emulated.h"))]
)
FORM_FLAGS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512vnni": [*AVX512, "-DFREEHOLD_VNNI"]}
KERNELS = (  # as CMakeLists.txt
    "attention attention_gradient attention_mixer attention_write dense_gradient kernels linear_float linear_quantized"
    " mamba2 mamba2_gradient mamba2_mixer mlp moe peaks rows sampling scan_gradient"
).split()
SHARED = ["memory", "pack", "pool", "program", "scratch"]

# In the place of native/cpu.cpp: a machine that runs every form.
CPU = """
#include "cpu.h"
namespace freehold {
bool runs_avx2() { return true; }
bool runs_avx512() { return true; }
bool runs_avx512vnni() { return true; }
}
"""

# What runs every form, and compares them bit for bit.
TESTS = {
    "ops/test_norm.py": "twin or bits",
    "ops/test_gradients.py": "reference or torchs",
    "ops/test_linear.py": "same_bits or nowhere_else or packing or rows_of_a",
    "ops/test_mixers.py": "test_a_block_has or eight_bits_has or (packed_block_has and bfloat16)",
    "ops/test_mamba2.py": "forms or float64",
    "ops/test_moe.py": "float64",
    "ops/test_sampling.py": "likeliest or twin",
    "evaluate/test_limits.py": "",
}


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
    subprocess.run([CXX, "-shared", "-pthread", *SANITIZE, "-o", str(folder / "_kernels.so"), *objects], check=True)


def build(folder: Path, nanobind: Path) -> Path:
    """Return the extension, built with all forms; nanobind itself is left as it is."""
    (folder / "cpu.cpp").write_text(CPU)
    include = [sysconfig.get_paths()["include"], nanobind / "include", nanobind / "ext" / "robin_map" / "include"]
    binding = ["-DFREEHOLD_X86", "-fno-strict-aliasing", *(f"-I{path}" for path in include)]
    sources = [
        (NATIVE / f"{name}.cpp", [*SANITIZE, *flags, f"-DFREEHOLD_FORM={form}"])
        for name in KERNELS
        for form, flags in FORM_FLAGS.items()
    ]
    sources += [(NATIVE / f"{name}.cpp", SANITIZE) for name in SHARED]
    sources += [(NATIVE / "bindings.cpp", binding), (nanobind / "src" / "nb_combined.cpp", binding)]
    sources += [(folder / "cpu.cpp", [])]
    compile_all(sources, folder)
    return folder / "_kernels.so"


def runtime_of_sanitizers() -> str:
    """Return what must be loaded before everything else, for Python itself is built without sanitizers."""
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    found = [subprocess.run([CXX, name], capture_output=True, text=True, check=True).stdout.strip() for name in names]
    return " ".join(found)


def test_all_forms_pass_the_tests_of_the_ops_under_sanitizers(tmp_path):
    if "avx2" not in FORMS:
        pytest.skip("the emulation is made of AVX2, which this machine has not, or there are no kernels")
    if not shutil.which(CXX):
        pytest.skip(f"there is no compiler {CXX}")
    nanobind = Path(pytest.importorskip("nanobind", reason="nanobind is not installed").__file__).parent
    environment = os.environ | {
        "FREEHOLD_TEST_KERNELS": str(build(tmp_path, nanobind)),
        "LD_PRELOAD": runtime_of_sanitizers(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    for file, chosen in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / file)]
        done = subprocess.run([*command, "-k", chosen], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
