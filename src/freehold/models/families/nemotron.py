"""Nemotron-H, Nemotron Nano v2 and Nemotron 3: config in all spellings of the layer list, tensor names.

A layer of a Nemotron file is one block of the decoder. Attention has no positions: the RoPE keys of the configs are
leftovers that NVIDIA's own code does not read either. The layout of GGUF files is in nemotron_gguf.py.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from freehold.errors import BadFile, UnsupportedModel
from freehold.models.families.fields import Fields
from freehold.models.names import Rule, TensorNames, head_rules, place, rename, reshaped
from freehold.models.spec import AttentionSpec, BlockSpec, DecoderSpec, Mamba2Spec, MlpSpec, MoeSpec, MtpSpec

# The three spellings of a layer's kind: patterns of one letter each, NVIDIA's list, and that of transformers >= 5.13.
LAYER_KINDS = {
    **{"M": "mamba", "mamba": "mamba", "linear_attention": "mamba"},
    **{"*": "attention", "attention": "attention", "full_attention": "attention"},
    **{"-": "mlp", "mlp": "mlp"},
    **{"E": "moe", "moe": "moe"},
}

# Keys that change no result of a forward: of initialisation, speed and training, and fields that nothing reads.
# num_hidden_layers is here because the length of the layer list overrides it.
NEUTRAL_KEYS = """
    num_hidden_layers expand chunk_size use_mamba_kernels mamba_ssm_cache_dtype num_logits_to_keep rope_theta
    partial_rotary_factor rope_scaling rope_parameters rescale_prenorm_residual time_step_min time_step_max
    time_step_floor output_router_logits moe_shared_expert_overlap
