"""GGUF files of tiny models, written as llama.cpp's converter writes them: by a table of names of their own.

Not through the families' rules, which these files are there to check.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from freehold.checkpoint.rules import stored_tensors
from freehold.models.decoder import Decoder
from freehold.models.spec import AttentionSpec, Mamba2Spec, MlpSpec, MoeSpec
from models.tiny import Config, saved_names

Array = np.ndarray[Any, np.dtype[np.float32]]
Quantization = gguf.GGMLQuantizationType

NAMES = {
    r"embed(_tokens|dings)\.weight": "token_embd.weight",
    r"norm(_f)?\.weight": "output_norm.weight",
    r"lm_head\.weight": "output.weight",
    r"layers\.(\d+)\.(input_layer)?norm\.weight": r"blk.\1.attn_norm.weight",
    r"layers\.(\d+)\.post_attention_layernorm\.weight": r"blk.\1.ffn_norm.weight",
    r"layers\.(\d+)\.\w+\.o_proj\.weight": r"blk.\1.attn_output.weight",
    r"layers\.(\d+)\.\w+\.([qkv])_proj\.(weight|bias)": r"blk.\1.attn_\2.\3",
    r"layers\.(\d+)\.(?:mlp|mixer)\.(gate|up|down)_proj\.weight": r"blk.\1.ffn_\2.weight",
    r"layers\.(\d+)\.mixer\.(in|out)_proj\.weight": r"blk.\1.ssm_\2.weight",
    r"layers\.(\d+)\.mixer\.conv1d\.(weight|bias)": r"blk.\1.ssm_conv1d.\2",
    r"layers\.(\d+)\.mixer\.dt_bias": r"blk.\1.ssm_dt.bias",
    r"layers\.(\d+)\.mixer\.A_log": r"blk.\1.ssm_a",
    r"layers\.(\d+)\.mixer\.D": r"blk.\1.ssm_d",
    r"layers\.(\d+)\.mixer\.norm\.weight": r"blk.\1.ssm_norm.weight",
    r"layers\.(\d+)\.mixer\.gate\.weight": r"blk.\1.ffn_gate_inp.weight",
    r"layers\.(\d+)\.mixer\.gate\.e_score_correction_bias": r"blk.\1.exp_probs_b.bias",
    r"layers\.(\d+)\.mixer\.experts\.(up|down)_proj": r"blk.\1.ffn_\2_exps.weight",
    r"layers\.(\d+)\.mixer\.shared_experts\.(up|down)_proj\.weight": r"blk.\1.ffn_\2_shexp.weight",
    r"layers\.(\d+)\.mixer\.fc1_latent_proj\.weight": r"blk.\1.ffn_latent_down.weight",
    r"layers\.(\d+)\.mixer\.fc2_latent_proj\.weight": r"blk.\1.ffn_latent_up.weight",
    r"mtp\.(\d+)\.(enorm|hnorm|eh_proj)\.weight": r"blk.\1.nextn.\2.weight",
    r"mtp\.(\d+)\.norm\.1\.weight": r"blk.\1.post_attention_norm.weight",
    r"mtp\.(\d+)\.final_layernorm\.weight": r"blk.\1.nextn.shared_head_norm.weight",
}


def write_gguf_model(
    path: Path,
    decoder: Decoder,
    config: Config,
    *,
    quantize: Callable[[str], Quantization | None] = lambda name: None,
    change: Callable[[dict[str, Any]], None] = lambda metadata: None,
    extra: Mapping[str, Array] = {},
) -> Path:
    """Write a model. quantize: type of a tensor that is not F32. change: edits the metadata. extra: more tensors."""
    metadata = gguf_metadata(decoder, config)
    change(metadata)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for name, value in metadata.items():
        _add(writer, name, value)
    for name, values in {**gguf_tensors(decoder, config), **extra}.items():
        kind = quantize(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case list():
            writer.add_array(name, value)


def gguf_tensors(decoder: Decoder, config: Config) -> dict[str, Array]:
    """Return the tensors of a decoder as GGUF stores them, in its names and layouts."""
    tensors: dict[str, Array] = {}
    for name, values in _stacked(decoder, config).items():
        found = [match.expand(theirs) for pattern, theirs in NAMES.items() if (match := re.fullmatch(pattern, name))]
        assert len(found) == 1, f"{name} becomes {found}"
        tensors[found[0]] = _layout(found[0], values, decoder)
    return tensors


def _stacked(decoder: Decoder, config: Config) -> dict[str, Array]:
    """Return the tensors of a Hugging Face checkpoint, experts stacked and the MTP module as one more layer."""
    tensors: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    last = len(decoder.spec.blocks)
    for name, tensor in stored_tensors(decoder, saved_names(decoder, config)):
        name = re.sub(r"mtp\.layers\.(\d+)\.(enorm|hnorm|eh_proj|final_layernorm)", rf"mtp.{last}.\2", name)
        name = re.sub(r"mtp\.layers\.1\.norm", f"mtp.{last}.norm.1", name)
        name = re.sub(r"mtp\.layers\.\d+\.", f"layers.{last}.", name)
        name = re.sub(r"^(model|backbone)\.", "", name)
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name):
            experts.setdefault(f"{match[1]}.{match[2]}", []).append(tensor.numpy())
        else:
            tensors[name] = tensor.numpy()
    return tensors | {name: np.stack(parts) for name, parts in experts.items()}


def _layout(name: str, values: Array, decoder: Decoder) -> Array:
    architecture = "llama" if decoder.spec.norm_order == "cast_then_multiply" else "nemotron"
    has_bias = any(isinstance(b, AttentionSpec) and b.qkv_bias for b in decoder.spec.blocks)
    if re.search(r"attn_[qk]\.weight", name) and (architecture == "nemotron" or not has_bias):
        block = next(b for b in decoder.spec.blocks if isinstance(b, AttentionSpec))
        num_heads = block.num_heads if "attn_q" in name else block.num_kv_heads
        # Word for word what the converter does.
        halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if name.endswith("ssm_conv1d.weight"):
        return values.squeeze(1)
    if name.endswith("ssm_a"):
        return -np.exp(values).reshape(-1, 1)
    if name.endswith("ssm_d"):
        return values.reshape(-1, 1)
    if name.endswith("ssm_norm.weight"):
        block = next(b for b in decoder.spec.blocks if isinstance(b, Mamba2Spec))
        return values.reshape(block.num_groups, -1)
    return values


def gguf_metadata(decoder: Decoder, config: Config) -> dict[str, Any]:
    """Return the keys that the converter writes for a model."""
    spec = decoder.spec
    keys = _nemotron_keys(decoder) if config["model_type"] == "nemotron_h" else _layer_keys(decoder, config)
    has_experts = any(isinstance(block, MoeSpec) for block in spec.blocks)
    architecture = config["model_type"] + ("_moe" if has_experts else "")
    keys |= {"context_length": spec.max_positions, "embedding_length": spec.width, "vocab_size": spec.vocab_size}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}


def _layer_keys(decoder: Decoder, config: Config) -> dict[str, Any]:
    attention, mlp = decoder.spec.blocks[:2]
    assert isinstance(attention, AttentionSpec)
    assert isinstance(mlp, MlpSpec)
    keys = {
        "block_count": len(decoder.spec.blocks) // 2,
        "feed_forward_length": mlp.width,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": decoder.spec.norm_eps,
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": float(config["rope_theta"]),
    }
    scaling = config.get("rope_scaling", {})
    if scaling.get("rope_type") == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling["factor"],
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        }
    return keys


def _nemotron_keys(decoder: Decoder) -> dict[str, Any]:
    blocks = decoder.spec.blocks
    layers = [(block,) for block in blocks] + ([decoder.spec.mtp.blocks] if decoder.spec.mtp else [])

    def per_layer(kinds: tuple[type, ...], field: str) -> list[int]:
        return [next((getattr(b, field) for b in layer if isinstance(b, kinds)), 0) for layer in layers]

    mamba = next((b for b in blocks if isinstance(b, Mamba2Spec)), None)
    attention = next((b for b in blocks if isinstance(b, AttentionSpec)), None)
    moe = next((b for b in blocks if isinstance(b, MoeSpec)), None)
    keys: dict[str, Any] = {
        "block_count": len(layers),
        "attention.head_count_kv": per_layer((AttentionSpec,), "num_kv_heads"),
        "feed_forward_length": per_layer((MlpSpec, MoeSpec), "width"),
        "attention.head_count": attention.num_heads if attention else 4,
        "attention.key_length": attention.head_dim if attention else 16,
        "attention.value_length": attention.head_dim if attention else 16,
        "attention.layer_norm_epsilon": decoder.spec.norm_eps,
        "attention.layer_norm_rms_epsilon": decoder.spec.norm_eps,
        "rope.freq_base": 10000.0,
        "rope.scaling.finetuned": False,
    }
    if mamba:
        keys |= {
            "ssm.conv_kernel": mamba.conv_kernel,
            "ssm.inner_size": mamba.inner_width,
            "ssm.state_size": mamba.state_size,
            "ssm.time_step_rank": mamba.num_heads,
            "ssm.group_count": mamba.num_groups,
        }
    if moe:
        keys |= {
            "expert_count": moe.num_experts,
            "expert_used_count": moe.num_chosen,
            "expert_feed_forward_length": moe.width,
            "expert_shared_feed_forward_length": moe.shared_width,
            "expert_shared_count": 1,
            "expert_weights_norm": moe.normalize_weights,
            "expert_weights_scale": moe.scale,
            "expert_group_count": moe.num_groups,
            "expert_group_used_count": moe.num_chosen_groups,
        }
        keys |= {"moe_latent_size": moe.latent_width} if moe.latent_width else {}
    return keys | ({"nextn_predict_layers": 1} if decoder.spec.mtp else {})


def quantized(values: torch.Tensor, kind: Quantization) -> torch.Tensor:
    """Return what a quantized tensor holds, by the library."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))
