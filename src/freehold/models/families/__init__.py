"""The families: each turns a config into a `DecoderSpec` and names its tensors. A new one is one file."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from freehold.errors import UnsupportedModel
from freehold.models.families import llama, nemotron, nemotron_gguf, qwen
from freehold.models.families.gguf_fields import GgufFields
from freehold.models.names import TensorNames
from freehold.models.spec import DecoderSpec

__all__ = ["FAMILIES", "Family", "GgufFields", "family_of_config", "family_of_gguf"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What Freehold knows of a family of models.

    model_type: its name in a config.json. gguf_architectures: its names in GGUF metadata.
    read_config: config.json -> spec. tensor_names: the rules for the tensors of a Hugging Face checkpoint.
    gguf_config: GGUF metadata -> config.json. gguf_names: the rules for the tensors of a GGUF file.
    """

    name: str
    model_type: str
    gguf_architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], DecoderSpec]
    tensor_names: Callable[[DecoderSpec, Collection[str]], TensorNames]
    gguf_config: Callable[[GgufFields], dict[str, Any]]
    gguf_names: Callable[[DecoderSpec, Collection[str]], TensorNames]


FAMILIES = (
    Family(
        name="llama",
        model_type="llama",
        gguf_architectures=("llama",),
        read_config=llama.read_config,
        tensor_names=llama.tensor_names,
        gguf_config=llama.gguf_config,
        gguf_names=llama.gguf_names,
    ),
    Family(
        name="qwen",
        model_type="qwen2",
        gguf_architectures=("qwen2",),
        read_config=qwen.read_config,
        tensor_names=qwen.tensor_names,
        gguf_config=qwen.gguf_config,
        gguf_names=qwen.gguf_names,
    ),
    Family(
        name="nemotron",
        model_type="nemotron_h",
        gguf_architectures=("nemotron_h", "nemotron_h_moe"),
        read_config=nemotron.read_config,
        tensor_names=nemotron.tensor_names,
        gguf_config=nemotron_gguf.gguf_config,
        gguf_names=nemotron_gguf.gguf_names,
    ),
)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its `model_type`."""
    model_type = config.get("model_type")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "config.json: the weights are quantized (`quantization_config`), in a layout that is not read yet",
            hint="take the BF16 files of this model, or a GGUF file",
        )
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UnsupportedModel(f"config.json: model_type {model_type!r} is not implemented", hint=f"known: {known}")


def family_of_gguf(architecture: object) -> Family:
    """Return the family of a GGUF file, by its `general.architecture`."""
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.gguf_architectures)
    raise UnsupportedModel(f"GGUF architecture {architecture!r} is not implemented", hint=f"known: {known}")
