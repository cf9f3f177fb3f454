"""The GGUF layout of `nemotron_h` and `nemotron_h_moe`, as llama.cpp of October 2026 reads it.

The kind of a layer is not stored but follows from two arrays: key/value heads make it attention, a feed-forward width
makes it experts (or an MLP, in a file without experts), neither makes it Mamba-2. An MTP module is one more block, the
last, in which the attention and the experts of the module are folded together.
"""

from collections.abc import Collection
from typing import Any

import torch

from freehold.errors import BadFile, UnsupportedModel
from freehold.models.families.gguf_fields import GgufFields, rounded
from freehold.models.names import Rule, TensorNames, Transform, head_rules, interleaved_heads, place, rename, reshaped
from freehold.models.spec import AttentionSpec, BlockSpec, DecoderSpec, Mamba2Spec, MlpSpec, MoeSpec, MtpSpec

# GGUF keeps A itself; we keep its logarithm, as the checkpoints do.
LOG_OF_NEGATIVE = Transform(
    load=lambda stored: torch.log(-stored.flatten()),
    save=lambda parameter: -torch.exp(parameter).unsqueeze(1),
)


def gguf_config(fields: GgufFields) -> dict[str, Any]:
    """Return the config.json of a GGUF file of architecture `nemotron_h` or `nemotron_h_moe`."""
    config = fields.embedding_config()
    num_blocks, num_mtp = fields.integer("block_count"), fields.count("nextn_predict_layers")
    num_kv_heads = _per_layer(fields, "attention.head_count_kv", num_blocks)
    ff_widths = _per_layer(fields, "feed_forward_length", num_blocks)
    num_experts = fields.count("expert_count")
    feed_forward = "moe" if num_experts else "mlp"
    kinds = [
        feed_forward if ff_width else "attention" if num_kv else "mamba"
        for num_kv, ff_width in zip(num_kv_heads, ff_widths, strict=True)
    ]
    eps = rounded(fields.number("attention.layer_norm_epsilon"))
    if rounded(fields.number("attention.layer_norm_rms_epsilon", eps)) != eps:
        raise UnsupportedModel("the GGUF metadata: two different norm epsilons")
    fields.ignore(["rope.freq_base", "rope.scaling.finetuned", "rope.dimension_count", "expert_shared_count"])
    config |= {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": kinds[: num_blocks - num_mtp],
        "layer_norm_epsilon": eps,
        **_attention_config(fields, num_kv_heads),
        **_mamba_config(fields),
    }
    if num_experts:
        config |= _moe_config(fields, num_experts, max(ff_widths))
    else:
        config |= {"intermediate_size": max(ff_widths)}
    if num_mtp:
        config |= {"num_nextn_predict_layers": num_mtp, "mtp_layers_block_type": ["attention", "moe"]}
    fields.finish()
    return config


def _per_layer(fields: GgufFields, key: str, num_blocks: int) -> list[int]:
    values = fields.optional(key)
    if not isinstance(values, list) or len(values) != num_blocks or not all(type(v) is int and v >= 0 for v in values):
        raise BadFile(f"the GGUF metadata: `{key}` wanted as an array of {num_blocks} integers")
    if len({v for v in values if v}) > 1:
        raise BadFile(f"the GGUF metadata: `{key}` differs between layers of one kind")
    return values


def _attention_config(fields: GgufFields, num_kv_heads: list[int]) -> dict[str, Any]:
    num_heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length")
    fields.require("attention.value_length", head_dim)
    if head_dim % 2:
        raise UnsupportedModel(f"the GGUF metadata: heads of {head_dim} have no two halves to be stored interleaved")
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(num_kv_heads) or num_heads,
        "head_dim": head_dim,
    }


def _mamba_config(fields: GgufFields) -> dict[str, Any]:
    num_heads, inner_width = fields.integer("ssm.time_step_rank"), fields.integer("ssm.inner_size")
    if inner_width % num_heads:
        raise BadFile(f"the GGUF metadata: ssm.inner_size {inner_width} does not divide by {num_heads} heads")
    return {
        "mamba_num_heads": num_heads,
        "mamba_head_dim": inner_width // num_heads,
        "ssm_state_size": fields.integer("ssm.state_size"),
        "n_groups": fields.integer("ssm.group_count"),
        "conv_kernel": fields.integer("ssm.conv_kernel"),
    }


