"""Strict reading of a config: every key is taken, required to have a value, or known to change nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

from freehold.errors import BadFile, UnsupportedModel
from freehold.models.spec import Llama3Scaling, RopeSpec, YarnScaling
from freehold.ops.rope import yarn_attention_factor

# Keys that every family's config may hold and that no result of a forward depends on.
NEUTRAL_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout attn_implementation
    auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id hidden_dropout id2label initializer_range
    is_encoder_decoder label2id model_type neftune_noise_alpha output_attentions output_hidden_states pad_token_id
    problem_type return_dict tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_cache
    """.split()
)


# No size of a model comes near; what is larger is damage, and would cost memory before it is found.
MAX_SIZE = 1 << 24


class Fields:
    """A config whose keys are used up one by one; `finish` refuses what is left."""

    def __init__(self, config: Mapping[str, Any], family: str, *, where: str = "config.json"):
        self._left = {key: value for key, value in config.items() if key not in NEUTRAL_KEYS}
        self._family = family
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self._take(key, default)
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise BadFile(f"{self._where}: `{key}` is {value!r:.60}, wanted a positive integer up to {MAX_SIZE}")
        return value

    def count(self, key: str) -> int:
        """Return an integer that is not negative, 0 where the key is absent or null."""
        value = self._left.pop(key, None)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_SIZE):
            raise BadFile(f"{self._where}: `{key}` is {value!r:.60}, wanted a count up to {MAX_SIZE}")
        return value or 0

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number that is not negative."""
        value = self._take(key, default)
        if type(value) not in (int, float) or not 0 <= value < 1e30:
            raise BadFile(f"{self._where}: `{key}` is {value!r:.60}, wanted a number that is not negative")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._take(key, default)
        if type(value) is not bool:
            raise BadFile(f"{self._where}: `{key}` is {value!r:.60}, wanted true or false")
        return value

    def optional(self, key: str) -> Any:
        """Return the value of a key, None where it is absent or null."""
        return self._left.pop(key, None)

    def require(self, key: str, *wanted: Any) -> None:
        """Refuse a key whose value is none of `wanted`; an absent or null key passes."""
        value = self._left.pop(key, None)
        if value is not None and value not in wanted:
            raise UnsupportedModel(
                f"{self._where}: `{key}` is {value!r:.60}, and Freehold's {self._family} has only {wanted[0]!r}"
            )

    def ignore(self, keys: Iterable[str]) -> None:
        """Use up keys that change no result."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Refuse a config with keys that nothing has used: they could change the result."""
        if self._left:
            names = ", ".join(f"`{key}`" for key in sorted(self._left))
            raise UnsupportedModel(
                f"{self._where} has keys that Freehold's {self._family} does not know: {names}",
                hint="if a key changes no result, it belongs in the family's list of neutral keys",
            )

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, None)
        if value is None:
            value = default
        if value is None:
            raise BadFile(f"{self._where} lacks `{key}`, which {self._family} needs")
        return value


def read_rope(fields: Fields, *, default_theta: float, max_positions: int) -> RopeSpec:
    """Return the RoPE of a config in either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    theta = fields.number("rope_theta", default_theta)
    old, new = fields.optional("rope_scaling"), fields.optional("rope_parameters")
    if old and new and old != new:
        raise BadFile("config.json: `rope_scaling` and `rope_parameters` disagree", hint="keep the one that is right")
    parameters = new or old or {}
    if not isinstance(parameters, Mapping):
        raise BadFile(f"config.json: RoPE parameters are {type(parameters).__name__}, wanted an object")
    rope = Fields(parameters, "RoPE")
    kind = rope.optional("rope_type") or rope.optional("type") or "default"
    rope.ignore(["type"])
    theta = rope.number("rope_theta", theta)
    if theta <= 1:
        raise BadFile(f"config.json: `rope_theta` is {theta}, wanted more than 1")
    match kind:
        case "default":
            spec = RopeSpec(theta=theta)
        case "llama3":
            llama3 = Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=rope.integer("original_max_position_embeddings"),
            )
            if llama3.high_freq_factor <= llama3.low_freq_factor or llama3.factor == 0:
                raise BadFile("config.json: llama3 RoPE needs low_freq_factor < high_freq_factor and a factor above 0")
            spec = RopeSpec(theta=theta, scaling=llama3)
        case "yarn":
            if (factor := rope.number("factor")) < 1:
                raise BadFile(f"config.json: a YaRN factor of {factor}, wanted at least 1")
            yarn = YarnScaling(
                factor=factor,
                original_max_positions=rope.integer("original_max_position_embeddings", max_positions),
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                attention_factor=rope.number("attention_factor", yarn_attention_factor(factor)),
            )
            spec = RopeSpec(theta=theta, scaling=yarn)
        case unknown:
            raise UnsupportedModel(
                f"config.json: RoPE type {unknown!r} is not implemented", hint="known types: default, llama3, yarn"
            )
    rope.require("truncate", True)
    rope.finish()
    return spec
