"""The specification of a decoder: small frozen dataclasses, one per kind of block.

A field that only one kind of block uses lives in the spec of that block. Nothing here knows families, files or tensors.
"""

from dataclasses import dataclass
from typing import Literal

from freehold.ops.norm import NormOrder


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Frequency-dependent stretching of RoPE as in Llama 3.1 and later (Llama team, 2024, arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv 2309.00071, sections 3.2 to 3.4), static: applied at every length.

    attention_factor: what cosine and sine are multiplied by.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864) in the rotate-half layout."""

    theta: float
    scaling: Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal attention with grouped key/value heads; `rope=None` means no positional encoding at all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    rope: RopeSpec | None = None


@dataclass(frozen=True, kw_only=True)
class Mamba2Spec:
    """Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060) with a gated RMSNorm over each of `num_groups` groups."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    norm_eps: float
    time_step_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def inner_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        return self.inner_width + 2 * self.num_groups * self.state_size


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """A feed-forward layer: `silu_gated` is down(silu(gate(x)) * up(x)), `relu2` is down(relu(up(x)) ** 2)."""

    width: int
    activation: Literal["silu_gated", "relu2"]


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Routed relu² experts with a sigmoid router, one shared expert, and optionally a latent space for the routed ones.

    `latent_width` is the LatentMoE of Nemotron 3 (arXiv 2512.20856): experts read and write a projection of that width.
    The router sees the full hidden vector in any case.
    """

    num_experts: int
    num_chosen: int
    width: int
    shared_width: int
    latent_width: int | None = None
    num_groups: int = 1
    num_chosen_groups: int = 1
    normalize_weights: bool = True
    scale: float = 1.0


BlockSpec = AttentionSpec | Mamba2Spec | MlpSpec | MoeSpec


@dataclass(frozen=True, kw_only=True)
class MtpSpec:
    """The multi-token prediction module of Nemotron 3: a combiner, the blocks, a final norm."""

    blocks: tuple[BlockSpec, ...]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder: embeddings, residual blocks `x + mixer(norm(x))`, a final norm and an output head.

    norm_order: whether RMSNorm multiplies by its weight in float32 or after the cast to the model's dtype.
    max_positions: the longest context the model was made for.
    mtp: the module that drafts a second token, where the model has one.
    """

    vocab_size: int
    width: int
    blocks: tuple[BlockSpec, ...]
    norm_eps: float
    norm_order: NormOrder
    tied_embeddings: bool
    max_positions: int
    mtp: MtpSpec | None = None


BLOCK_LETTERS: dict[type[BlockSpec], str] = {AttentionSpec: "*", Mamba2Spec: "M", MlpSpec: "-", MoeSpec: "E"}


def block_pattern(blocks: tuple[BlockSpec, ...]) -> str:
    """Return the blocks as a line, one letter each: M Mamba-2, * attention, - MLP, E experts."""
    return "".join(BLOCK_LETTERS[type(block)] for block in blocks)