""".split()

# Other names of the same keys, which some exports use.
ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_expand": "expand",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "layer_types": "layers_block_type",
}


def read_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Return the spec of a Nemotron-H config.json."""
    fields = Fields({ALIASES.get(key, key): value for key, value in config.items()}, "Nemotron-H")
    for key in ("use_bias", "mamba_proj_bias", "mlp_bias", "attention_bias", "residual_in_fp32"):
        fields.require(key, False)
    fields.require("use_conv_bias", True)
    fields.require("mamba_hidden_act", "silu")
    fields.require("mlp_hidden_act", "relu2")
    fields.require("sliding_window", None)
    width, norm_eps = fields.integer("hidden_size"), fields.number("layer_norm_epsilon", 1e-5)
    for key in ("norm_eps", "rms_norm_eps"):  # other names that some configs carry beside the first
        fields.require(key, norm_eps)
    fields.require("n_shared_experts", 1)
    kinds = _layer_kinds(fields, "hybrid_override_pattern", "layers_block_type")
    num_mtp = fields.count("num_nextn_predict_layers")
    mtp_kinds = _layer_kinds(fields, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    specs = _block_specs(fields, {*kinds, *(mtp_kinds if num_mtp else ())}, norm_eps)
    if num_mtp > 1 or (num_mtp and mtp_kinds != ["attention", "moe"]):
        raise UnsupportedModel(f"config.json: {num_mtp} MTP modules of {mtp_kinds}, wanted 1 of attention and moe")
    if not kinds:
        raise BadFile("config.json has no layer list", hint="wanted hybrid_override_pattern or layers_block_type")
    spec = DecoderSpec(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        blocks=tuple(specs[kind] for kind in kinds),
        norm_eps=norm_eps,
        norm_order="multiply_then_cast",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_positions=fields.integer("max_position_embeddings"),
        mtp=MtpSpec(blocks=tuple(specs[kind] for kind in mtp_kinds)) if num_mtp else None,
    )
    fields.ignore(NEUTRAL_KEYS)
    fields.finish()
    return spec


def _layer_kinds(fields: Fields, pattern_key: str, list_key: str) -> list[str]:
    pattern, listed = fields.optional(pattern_key), fields.optional(list_key)
    if not isinstance(pattern or "", str) or not isinstance(listed or [], list):
        raise BadFile(f"config.json: `{pattern_key}` is wanted as text, `{list_key}` as a list")
    spelled = [[LAYER_KINDS.get(str(kind)) for kind in layers] for layers in (pattern, listed) if layers]
    if any(None in kinds for kinds in spelled):
        raise UnsupportedModel(f"config.json: `{pattern_key if pattern else list_key}` names an unknown kind of layer")
    if len(spelled) == 2 and spelled[0] != spelled[1]:
        raise BadFile(f"config.json: `{pattern_key}` and `{list_key}` disagree")
    return [kind for kind in spelled[0] if kind] if spelled else []


def _block_specs(fields: Fields, kinds: set[str], norm_eps: float) -> dict[str, BlockSpec]:
    """Return the spec of each kind of block. Keys of kinds that the model does not have are leftovers, and used up."""
    makers: dict[str, Callable[[Fields, float], BlockSpec]] = {
        "mamba": _mamba_spec,
        "attention": _attention_spec,
        "mlp": _mlp_spec,
        "moe": _moe_spec,
    }
    specs = {kind: makers[kind](fields, norm_eps) for kind in makers if kind in kinds}
    fields.ignore(
        "mamba_num_heads mamba_head_dim ssm_state_size n_groups conv_kernel time_step_limit num_attention_heads "
        "num_key_value_heads head_dim attention_head_dim intermediate_size n_routed_experts "
        "num_experts_per_tok moe_intermediate_size "
        "moe_shared_expert_intermediate_size moe_latent_size n_group topk_group norm_topk_prob "
        "routed_scaling_factor".split()
    )
    return specs


def _mamba_spec(fields: Fields, norm_eps: float) -> Mamba2Spec:
    spec = Mamba2Spec(
        num_heads=fields.integer("mamba_num_heads"),
        head_dim=fields.integer("mamba_head_dim"),
        state_size=fields.integer("ssm_state_size"),
        num_groups=fields.integer("n_groups"),
        conv_kernel=fields.integer("conv_kernel"),
        norm_eps=norm_eps,
        time_step_limit=_time_step_limit(fields.optional("time_step_limit")),
    )
    _check_divides("n_groups", spec.num_groups, "mamba_num_heads", spec.num_heads)
    return spec


def _time_step_limit(limit: Any) -> tuple[float, float]:
    """Return the clamp of the step size; none where the config has none. transformers writes infinity as an object."""
    if limit is None:
        return 0.0, float("inf")
    listed = limit if isinstance(limit, Sequence) else ()
    bounds = [float("inf") if bound == {"__float__": "Infinity"} else bound for bound in listed]
    if [type(bound) in (int, float) for bound in bounds] != [True, True]:
        raise BadFile(f"config.json: `time_step_limit` is {limit!r}, wanted two numbers")
    return float(bounds[0]), float(bounds[1])


def _attention_spec(fields: Fields, norm_eps: float) -> AttentionSpec:
    num_heads = fields.integer("num_attention_heads")
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", fields.optional("attention_head_dim")),
    )
    _check_divides("num_key_value_heads", spec.num_kv_heads, "num_attention_heads", num_heads)
    return spec


def _mlp_spec(fields: Fields, norm_eps: float) -> MlpSpec:
    return MlpSpec(width=fields.integer("intermediate_size"), activation="relu2")


