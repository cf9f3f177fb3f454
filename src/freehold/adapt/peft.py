"""Adapters as PEFT keeps them: what adapter_config.json may say, and the names of A and B.

    base_model.model.<module>.lora_A.weight [R, K]      <module> is transformers' name of a linear layer;
    base_model.model.<module>.lora_B.weight [N, R]      each expert of a stack is one

Belongs here: this format, as JSON and tensors. Not here: files (engine/adapter.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from freehold.adapt.lora import ALL_LINEAR, adapted, attach, projections, unadapted_part
from freehold.errors import BadFile, CheckpointMismatch, UnsupportedModel
from freehold.models.decoder import Decoder
from freehold.models.families import Family
from freehold.models.families.fields import Fields

# Ours, in the header of the weight file, where PEFT does not look: the digest of the weights that an adapter was made
# for. Our first adapters have it in their config.
BASE_KEY = "freehold_base_sha256"
NAMES_SHOWN = 4
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# What no result depends on: how an adapter began and was trained, and where it is, which its tensors' names say.
_NEUTRAL = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    peft_version qalora_group_size revision runtime_config task_type
""".split()
# Kinds of adapters that compute something else, each with what it says where it is not used.
_UNUSED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias"), (False,)),
    **{key: ({},) for key in ("velora_config", "arrow_config", "kasa_config", "monteclora_config")},
    **{key: ([],) for key in ("layer_replication", "alora_invocation_tokens")},
}


def adapter_config(decoder: Decoder) -> dict[str, Any]:
    """Return the adapter_config.json of a decoder's adapter."""
    weights = dict(adapted(decoder))
    first = next(iter(weights.values()))
    rank = first.a.shape[-2]
    alpha = float(f"{first.scale * rank:.9g}")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.removesuffix(".weight").rpartition(".")[2] for name in weights}),
    }


def adapter_tensors(decoder: Decoder, family: Family) -> dict[str, Tensor]:
    """Return the tensors of a decoder's adapter by PEFT's names, sorted."""
    weights = dict(adapted(decoder))
    modules = _modules(decoder, family, {_PREFIX + "model."})
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        a, b = weight.a.detach(), weight.b.detach()
        parts = zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]
        for module, (one_a, one_b) in zip(modules[name], parts, strict=True):
            found |= {module + _A: one_a.contiguous(), module + _B: one_b.contiguous()}
    return dict(sorted(found.items()))


def attach_peft(decoder: Decoder, family: Family, *, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter of PEFT's beside the weights that it names. Mutates: decoder.

    Raises: UnsupportedModel for a kind of adapter that computes something else; CheckpointMismatch where a tensor has
        no use, or a target is not in the model or has no tensors; BadFile.
    """
    rank, scale, targets = _read_config(config)
    modules = _modules(decoder, family, tensors)
    pairs = {}
    for name, owners in modules.items():
        if not any(owner + part in tensors for owner in owners for part in (_A, _B)):
            continue
        keys = [[owner + part for owner in owners] for part in (_A, _B)]
        if missing := [key for part in keys for key in part if key not in tensors]:
            raise CheckpointMismatch(f"the adapter lacks {_shown(missing)}")
        *stack, num_rows, num_columns = projections(decoder)[name].shape
        a, b = (_joined([tensors[key] for key in part], is_stack=bool(stack)) for part in keys)
        wanted = (*stack, rank, num_columns), (*stack, num_rows, rank)
        if (a.shape, b.shape) != wanted:
            seen = f"{list(a.shape)} and {list(b.shape)}"
            raise CheckpointMismatch(
                f"A and B of `{name}` are {seen}, wanted are {list(wanted[0])} and {list(wanted[1])}"
            )
        pairs[name] = a, b
    _check_all_used(modules, pairs, tensors, targets)
    attach(decoder, pairs, scale=scale)


def _read_config(config: Mapping[str, Any]) -> tuple[int, float, tuple[str, ...]]:
    """Return rank, scale and targets."""
    fields = Fields(config, "LoRA", where="adapter_config.json")
    fields.ignore([*_NEUTRAL, BASE_KEY])
    for key, wanted in _UNUSED.items():
        fields.require(key, *wanted)
    rank, alpha = fields.integer("r"), fields.number("lora_alpha")
    is_stable = fields.flag("use_rslora", False)  # Kalajdzievski, 2023, arXiv 2312.03732
    targets = fields.optional("target_modules")
    fields.finish()
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        return rank, alpha / (rank**0.5 if is_stable else rank), tuple(targets)
    if targets is None or isinstance(targets, str):  # a pattern; the tensors' names say what it matched
        return rank, alpha / (rank**0.5 if is_stable else rank), ()
    raise BadFile("adapter_config.json: `target_modules` is wanted as a list of names")


def _modules(decoder: Decoder, family: Family, keys: Mapping[str, Tensor] | set[str]) -> dict[str, list[str]]:
    """Return for each projection the modules that it is for PEFT: one, or one for each expert.

    keys: of an adapter's tensors, whose spelling is taken.
    """
    weights = projections(decoder)
    names = family.tensor_names(decoder.spec, [key.removeprefix(_PREFIX) for key in keys])
    return {
        rule.parameter: [
            _PREFIX + rule.stored.replace("{expert}", str(expert)).removesuffix(".weight")
            for expert in range(weights[rule.parameter].shape[0] if rule.is_stack else 1)
        ]
        for rule in names.rules
        if rule.parameter in weights
    }


def _joined(parts: list[Tensor], *, is_stack: bool) -> Tensor:
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise CheckpointMismatch(f"the adapters of one layer's experts have {len(shapes)} shapes")
    joined = torch.stack(parts) if is_stack else parts[0]
    return joined if joined.dtype is torch.bfloat16 else joined.float()


def _check_all_used(
    modules: Mapping[str, list[str]],
    pairs: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    targets: tuple[str, ...],
) -> None:
    used = {module for name in pairs for module in modules[name]}
    unused = [key for key in tensors if key.removesuffix(_A).removesuffix(_B) not in used]
    if parts := {part for key in unused if (part := unadapted_part(key))}:
        raise UnsupportedModel(
            f"the adapter changes {' and '.join(sorted(parts))} ({_shown(unused)}), which have none here",
            hint="train it again with the projections of blocks alone as target_modules",
        )
    if unused:
        raise CheckpointMismatch(f"{len(unused)} tensors of the adapter have no use in this model: {_shown(unused)}")
    if not pairs:
        raise BadFile("adapter_model.safetensors holds no tensors")
    lacking = [t for t in targets if t != ALL_LINEAR and not any(module.endswith(f".{t}") for module in used)]
    if lacking:
        raise CheckpointMismatch(f"the adapter has no tensors for its targets {_shown(lacking)}")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:NAMES_SHOWN]) + more
