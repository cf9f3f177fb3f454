"""Qwen 2.5, from 0.5B to 72B: Llama's layers with biases on q, k and v."""

from collections.abc import Collection, Mapping
from typing import Any

from freehold.errors import BadFile
from freehold.models.families import llama
from freehold.models.families.fields import Fields
from freehold.models.families.gguf_fields import GgufFields
from freehold.models.names import TensorNames
from freehold.models.spec import DecoderSpec

tensor_names = llama.tensor_names


def read_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the spec of a Qwen 2 config.json.

    Its window settings take effect only with `use_sliding_window`, which no published model sets.
    """
    fields = Fields(config, "Qwen 2.5")
    fields.require("use_sliding_window", False)
    fields.require("use_mrope", False)
    fields.ignore(["sliding_window", "max_window_layers"])
    layer_types = fields.optional("layer_types") or []
    if not isinstance(layer_types, list):
        raise BadFile("config.json: `layer_types` is wanted as a list")
    for kind in layer_types:
        Fields({"layer_types": kind}, "Qwen 2.5").require("layer_types", "full_attention")
    spec = llama.read_layers(fields, qkv_bias=True, default_theta=1e6)
    fields.finish()
    return spec


def gguf_config(fields: GgufFields) -> dict[str, Any]:
    """Return the config.json of a GGUF file of architecture `qwen2`."""
    config = fields.layers_config() | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    fields.finish()
    return config


def gguf_names(spec: DecoderSpec, stored: Collection[str]) -> TensorNames:
    """Return the rules of a GGUF file of architecture `qwen2`; its heads are stored in our order."""
    return llama.gguf_layer_names(spec, interleaves=False)