def _moe_spec(fields: Fields, norm_eps: float) -> MoeSpec:
    spec = MoeSpec(
        num_experts=fields.integer("n_routed_experts"),
        num_chosen=fields.integer("num_experts_per_tok"),
        width=fields.integer("moe_intermediate_size"),
        shared_width=fields.integer("moe_shared_expert_intermediate_size"),
        latent_width=fields.count("moe_latent_size") or None,
        num_groups=fields.integer("n_group", 1),
        num_chosen_groups=fields.integer("topk_group", 1),
        normalize_weights=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    _check_divides("n_group", spec.num_groups, "n_routed_experts", spec.num_experts)
    if spec.num_experts < 2 * spec.num_groups:
        raise BadFile(f"config.json: `n_group` is {spec.num_groups} for {spec.num_experts} experts, 2 in each at least")
    if spec.num_chosen_groups > spec.num_groups:
        raise BadFile(f"config.json: `topk_group` is {spec.num_chosen_groups} of {spec.num_groups} groups")
    eligible = spec.num_experts // spec.num_groups * spec.num_chosen_groups
    if spec.num_chosen > eligible:
        raise BadFile(f"config.json: `num_experts_per_tok` is {spec.num_chosen}, only {eligible} experts are eligible")
    return spec


def _check_divides(key: str, value: int, of_key: str, of_value: int) -> None:
    if of_value % value:
        raise BadFile(f"config.json: `{of_key}` is {of_value}, which `{key}` {value} does not divide")


def tensor_names(spec: DecoderSpec, stored: Collection[str]) -> TensorNames:
    """Return the rules of a Hugging Face checkpoint in the spelling that `stored` shows.

    Published files say `backbone.` and keep each expert apart, which is also how we save; transformers may save
    `model.` and stack the experts.
    """
    prefix = "model." if any(name.startswith("model.") for name in stored) else "backbone."
    is_stacked = any(name.endswith(".experts.up_proj") for name in stored)
    rules = rename({"embeddings.weight": f"{prefix}embeddings.weight", "norm.weight": f"{prefix}norm_f.weight"})
    rules += head_rules(spec, "lm_head.weight")
    for index, block in enumerate(spec.blocks):
        rules += place(block_rules(block, is_stacked), f"blocks.{index}.", f"{prefix}layers.{index}.")
    if spec.mtp:
        rules += place(_mtp_rules(spec.mtp), "mtp.", "mtp.layers.")
    return TensorNames(rules=tuple(rules), head=("lm_head.weight", f"{prefix}embeddings.weight"))


def block_rules(block: BlockSpec, experts_are_stacked: bool) -> list[Rule]:
    """Return the rules of one layer; most names are ours, for ours are the published ones."""
    match block:
        case Mamba2Spec():
            names = "in_proj.weight conv1d.bias A_log D dt_bias norm.weight out_proj.weight".split()
            taps = Rule(
                parameter="mixer.conv1d.weight",
                stored="mixer.conv1d.weight",
                transform=reshaped(
                    ours=(block.conv_width, block.conv_kernel), stored=(block.conv_width, 1, block.conv_kernel)
                ),
            )
            return [*_own_names(names), taps]
        case AttentionSpec():
            return _own_names([f"{p}_proj.weight" for p in "qkvo"])
        case MlpSpec():
            return _own_names(["up_proj.weight", "down_proj.weight"])
        case MoeSpec():
            return [*_own_names(_moe_names(block)), *_expert_rules(experts_are_stacked)]


def _moe_names(block: MoeSpec) -> list[str]:
    names = "gate.weight gate.e_score_correction_bias shared_experts.up_proj.weight shared_experts.down_proj.weight"
    latent = ["fc1_latent_proj.weight", "fc2_latent_proj.weight"] if block.latent_width else []
    return [*names.split(), *latent]


def _expert_rules(are_stacked: bool) -> list[Rule]:
    stored = "mixer.experts.{}" if are_stacked else "mixer.experts.{{expert}}.{}.weight"
    return [Rule(parameter=f"mixer.experts.{p}", stored=stored.format(p)) for p in ("up_proj", "down_proj")]


def _own_names(names: list[str]) -> list[Rule]:
    return rename({"norm.weight": "norm.weight"} | {f"mixer.{name}": f"mixer.{name}" for name in names})


def _mtp_rules(mtp: MtpSpec) -> list[Rule]:
    """Return the rules of the MTP module: its first layer holds the combiner, its last the final norm."""
    combiner = [f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj")]
    rules = rename({name: f"0.{name}" for name in combiner})
    for index, block in enumerate(mtp.blocks):
        rules += place(block_rules(block, experts_are_stacked=False), f"blocks.{index}.", f"{index}.")
    return rules + rename({"final_layernorm.weight": f"{len(mtp.blocks) - 1}.final_layernorm.weight"})
