"""Tiny models with wide keys and values and recurrent states of a megabyte: little to compute until memory is full."""

from models.tiny import LLAMA, NEMOTRON, Config

_WIDE: Config = {
    "vocab_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
DENSE: Config = LLAMA | _WIDE
HYBRID: Config = (
    NEMOTRON
    | _WIDE
    | {"hybrid_override_pattern": "M*-*", "mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128}
)
