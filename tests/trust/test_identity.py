"""Digests name what decides an answer, and change with any part of it."""

import hashlib
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from freehold.trust.identity import Identity, digest_config, digest_files


def write(folder: Path, **contents: bytes) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_the_digest_of_one_file_is_the_one_that_sha256sum_prints(size, tmp_path):
    data = bytes(range(256)) * (size // 256 + 1)
    assert digest_files(write(tmp_path, a=data[:size])) == sha256(data[:size])


def test_the_digest_of_several_files_is_that_of_what_sha256sum_prints_for_them(tmp_path):
    files = write(tmp_path, b=b"2", a=b"1", c=b"3")
    lines = subprocess.run(["sha256sum", "a", "b", "c"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert digest_files(files) == sha256(lines)


def test_the_order_of_files_does_not_matter_and_their_contents_and_names_do(tmp_path):
    files = write(tmp_path, a=b"1", b=b"2")
    before = digest_files(files)
    assert digest_files(files[::-1]) == before
    write(tmp_path, a=b"2", b=b"1")
    swapped = digest_files(files)
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = digest_files([tmp_path / "a", tmp_path / "c"])
    assert len({before, swapped, renamed}) == 3


@pytest.mark.parametrize("at", [0, 500, 999])
def test_any_byte_changes_the_digest(at, tmp_path):
    data = bytearray(1000)
    (file,) = write(tmp_path, a=bytes(data))
    before = digest_files([file])
    data[at] ^= 1
    file.write_bytes(bytes(data))
    assert digest_files([file]) != before


def test_the_digest_of_a_config_depends_on_its_values_and_not_on_their_order():
    config = {"rope_theta": 1e4, "time_step_limit": [0.0, float("inf")], "nested": {"a": 1, "b": None}}
    shuffled = {"nested": {"b": None, "a": 1}, "time_step_limit": [0.0, float("inf")], "rope_theta": 1e4}
    assert digest_config(config) == digest_config(shuffled)
    assert len({digest_config(config | {"rope_theta": theta}) for theta in (1e4, 1e5, "1e4", None)}) == 4


def test_the_digest_of_a_config_is_the_same_in_every_process():
    code = "from freehold.trust.identity import digest_config; print(digest_config({'b': 1, 'a': 2}))"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "12"
    }
    assert found == {digest_config({"a": 2, "b": 1}) + "\n"}


def test_an_identity_is_a_value():
    parts = {field.name: field.name for field in fields(Identity)}
    identity = Identity(**parts)
    assert identity == Identity(**parts)
    assert all(identity != Identity(**parts | {name: "other"}) for name in parts)
    with pytest.raises(FrozenInstanceError):
        identity.weights = "other"
