"""Single blocks of every kind with random weights, and what they make of a batch over two steps with states."""

from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.models.block import Block
from freehold.models.decoder import Decoder, build_decoder
from freehold.models.layout import Capacity, Layout, PagedKV, Recurrent, State, allocate_state
from freehold.models.spec import AttentionSpec, BlockSpec, DecoderSpec, Mamba2Spec, MlpSpec, MoeSpec, RopeSpec
from freehold.ops.attention import PAGE_TOKENS
from models.packing import pack_decoder
from models.tiny import randomize

ROPE = RopeSpec(theta=10000.0)
MAMBA2 = Mamba2Spec(num_heads=4, head_dim=16, state_size=16, num_groups=2, conv_kernel=4, norm_eps=1e-5)
MOE = MoeSpec(num_experts=8, num_chosen=3, width=32, shared_width=64, scale=2.5)

# Each with a width of the hidden states. Around sixteen lanes, and what the kernels take at most.
SPECS: dict[str, tuple[BlockSpec, int]] = {
    "mlp-gated": (MlpSpec(width=48, activation="silu_gated"), 32),
    "mlp-gated-odd": (MlpSpec(width=45, activation="silu_gated"), 37),
    "mlp-relu2": (MlpSpec(width=48, activation="relu2"), 32),
    "mlp-relu2-odd": (MlpSpec(width=17, activation="relu2"), 21),
    "attention": (AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16), 32),
    "attention-rope": (AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, rope=ROPE), 32),
    "attention-rope-bias": (AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=80, rope=ROPE, qkv_bias=True), 37),
    "attention-one-kv-head": (AttentionSpec(num_heads=7, num_kv_heads=1, head_dim=32, rope=ROPE), 32),
    "attention-widest": (AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=256, rope=ROPE), 32),
    "mamba2": (MAMBA2, 32),
    "mamba2-one-group": (
        Mamba2Spec(
            num_heads=3,
            head_dim=80,
            state_size=32,
            num_groups=1,
            conv_kernel=2,
            norm_eps=1e-5,
            time_step_limit=(0.01, 0.5),
        ),
        37,
    ),
    "mamba2-one-tap": (
        Mamba2Spec(num_heads=2, head_dim=16, state_size=16, num_groups=2, conv_kernel=1, norm_eps=1e-5),
        32,
    ),
    "mamba2-group-per-head": (
        Mamba2Spec(num_heads=4, head_dim=64, state_size=48, num_groups=4, conv_kernel=8, norm_eps=1e-5),
        32,
    ),
    "moe": (MOE, 32),
    "moe-latent": (MoeSpec(num_experts=8, num_chosen=3, width=24, shared_width=40, latent_width=16), 37),
    "moe-router-groups": (
        MoeSpec(num_experts=12, num_chosen=3, width=24, shared_width=40, num_groups=4, num_chosen_groups=2, scale=0.5),
        32,
    ),
    "moe-unnormalized": (
        MoeSpec(num_experts=20, num_chosen=1, width=33, shared_width=17, normalize_weights=False),
        32,
    ),
    "moe-all-experts": (MoeSpec(num_experts=4, num_chosen=4, width=32, shared_width=32), 32),
}
# Rows of whole blocks of 32 columns, and of 256.
PACKED_SPECS: dict[str, tuple[BlockSpec, int]] = {
    "mlp-gated": (MlpSpec(width=96, activation="silu_gated"), 64),
    "mlp-relu2": (MlpSpec(width=96, activation="relu2"), 64),
    "attention": (AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, rope=ROPE, qkv_bias=True), 64),
    "mamba2": (MAMBA2, 64),
    "moe": (MOE, 64),
    "moe-latent": (MoeSpec(num_experts=8, num_chosen=3, width=64, shared_width=32, latent_width=32), 96),
    "moe-plain-down": (MoeSpec(num_experts=8, num_chosen=3, width=48, shared_width=40), 64),
}
SUPER_SPECS: dict[str, tuple[BlockSpec, int]] = {
    "mlp-gated": (MlpSpec(width=512, activation="silu_gated"), 256),
    "attention": (AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, rope=ROPE), 256),
    "mamba2": (
        Mamba2Spec(num_heads=4, head_dim=64, state_size=16, num_groups=2, conv_kernel=4, norm_eps=1e-5),
        256,
    ),
    "moe-latent": (MoeSpec(num_experts=4, num_chosen=2, width=256, shared_width=256, latent_width=256), 256),
}

# Two steps: a prompt, a short one, a token; then a token, a few, a long chunk.
STEPS = ((37, 5, 1), (1, 3, 70))


def random_block(spec: BlockSpec, width: int, *, dtype: torch.dtype, format: str | None = None, seed: int = 0) -> Block:
    """Return a block with random weights, its matrices packed where a format is named."""
    order = "multiply_then_cast" if isinstance(spec, Mamba2Spec | MoeSpec) else "cast_then_multiply"
    described = DecoderSpec(
        vocab_size=2,
        width=width,
        blocks=(spec,),
        norm_eps=1e-5,
        norm_order=order,
        tied_embeddings=True,
        max_positions=1024,
    )
    decoder: Decoder = build_decoder(described, dtype=dtype).to_empty(device="cpu")
    randomize(decoder, seed=seed)
    decoder.requires_grad_(False)
    if format:
        pack_decoder(decoder, format)
    block = decoder.blocks[0]
    assert isinstance(block, Block)
    return block


def random_hidden(num_tokens: int, width: int, *, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return hidden states so small that a block's own output, about one, is what counts."""
    values = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    return (0.01 * values).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a block makes of a batch: its outputs of all steps, and what each sequence's states hold after the last."""

    outputs_TD: Tensor
    states: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.outputs_TD, *self.states)


def run_block(
    block: Block,
    width: int,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    by_reference: bool = False,
) -> Outcome:
    """Return what a block makes of STEPS, its pages scattered and full of NaN where nothing was written."""
    num_sequences = len(STEPS[0])
    num_pages = [-(-sum(lengths) // PAGE_TOKENS) for lengths in zip(*STEPS, strict=True)]
    free = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(1)).tolist()
    pages = [[free.pop() for _ in range(count)] for count in num_pages]
    slots = [2, 0, 1]
    capacity = Capacity(num_slots=num_sequences, num_pages=sum(num_pages), page_size=PAGE_TOKENS)
    state = allocate_state(block.spec, capacity, dtype=dtype, device="cpu", kv_dtype=kv_dtype)
    if isinstance(state, PagedKV):
        for pool in state.pools:
            pool.fill_(torch.nan if pool.is_floating_point() else 99)
    contexts, outputs = [0] * num_sequences, []
    for step, lengths in enumerate(STEPS):
        layout = Layout.step(lengths, contexts, slots=slots, pages=pages, page_size=PAGE_TOKENS)
        hidden_TD = random_hidden(layout.num_tokens, width, dtype=dtype, seed=step)
        outputs.append((block.reference if by_reference else block)(hidden_TD, layout, state))
        contexts = list(layout.ends)
    return Outcome(outputs_TD=torch.cat(outputs), states=_kept(state, pages, contexts))


def _kept(state: State, pages: list[list[int]], ends: list[int]) -> tuple[Tensor, ...]:
    match state:
        case PagedKV():
            rows = list(zip(pages, ends, strict=True))
            return tuple(part[:end] for row, end in rows for part in state.read(row))
        case Recurrent():
            return state.conv_tail, state.ssm
        case None:
            return ()
