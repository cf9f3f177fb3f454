"""Llama 3, 3.1, 3.2, 3.3 and models of the same architecture (SmolLM2): config, tensor names, GGUF layout.

A layer of a Llama file is two blocks of the decoder: attention, then a gated MLP.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from freehold.errors import UnsupportedModel
from freehold.models.attention import rope_table_frequencies
from freehold.models.families.fields import Fields, read_rope
from freehold.models.families.gguf_fields import GgufFields
from freehold.models.names import Rule, TensorNames, head_rules, interleaved_heads, place, rename
from freehold.models.spec import AttentionSpec, DecoderSpec, Llama3Scaling, MlpSpec, RopeSpec

ATTENTION_NAMES = {f"mixer.{p}_proj.weight": f"self_attn.{p}_proj.weight" for p in "qkvo"}
ATTENTION_BIASES = {f"mixer.{p}_proj.bias": f"self_attn.{p}_proj.bias" for p in "qkv"}
MLP_NAMES = {f"mixer.{p}_proj.weight": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}

GGUF_ATTENTION = {
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
}
GGUF_MLP = {f"mixer.{p}_proj.weight": f"ffn_{p}.weight" for p in ("gate", "up", "down")}

# The RoPE scalings of the published models, which GGUF stores only as a table of divisors (`rope_freqs.weight`).
PUBLISHED_SCALINGS = tuple(
    Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    for factor in (8.0, 32.0)
)


def read_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the spec of a Llama config.json."""
    fields = Fields(config, "Llama")
    for key in ("attention_bias", "mlp_bias", "rope_interleaved"):
        fields.require(key, False)
    fields.require("pretraining_tp", 1)
    fields.ignore(["is_llama_config"])
    spec = read_layers(fields, qkv_bias=False, default_theta=10000.0)
    fields.finish()
    return spec


def read_layers(fields: Fields, *, qkv_bias: bool, default_theta: float) -> DecoderSpec:
    """Return the spec of a config of layers that are attention plus a gated MLP, as Llama and Qwen share them."""
    fields.require("hidden_act", "silu")
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings")
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", width // num_heads),
        qkv_bias=qkv_bias,
        rope=read_rope(fields, default_theta=default_theta, max_positions=max_positions),
    )
    if num_heads % attention.num_kv_heads:
        raise UnsupportedModel(
            f"config.json: {num_heads} query heads do not divide by {attention.num_kv_heads} kv heads"
        )
    if attention.head_dim % 2:
        raise UnsupportedModel(f"config.json: heads of {attention.head_dim} have no two halves for RoPE")
    mlp = MlpSpec(width=fields.integer("intermediate_size"), activation="silu_gated")
    return DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        blocks=(attention, mlp) * fields.integer("num_hidden_layers"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_order="cast_then_multiply",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_positions=max_positions,
    )


def tensor_names(spec: DecoderSpec, stored: Collection[str]) -> TensorNames:
    """Return the rules of a Hugging Face checkpoint."""
    rules = rename({"embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"})
    rules += head_rules(spec, "lm_head.weight")
    for index, block in enumerate(spec.blocks):
        rules += place(_block_rules(block), f"blocks.{index}.", f"model.layers.{index // 2}.")
    return TensorNames(
        rules=tuple(rules), ignored=("*.rotary_emb.inv_freq",), head=("lm_head.weight", "model.embed_tokens.weight")
    )


def _block_rules(block: object) -> list[Rule]:
    if isinstance(block, AttentionSpec):
        biases = ATTENTION_BIASES if block.qkv_bias else {}
        return rename({"norm.weight": "input_layernorm.weight"} | ATTENTION_NAMES | biases)
    return rename({"norm.weight": "post_attention_layernorm.weight"} | MLP_NAMES)


def gguf_config(fields: GgufFields) -> dict[str, Any]:
    """Return the config.json of a GGUF file of architecture `llama`."""
    config = fields.layers_config() | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config["rope_parameters"] |= _published_scaling(fields, config)
    fields.finish()
    return config


def _published_scaling(fields: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope_parameters that a table of frequency divisors stands for; nothing where there is no table."""
    divisors = fields.rope_divisors
    if divisors is None:
        return {}
    head_dim, theta = config["head_dim"], config["rope_parameters"]["rope_theta"]
    if divisors.shape != (head_dim // 2,) or config["rope_parameters"]["rope_type"] != "default":
        raise UnsupportedModel("rope_freqs.weight does not fit the head size, or another RoPE scaling stands beside it")
    plain, _ = rope_table_frequencies(RopeSpec(theta=theta), head_dim)
    for scaling in PUBLISHED_SCALINGS:
        scaled, _ = rope_table_frequencies(RopeSpec(theta=theta, scaling=scaling), head_dim)
        if torch.allclose(plain / scaled, divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    raise UnsupportedModel(
        "rope_freqs.weight is the table of no published Llama 3 model",
        hint="convert from the original safetensors, whose config.json names the scaling",
    )


def gguf_names(spec: DecoderSpec, stored: Collection[str]) -> TensorNames:
    """Return the rules of a GGUF file of architecture `llama`, whose q and k rows are interleaved within each head."""
    return gguf_layer_names(spec, interleaves=True)


def gguf_layer_names(spec: DecoderSpec, *, interleaves: bool) -> TensorNames:
    """Return the GGUF rules of layers that are attention plus a gated MLP, as Llama and Qwen share them."""
    rules = rename({"embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"})
    rules += head_rules(spec, "output.weight")
    for index, block in enumerate(spec.blocks):
        part = _gguf_attention(block, interleaves) if isinstance(block, AttentionSpec) else _gguf_mlp()
        rules += place(part, f"blocks.{index}.", f"blk.{index // 2}.")
    ignored = ("rope_freqs.weight",) if interleaves else ()  # `llama` alone has read it, as the config's scaling
    return TensorNames(rules=tuple(rules), ignored=ignored, head=("output.weight", "token_embd.weight"))


def _gguf_attention(block: AttentionSpec, interleaves: bool) -> list[Rule]:
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in GGUF_ATTENTION.items()}
    if block.qkv_bias:
        names |= {f"{ours}.bias": f"{GGUF_ATTENTION[ours]}.bias" for ours in list(GGUF_ATTENTION)[:3]}
    heads = {"mixer.q_proj": block.num_heads, "mixer.k_proj": block.num_kv_heads} if interleaves else {}
    rules = rename({"norm.weight": "attn_norm.weight"} | names)
    return [
        Rule(parameter=r.parameter, stored=r.stored, transform=interleaved_heads(heads[owner])) if owner in heads else r
        for r in rules
        for owner in [r.parameter.rpartition(".")[0]]
    ]


def _gguf_mlp() -> list[Rule]:
    return rename({"norm.weight": "ffn_norm.weight"} | GGUF_MLP)