def _moe_config(fields: GgufFields, num_experts: int, ff_width: int) -> dict[str, Any]:
    fields.require("expert_gating_func", 2)  # sigmoid; llama.cpp's graph knows no other for this architecture
    return {
        "n_routed_experts": num_experts,
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length", ff_width),
        "moe_shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length"),
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "routed_scaling_factor": rounded(fields.number("expert_weights_scale", 1.0)) or 1.0,
        "n_group": fields.count("expert_group_count") or 1,
        "topk_group": fields.count("expert_group_used_count") or 1,
        "moe_latent_size": fields.count("moe_latent_size") or None,
    }


def gguf_names(spec: DecoderSpec, stored: Collection[str]) -> TensorNames:
    """Return the rules of a GGUF file of either architecture."""
    rules = rename({"embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"})
    rules += head_rules(spec, "output.weight")
    for index, block in enumerate(spec.blocks):
        part = [*rename({"norm.weight": "attn_norm.weight"}), *_mixer_rules(block)]
        rules += place(part, f"blocks.{index}.", f"blk.{index}.")
    if spec.mtp:
        rules += place(_mtp_rules(spec.mtp), "mtp.", f"blk.{len(spec.blocks)}.")
    return TensorNames(rules=tuple(rules), head=("output.weight", "token_embd.weight"))


def _mixer_rules(block: BlockSpec) -> list[Rule]:
    match block:
        case Mamba2Spec():
            return _mamba_rules(block)
        case AttentionSpec():
            plain = rename({"mixer.v_proj.weight": "attn_v.weight", "mixer.o_proj.weight": "attn_output.weight"})
            heads = {"q": block.num_heads, "k": block.num_kv_heads}
            return plain + [
                Rule(
                    parameter=f"mixer.{p}_proj.weight", stored=f"attn_{p}.weight", transform=interleaved_heads(heads[p])
                )
                for p in heads
            ]
        case MlpSpec():
            return rename({f"mixer.{p}_proj.weight": f"ffn_{p}.weight" for p in ("up", "down")})
        case MoeSpec():
            return rename(_moe_names(block))


def _mamba_rules(block: Mamba2Spec) -> list[Rule]:
    names = {
        "mixer.in_proj.weight": "ssm_in.weight",
        "mixer.conv1d.weight": "ssm_conv1d.weight",
        "mixer.conv1d.bias": "ssm_conv1d.bias",
        "mixer.dt_bias": "ssm_dt.bias",
        "mixer.out_proj.weight": "ssm_out.weight",
    }
    per_head = reshaped(ours=(block.num_heads,), stored=(block.num_heads, 1))
    per_group = reshaped(ours=(block.inner_width,), stored=(block.num_groups, block.inner_width // block.num_groups))
    return [
        *rename(names),
        Rule(parameter="mixer.A_log", stored="ssm_a", transform=LOG_OF_NEGATIVE),
        Rule(parameter="mixer.D", stored="ssm_d", transform=per_head),
        Rule(parameter="mixer.norm.weight", stored="ssm_norm.weight", transform=per_group),
    ]


def _moe_names(block: MoeSpec) -> dict[str, str]:
    names = {
        "mixer.gate.weight": "ffn_gate_inp.weight",
        "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mixer.experts.up_proj": "ffn_up_exps.weight",
        "mixer.experts.down_proj": "ffn_down_exps.weight",
        "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
        "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    }
    latent = {"mixer.fc1_latent_proj.weight": "ffn_latent_down.weight"}
    latent |= {"mixer.fc2_latent_proj.weight": "ffn_latent_up.weight"}
    return names | latent if block.latent_width else names


def _mtp_rules(mtp: MtpSpec) -> list[Rule]:
    rules = rename({f"{name}.weight": f"nextn.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")})
    norms = rename({"blocks.0.norm.weight": "attn_norm.weight", "blocks.1.norm.weight": "post_attention_norm.weight"})
    final = rename({"final_layernorm.weight": "nextn.shared_head_norm.weight"})
    mixers = [r for i, block in enumerate(mtp.blocks) for r in place(_mixer_rules(block), f"blocks.{i}.", "")]
    return rules + norms + final + mixers
