"""The published models: their sizes as a small config.json each, and the tensors and elements of their bfloat16 files.

Figures that were not published are None. The bfloat16 files of a model with MTP may come with and without the module.
"""

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER_PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA_PATTERN = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
)
NANO_4B_PATTERN = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
H_8B_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
NANO_9B_V2_PATTERN = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_12B_V2_PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"

KIND_OF_LETTER = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: tensors and elements in all, and without the MTP module."""

    config: Config
    tensors: int | None = None
    elements: int | None = None
    tensors_without_mtp: int | None = None
    elements_without_mtp: int | None = None


def nemotron_config(pattern: str, **changes: Any) -> Config:
    """Return the config.json of a Nemotron, with what every one of them holds."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size": 128,
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": 128,
        "hidden_dropout": 0.0,
        "hybrid_override_pattern": pattern,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "n_groups": 8,
        "norm_eps": 1e-05,
        "num_hidden_layers": len(pattern),
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rope_theta": 10000,
        "sliding_window": None,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
        "vocab_size": 131072,
    } | changes


def moe_config(pattern: str, **changes: Any) -> Config:
    """Return the config.json of a Nemotron 3 with experts."""
    experts = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    return nemotron_config(pattern, **experts, **changes)


NANO = moe_config(
    NANO_PATTERN,
    hidden_size=2688,
    intermediate_size=1856,
    num_attention_heads=32,
    num_key_value_heads=2,
    mamba_num_heads=64,
    mamba_head_dim=64,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
)
SUPER = moe_config(
    SUPER_PATTERN,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=2,
    mamba_num_heads=128,
    mamba_head_dim=64,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_shared_expert_intermediate_size=5376,
    moe_latent_size=1024,
    routed_scaling_factor=5.0,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)


def listed(config: Config) -> Config:
    """Return the config with its layers spelled as NVIDIA's later ones spell them: a list of names."""
    kept = {key: value for key, value in config.items() if not key.endswith("hybrid_override_pattern")}
    kept["layers_block_type"] = [KIND_OF_LETTER[letter] for letter in config["hybrid_override_pattern"]]
    if pattern := config.get("mtp_hybrid_override_pattern"):
        kept["mtp_layers_block_type"] = [KIND_OF_LETTER[letter] for letter in pattern]
    return kept


ULTRA = listed(
    SUPER
    | {
        "hybrid_override_pattern": ULTRA_PATTERN,
        "num_hidden_layers": 108,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "mamba_num_heads": 256,
        "moe_intermediate_size": 5120,
        "moe_shared_expert_intermediate_size": 10240,
        "moe_latent_size": 2048,
    }
)
LIGHTNING = listed(NANO | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"})
NANO_4B = nemotron_config(
    NANO_4B_PATTERN,
    hidden_size=3136,
    intermediate_size=12544,
    num_attention_heads=40,
    num_key_value_heads=8,
    mamba_num_heads=96,
    mamba_head_dim=80,
)
H_8B = nemotron_config(
    H_8B_PATTERN,
    hidden_size=4096,
    intermediate_size=21504,
    num_attention_heads=32,
    num_key_value_heads=8,
    mamba_num_heads=128,
    mamba_head_dim=64,
)
H_4B = H_8B | {"hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112}
NANO_9B_V2 = nemotron_config(
    NANO_9B_V2_PATTERN,
    hidden_size=4480,
    intermediate_size=15680,
    num_attention_heads=40,
    num_key_value_heads=8,
    mamba_num_heads=128,
    mamba_head_dim=80,
)
NANO_12B_V2 = NANO_9B_V2 | {
    "hybrid_override_pattern": NANO_12B_V2_PATTERN,
    "num_hidden_layers": 62,
    "hidden_size": 5120,
    "intermediate_size": 20480,
}

NEMOTRONS = {
    "nemotron-3-nano": Published(config=NANO, tensors=6243, elements=31_577_940_288),
    "nemotron-3-super": Published(
        config=SUPER,
        tensors=42683,
        elements=123_611_033_088,
        tensors_without_mtp=41643,
        elements_without_mtp=120_668_707_840,
    ),
    "nemotron-3-ultra": Published(
        config=ULTRA,
        tensors=51023,
        elements=560_524_603_904,
        tensors_without_mtp=49983,
        elements_without_mtp=549_308_993_536,
    ),
    "nemotron-3.5-lightning": Published(
        config=LIGHTNING,
        tensors=6513,
        elements=32_913_266_240,
        tensors_without_mtp=6243,
        elements_without_mtp=31_577_940_288,
    ),
    "nemotron-3-nano-4b": Published(config=NANO_4B, tensors=263, elements=3_973_556_832),
    "nemotron-h-8b": Published(config=H_8B, tensors=311),
    "nemotron-h-4b": Published(config=H_4B),
    "nemotron-nano-9b-v2": Published(config=NANO_9B_V2),
    "nemotron-nano-12b-v2": Published(config=NANO_12B_V2),
}


def qwen_config(hidden: int, layers: int, heads: int, kv_heads: int, width: int, vocab: int, tied: bool) -> Config:
    """Return the config.json of a Qwen 2.5; the size of a head is not in it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": width,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


QWENS = {
    f"qwen-2.5-{size}": Published(config=qwen_config(*shape), tensors=tensors, elements=elements)
    for size, shape, tensors, elements in (
        ("0.5b", (896, 24, 14, 2, 4864, 151936, True), 290, 494_032_768),
        ("1.5b", (1536, 28, 12, 2, 8960, 151936, True), 338, 1_543_714_304),
        ("3b", (2048, 36, 16, 2, 11008, 151936, True), 434, 3_085_938_688),
        ("7b", (3584, 28, 28, 4, 18944, 152064, False), 339, 7_615_616_512),
        ("14b", (5120, 48, 40, 8, 13824, 152064, False), 579, 14_770_033_664),
        ("32b", (5120, 64, 40, 8, 27648, 152064, False), 771, 32_763_876_352),
        ("72b", (8192, 80, 64, 8, 29568, 152064, False), 963, 72_706_203_648),
    )
}


def llama_config(hidden: int, layers: int, heads: int, width: int, factor: float | None, tied: bool) -> Config:
    """Return the config.json of a Llama 3 (no scaling of RoPE), 3.1 or 3.3 (by 8) or 3.2 (by 32)."""
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": width,
        "max_position_embeddings": 131072 if factor else 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling if factor else None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    }


LLAMAS = {
    f"llama-{size}": Published(config=config, tensors=tensors, elements=elements)
    for size, config, tensors, elements in (
        ("3-8b", llama_config(4096, 32, 32, 14336, None, False), 291, 8_030_261_248),
        ("3-70b", llama_config(8192, 80, 64, 28672, None, False), 723, 70_553_706_496),
        ("3.1-8b", llama_config(4096, 32, 32, 14336, 8.0, False), 291, 8_030_261_248),
        ("3.1-70b", llama_config(8192, 80, 64, 28672, 8.0, False), 723, 70_553_706_496),
        ("3.1-405b", llama_config(16384, 126, 128, 53248, 8.0, False), 1137, 405_853_388_800),
        ("3.2-1b", llama_config(2048, 16, 32, 8192, 32.0, True) | {"head_dim": 64}, 146, 1_235_814_400),
        ("3.2-3b", llama_config(3072, 28, 24, 8192, 32.0, True) | {"head_dim": 128}, 254, 3_212_749_824),
        ("3.3-70b", llama_config(8192, 80, 64, 28672, 8.0, False), 723, 70_553_706_496),
    )
}

PUBLISHED = NEMOTRONS | QWENS | LLAMAS
