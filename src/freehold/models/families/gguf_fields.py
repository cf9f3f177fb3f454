"""Strict reading of GGUF metadata: the keys of one architecture, turned into the config.json they stand for.

Keys of other prefixes (general, tokenizer, quantize) describe the file and its text side, not the decoder.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from freehold.errors import UnsupportedModel
from freehold.models.families.fields import Fields


def rounded(value: float) -> float:
    """Return the short decimal that a float32 was written from: 1e-05 for 9.999999747378752e-06."""
    return float(f"{value:.7g}")


class GgufFields(Fields):
    """The keys of `{architecture}.` without that prefix, and the tensors' shapes.

    rope_divisors: values of the tensor rope_freqs.weight, where the file has one.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        architecture: str,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        rope_divisors: Tensor | None,
    ):
        prefix = architecture + "."
        keys = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        super().__init__(keys, f"GGUF architecture {architecture}", where="the GGUF metadata")
        self.shapes = shapes
        self.rope_divisors = rope_divisors

    def embedding_config(self) -> dict[str, Any]:
        """Return vocabulary, width, context and tying, which every architecture has."""
        if "token_embd.weight" not in self.shapes:
            raise UnsupportedModel("the GGUF file has no tensor token_embd.weight")
        vocab_size = self.shapes["token_embd.weight"][0]
        self.require("vocab_size", vocab_size)
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.integer("embedding_length"),
            "max_position_embeddings": self.integer("context_length"),
            "tie_word_embeddings": "output.weight" not in self.shapes,
        }

    def layers_config(self) -> dict[str, Any]:
        """Return the config of layers that are attention plus a gated MLP, as `llama` and `qwen2` share it."""
        config = self.embedding_config()
        num_heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", config["hidden_size"] // num_heads)
        self.require("attention.value_length", head_dim)
        self.require("rope.dimension_count", head_dim)
        self.require("expert_count", 0)
        return config | {
            "num_hidden_layers": self.integer("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.integer("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "intermediate_size": self.integer("feed_forward_length"),
            "hidden_act": "silu",
            "rms_norm_eps": rounded(self.number("attention.layer_norm_rms_epsilon")),
            "rope_parameters": {"rope_theta": rounded(self.number("rope.freq_base", 10000.0)), **self._rope_scaling()},
        }

    def _rope_scaling(self) -> dict[str, Any]:
        kind = self.optional("rope.scaling.type")
        self.ignore(["rope.scaling.finetuned"])
        if kind in (None, "none"):
            return {"rope_type": "default"}
        if kind != "yarn":
            raise UnsupportedModel(
                f"the GGUF metadata: RoPE type {kind!r} is not implemented", hint="known: none, yarn"
            )
        self.require("rope.scaling.attn_factor", 1.0)
        return {
            "rope_type": "yarn",
            "factor": rounded(self.number("rope.scaling.factor")),
            "original_max_position_embeddings": self.integer("rope.scaling.original_context_length"),
        }
