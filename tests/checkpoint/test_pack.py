"""Packed weights: kept at their stored width, kept in a file, and never taken from another model's."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from freehold.checkpoint import pack
from freehold.checkpoint.load import LoadReport, load_decoder, open_described
from freehold.checkpoint.pack import kept_path, open_kept, write_kept
from freehold.errors import BadFile, BadInput
from freehold.models.decoder import Decoder
from freehold.models.layout import Layout
from freehold.ops.native import kernels
from inputs import smollm2_gguf
from models.tiny import random_tokens

pytestmark = pytest.mark.skipif(kernels() is None, reason="weights are packed for the native kernels, which are off")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(smollm2_gguf(), tmp_path_factory.mktemp("packed") / "model.gguf"))


@pytest.fixture
def without_kept(model: Path) -> Iterator[Path]:
    yield model
    kept_path(model).unlink(missing_ok=True)


def loaded(path: Path, *, keep_packed: bool = True) -> tuple[Decoder, LoadReport]:
    source, described = open_described(path)
    with source:
        return load_decoder(source, described, dtype=torch.float32, device=torch.device("cpu"), keep_packed=keep_packed)


def keep(path: Path) -> Path:
    source, described = open_described(path)
    with source:
        return write_kept(source, described.matches.matches)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(random_tokens(9, vocab_size=40000), Layout.packed([9])))


def test_packed_values_are_the_stored_ones_bit_for_bit(model):
    packed, report = loaded(model)
    plain, _ = loaded(model, keep_packed=False)
    parameters = dict(plain.named_parameters())
    assert len(packed.packed_weights()) == 211
    for name, weight in packed.packed_weights().items():
        assert torch.equal(weight.dense(), parameters[name]), name
    assert report.tensors == {("Q4_1", None): 210, ("Q8_0", None): 1, ("F32", torch.float32): 61}


def test_packed_weights_take_the_bytes_that_the_file_has(model):
    packed, _ = loaded(model)
    source, described = open_described(model)
    source.close()
    stored = sum(t.num_bytes for m in described.matches.matches for t in m.stored if t.format != "F32")
    assert sum(weight.nbytes for weight in packed.packed_weights().values()) == stored


def test_a_kept_file_is_mapped_and_gives_the_same_bits(without_kept):
    packed, before = loaded(without_kept)
    keep(without_kept)
    mapped, after = loaded(without_kept)
    assert before.mapped_bytes < before.copied_bytes
    assert after.copied_bytes + after.mapped_bytes == before.copied_bytes + before.mapped_bytes
    assert after.copied_bytes < 0.01 * after.mapped_bytes  # what is small lies in memory in both
    assert torch.equal(logits(mapped), logits(packed))


def test_a_kept_file_of_another_model_is_not_used(model, tmp_path):
    changed = Path(shutil.copy(model, tmp_path / model.name))
    keep(changed)
    source, _ = open_described(changed)
    with source:
        kept = open_kept(source)
        assert kept is not None
        kept.close()
        largest = max(source.tensors.values(), key=lambda tensor: tensor.num_bytes)
    with changed.open("r+b") as file:
        file.seek(largest.offset)
        file.write(b"\xff" * 32)
    source, _ = open_described(changed)
    with source:
        assert open_kept(source) is None


def test_a_kept_file_that_is_cut_short_is_packed_anew(without_kept):
    kept = keep(without_kept)
    with kept.open("r+b") as cut:
        cut.truncate(1000)
    decoder, report = loaded(without_kept)
    assert report.copied_bytes > report.mapped_bytes
    assert logits(decoder).isfinite().all()


def test_a_kept_file_that_lacks_a_weight_is_one_clear_line(without_kept, monkeypatch):
    whole = pack.is_packable
    monkeypatch.setattr(pack, "is_packable", lambda match: whole(match) and "blocks.3." not in match.name)
    keep(without_kept)
    monkeypatch.undo()
    with pytest.raises(BadFile, match=r"has no `blocks\.\d+\.mixer\.\w+\.weight` of the wanted size"):
        loaded(without_kept)


def test_nothing_partial_is_left_when_packing_is_interrupted(without_kept):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    source, described = open_described(without_kept)
    with source, pytest.raises(KeyboardInterrupt):
        write_kept(source, described.matches.matches, progress=stop)
    assert [path.name for path in without_kept.parent.iterdir()] == [without_kept.name]


def test_a_disk_without_room_is_refused_before_anything_is_written(without_kept, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadInput, match=r"needs 96,[\d,]+ bytes on its disk, 1,000 are free"):
        keep(without_kept)
