"""What loading does to a checkpoint, to memory, and to files that do not fit; whole GGUF models have their own file."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.builders import entry, raw_safetensors
from freehold.checkpoint.load import LoadReport, default_dtype, load_decoder, open_described, plain_dtype
from freehold.checkpoint.save import save_checkpoint
from freehold.checkpoint.source import Source
from freehold.checkpoint.text_side import load_text_side
from freehold.errors import BadFile, BadInput, CheckpointMismatch, NotFound, UnsupportedModel
from freehold.evaluate.laws import finite_weights
from freehold.models.decoder import Decoder
from freehold.models.families import family_of_config
from inputs import smollm2_gguf
from models.forms import needs_kernels
from models.tiny import CONFIGS, LLAMA, MTP, NEMOTRON, Config, random_tokens, tiny_decoder
from models.witness import our_logits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def saved(folder: Path, config: Config, *, dtype: torch.dtype = torch.float32) -> Path:
    decoder = tiny_decoder(config, dtype=dtype)
    save_checkpoint(folder, decoder, family=family_of_config(config), config=config)
    return folder


def loaded(path: Path, dtype: torch.dtype | None = None, **more: Any) -> tuple[Decoder, LoadReport]:
    source, described = open_described(path)
    with source:
        chosen = dtype or default_dtype(described, CPU)
        return load_decoder(source, described, dtype=chosen, device=CPU, **more)


def change_tensors(folder: Path, **changed: Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a saved checkpoint; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changed.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def change_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


# What is used in place, what is copied, and what is packed.


@needs_kernels
@pytest.mark.parametrize("name", ["llama-tied", "nemotron"])
def test_a_bfloat16_model_is_packed_for_the_kernels_with_experts_that_are_stored_apart(name, tmp_path):
    folder = saved(tmp_path / "m", CONFIGS[name], dtype=torch.bfloat16)
    packed, report = loaded(folder, keep_packed=True)
    plain, _ = loaded(folder)
    parameters, weights = dict(plain.named_parameters()), packed.packed_weights()
    matrices = {n for n, p in parameters.items() if p.ndim > 1 and p.dtype is torch.bfloat16 and "conv1d" not in n}
    assert weights.keys() == matrices
    assert all(torch.equal(weight.dense(), parameters[name].float()) for name, weight in weights.items())
    assert report.copied_bytes >= sum(weight.nbytes for weight in weights.values())
    tokens_L = random_tokens(20)
    assert torch.equal(our_logits(packed, tokens_L), our_logits(plain, tokens_L))


@needs_kernels
def test_packed_weights_count_in_the_room_that_a_model_needs(tmp_path):
    folder = saved(tmp_path / "m", CONFIGS["llama"], dtype=torch.bfloat16)
    with pytest.raises(BadInput, match=r"the weights need [0-9,]+ bytes of memory, 1,000 are free"):
        loaded(folder, keep_packed=True, memory_bytes=1000)
    loaded(folder, memory_bytes=1000)  # used in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen"])
def test_a_plain_model_is_used_in_place_in_its_file(name, dtype, tmp_path):
    source, described = open_described(saved(tmp_path / "m", CONFIGS[name], dtype=dtype))
    decoder, report = load_decoder(source, described, dtype=dtype, device=CPU)
    assert (report.mapped_bytes, report.copied_bytes) == (sum(p.nbytes for p in decoder.parameters()), 0)
    for match in described.matches.matches:
        view = source.bytes_of(match.stored[0].name)
        assert decoder.get_parameter(match.name).data_ptr() == view.data_ptr(), match.name
    source.close()
    del source
    assert our_logits(decoder, random_tokens(5)).isfinite().all()


def test_what_a_rule_or_a_dtype_changes_is_copied_and_the_rest_is_not(tmp_path):
    folder = saved(tmp_path / "m", NEMOTRON, dtype=torch.bfloat16)
    decoder, report = loaded(folder, torch.bfloat16)
    changed = ("conv1d.weight", "experts.up_proj", "experts.down_proj")
    copied = [name for name, _ in decoder.named_parameters() if name.endswith(changed)]
    assert report.copied_bytes == sum(decoder.get_parameter(name).nbytes for name in copied)
    assert report.mapped_bytes + report.copied_bytes == sum(p.nbytes for p in decoder.parameters())
    _, report = loaded(folder, torch.float16)
    kept_float32 = [p for n, p in decoder.named_parameters() if p.dtype == torch.float32]
    assert report.mapped_bytes == sum(p.nbytes for p in kept_float32)


def test_tensors_at_odd_offsets_are_copied_and_right(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    path, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    header, data = {}, b""
    for name, tensor in tensors.items():
        header[name] = entry("F32", tensor.shape, len(data), len(data) + tensor.nbytes)
        data += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(raw_safetensors(text + b" " * (-(len(text) + 8) % 8 + 1), data))
    decoder, report = loaded(folder)
    assert report.mapped_bytes == 0
    for (name, found), expected in zip(decoder.named_parameters(), tiny_decoder(LLAMA).parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("name", ["llama", "nemotron", "nemotron-tied"])
def test_progress_ends_at_the_total_and_never_goes_back(name, tmp_path):
    seen: list[tuple[int, int]] = []
    decoder, _ = loaded(saved(tmp_path / "m", CONFIGS[name]), torch.bfloat16, progress=lambda *d: seen.append(d))
    total = sum(p.nbytes for p in decoder.parameters())
    assert seen == sorted(seen)
    assert {of for _, of in seen} == {total}
    assert seen[-1][0] == total


def test_shards_load_as_one_file_does(tmp_path):
    decoder = tiny_decoder(MTP)
    save_checkpoint(tmp_path / "m", decoder, family=family_of_config(MTP), config=MTP, max_shard_bytes=20000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors.index.json"):
        for (name, found), expected in zip(loaded(path)[0].named_parameters(), decoder.parameters(), strict=True):
            assert torch.equal(found, expected), name


# Headers come first.


def test_a_file_with_wrong_names_is_refused_before_its_data_are_touched(tmp_path, monkeypatch):
    folder = saved(tmp_path / "m", LLAMA)
    huge = 100 << 30
    header = {"model.embed_tokens.weight": entry("U8", [huge], 0, huge)}
    (folder / "model.safetensors").write_bytes(raw_safetensors(header))
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + huge)
    monkeypatch.delattr(Source, "bytes_of")
    with pytest.raises(CheckpointMismatch, match="20 tensors are missing"):
        open_described(folder)


@pytest.mark.parametrize(("name", "key"), [("llama", "num_hidden_layers"), ("nemotron", "n_routed_experts")])
def test_a_config_of_far_more_tensors_than_the_file_has_is_refused(name, key, tmp_path):
    folder = saved(tmp_path / "m", CONFIGS[name])
    change_config(folder, **{key: 1 << 24})
    with pytest.raises(CheckpointMismatch):
        open_described(folder)


WRONG = [-1, 0, 7, 1 << 24, 1 << 62, 10**30, True, None, "x", 1.5, float("nan"), float("inf"), [], [1], {}]
OTHER_KEYS = "head_dim rope_parameters rope_scaling layer_types layers_block_type n_group topk_group moe_latent_size"


@pytest.mark.parametrize("name", ["llama", "qwen", "llama-yarn", "nemotron"])
def test_any_value_of_any_key_of_a_config_is_read_or_refused_in_one_line(name, tmp_path):
    folder = saved(tmp_path / "m", CONFIGS[name])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    changes = [{key: value} for key in [*config, *OTHER_KEYS.split()] for value in WRONG]
    messages = {}
    for change in changes:
        path.write_text(json.dumps(config | change))
        try:
            open_described(folder)[0].close()
        except BadInput as error:
            messages[str(change)] = error.message
    assert len(changes) // 2 < len(messages) < len(changes)
    assert {change: m for change, m in messages.items() if not m.isprintable() or len(m) > 500} == {}


# What dtype a model gets when none is asked for.


@pytest.mark.parametrize(
    ("stored", "device", "expected"),
    [
        (torch.float32, CPU, torch.float32),
        (torch.bfloat16, CPU, torch.bfloat16),
        (torch.float16, CPU, torch.float32),
        (torch.float32, CUDA, torch.float32),
        (torch.bfloat16, CUDA, torch.bfloat16),
        (torch.float16, CUDA, torch.float16),
    ],
    ids=str,
)
def test_the_stored_dtype_is_the_default_but_for_float16_on_a_cpu(stored, device, expected, tmp_path):
    source, described = open_described(saved(tmp_path / "m", NEMOTRON, dtype=stored))
    source.close()
    assert default_dtype(described, device) is expected


def test_quantized_weights_default_to_what_keeps_them_exactly_on_a_cpu():
    source, described = open_described(smollm2_gguf())
    source.close()
    assert (default_dtype(described, CPU), default_dtype(described, CUDA)) == (torch.float32, torch.bfloat16)


def test_the_default_is_judged_by_all_weights_and_not_by_the_embeddings(tmp_path):
    source, described = open_described(smollm2_gguf())
    source.close()
    head, *others = described.matches.matches
    assert head.name == "embeddings.weight"
    plain = replace(head, stored=tuple(replace(tensor, format="BF16") for tensor in head.stored))
    mixed = replace(described, matches=replace(described.matches, matches=(plain, *others)))
    assert default_dtype(mixed, CPU) is torch.float32


def test_mixed_plain_weights_default_to_the_dtype_of_most_values_and_routers_do_not_count(tmp_path):
    folder = saved(tmp_path / "m", NEMOTRON, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    change_tensors(folder, **{name: t.float() for name, t in tensors.items() if t.ndim == 1})
    for expected in (torch.bfloat16, torch.float32):
        source, described = open_described(folder)
        source.close()
        assert plain_dtype(described) is expected
        change_tensors(folder, **{name: t.float() for name, t in tensors.items() if "embed" not in name})


def test_float16_is_refused_where_a_value_does_not_fit(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    change_tensors(folder, model__norm__weight=torch.full((LLAMA["hidden_size"],), 1e6))
    with pytest.raises(BadInput, match=r"norm\.weight has values that float16 cannot hold"):
        loaded(folder, torch.float16)


# What fits almost.


@pytest.mark.parametrize("name", ["llama-tied", "qwen-tied", "nemotron-tied"])
def test_a_tied_model_may_store_its_head_once_more(name, tmp_path):
    folder = saved(tmp_path / "m", CONFIGS[name])
    tensors = load_file(folder / "model.safetensors")
    (embeddings,) = (tensors[n] for n in tensors if "embed" in n)
    change_tensors(folder, lm_head__weight=embeddings.clone())
    decoder, _ = loaded(folder)
    assert decoder.lm_head.weight is decoder.embeddings.weight
    assert torch.equal(decoder.embeddings.weight, embeddings)


WRONG_HEADS = {
    "value": lambda head: head.index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(0.5)),
    "dtype": lambda head: head.bfloat16(),
    "shape": lambda head: head[:50].clone(),
    "sign-of-zero": lambda head: -torch.zeros_like(head),
}


@pytest.mark.parametrize("change", WRONG_HEADS.values(), ids=WRONG_HEADS)
def test_a_tied_model_with_another_head_is_refused(change, tmp_path):
    folder = saved(tmp_path / "m", CONFIGS["llama-tied"])
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=change(embeddings))
    with pytest.raises(CheckpointMismatch, match=r"ties the embeddings, but `lm_head\.weight`"):
        loaded(folder)


def test_nan_in_weights_loads_and_check_names_the_parameter(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    broken = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    broken[3, 5] = float("nan")
    change_tensors(folder, **{"model__layers__1__mlp__up_proj__weight": broken})
    finding = finite_weights(loaded(folder)[0])
    assert not finding.holds
    assert finding.detail == "NaN or infinite: blocks.3.mixer.up_proj.weight (1)"


def test_computed_tables_of_old_files_are_left_out_and_named(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    change_tensors(folder, **{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)})
    assert loaded(folder)[1].notes == ("`model.layers.0.self_attn.rotary_emb.inv_freq` holds no weight: ignored",)


opened: list[str] | None = None  # what is opened, while somebody wants to know


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(note_opened)


def test_code_beside_the_weights_is_named_and_never_opened(tmp_path, monkeypatch):
    folder = saved(tmp_path / "m", LLAMA)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"})
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of the checkpoint has run')")
    monkeypatch.setattr(sys.modules[__name__], "opened", [])
    source, described = open_described(folder)
    with source:
        load_text_side(source, described)
        load_decoder(source, described, dtype=torch.float32, device=CPU)
    assert any(path.endswith("model.safetensors") for path in opened)  # the hook sees what it should
    assert [path for path in opened if path.endswith("modeling_tiny.py")] == []
    assert described.notes == ("auto_map names code of its own: ignored, Freehold runs no code from a checkpoint",)


# What does not fit.


def test_unused_and_missing_tensors_are_listed_in_one_line(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    change_tensors(folder, model__norm__weight=None, extra__weight=torch.ones(2))
    with pytest.raises(CheckpointMismatch) as caught:
        open_described(folder)
    assert caught.value.message == (
        "1 stored tensors have no use: `extra.weight`; 1 tensors are missing: `model.norm.weight`"
    )


def test_a_missing_expert_is_missing(tmp_path):
    folder = saved(tmp_path / "m", NEMOTRON)
    change_tensors(folder, backbone__layers__3__mixer__experts__5__up_proj__weight=None)
    with pytest.raises(CheckpointMismatch, match=r"1 tensors are missing: `backbone\.layers\.3\.mixer\.experts\.5\.up"):
        open_described(folder)


def test_one_expert_more_than_the_config_says_has_no_use(tmp_path):
    folder = saved(tmp_path / "m", NEMOTRON)
    change_config(folder, n_routed_experts=7)
    with pytest.raises(CheckpointMismatch, match=r"2 stored tensors have no use: .*experts\.7\."):
        open_described(folder)


def test_weights_of_another_family_are_refused_by_name(tmp_path):
    folder = saved(tmp_path / "m", CONFIGS["qwen"])
    change_config(folder, model_type="llama")
    with pytest.raises(CheckpointMismatch, match=r"6 stored tensors have no use: .*q_proj"):
        open_described(folder)
    change_config(folder, model_type="gpt_oss")
    with pytest.raises(UnsupportedModel, match="model_type 'gpt_oss' is not implemented"):
        open_described(folder)


def test_a_shape_that_disagrees_with_the_config_is_refused(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    change_config(folder, intermediate_size=64)
    with pytest.raises(CheckpointMismatch) as caught:
        open_described(folder)
    assert caught.value.message == (
        "`model.layers.0.mlp.gate_proj.weight` in model.safetensors has shape [48, 32], the config makes it [64, 32]"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.float64, torch.uint8], ids=str)
def test_storage_that_is_no_weight_is_refused_by_name(dtype, tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    change_tensors(folder, model__norm__weight=torch.ones(32).to(dtype))
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.float64: "F64", torch.uint8: "U8"}
    with pytest.raises(UnsupportedModel, match=rf"`model\.norm\.weight` is stored as {names[dtype]}"):
        open_described(folder)


def test_weights_without_a_config_are_refused(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    (folder / "config.json").unlink()
    with pytest.raises(BadFile, match=r"there is no config\.json beside the weights"):
        open_described(folder)


def test_nothing_at_the_path_is_not_found(tmp_path):
    with pytest.raises(NotFound):
        open_described(tmp_path / "absent")


def test_a_refused_checkpoint_leaves_no_file_open(tmp_path):
    folder = saved(tmp_path / "m", LLAMA)
    change_tensors(folder, model__norm__weight=None)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(CheckpointMismatch):
            open_described(folder)
    assert len(os.listdir("/proc/self/fd")) == before
