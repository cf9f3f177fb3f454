"""What models take: against what is published of them, and against what tiny ones really allocate."""

import pytest
import torch

from freehold.engine.plan import (
    PROGRAM_BYTES,
    RESERVED_BYTES,
    Need,
    contexts_up_to,
    count_parts,
    need_of,
    serving_plan,
    step_bytes,
)
from freehold.errors import BadInput
from freehold.models.layout import Capacity
from freehold.models.spec import AttentionSpec, Mamba2Spec
from models.published import NANO, SUPER, ULTRA
from models.tiny import CONFIGS, LLAMA, MTP, tiny_decoder, tiny_spec


@pytest.mark.parametrize(
    ("config", "active"),
    [(NANO, 3.23e9), (SUPER, 12.23e9), (ULTRA, 55.0e9)],
    ids=["nano", "super", "ultra"],
)
def test_a_token_meets_as_many_parameters_as_published(config, active):
    assert sum(part.num_active for part in count_parts(tiny_spec(config))) == pytest.approx(active, rel=0.002)


@pytest.mark.parametrize("config", [*CONFIGS.values(), MTP], ids=[*CONFIGS, "mtp"])
def test_every_parameter_is_part_of_one_part(config):
    decoder = tiny_decoder(config)
    parts = count_parts(decoder.spec)
    assert sum(part.num_parameters for part in parts) == sum(p.numel() for p in decoder.parameters())
    assert all(part.num_active <= part.num_parameters for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [*CONFIGS.values(), MTP], ids=[*CONFIGS, "mtp"])
def test_needs_are_what_is_allocated(config, dtype):
    decoder, num_tokens = tiny_decoder(config, dtype=dtype), 32
    need = need_of(decoder.spec, dtype)
    states = decoder.allocate_states(Capacity(num_slots=1, num_pages=1, page_size=num_tokens))
    tensors = [tensor for state in states if state for tensor in vars(state).values() if tensor is not None]
    assert need.weight_bytes == sum(p.nbytes for p in decoder.parameters())
    assert need.sequence_bytes(num_tokens) == sum(tensor.nbytes for tensor in tensors)


def test_sequences_are_what_is_left_beside_the_weights():
    need = Need(dtype="float32", weight_bytes=1000, recurrent_bytes_per_sequence=50, kv_bytes_per_token=5)
    assert need.sequences_in(RESERVED_BYTES + 999, 10) == -1
    assert need.sequences_in(RESERVED_BYTES + 1099, 10) == 0
    assert need.sequences_in(RESERVED_BYTES + 1200, 10) == 2


@pytest.mark.parametrize(
    ("max_positions", "contexts"),
    [(256, [256]), (2048, [2048]), (8192, [2048, 4096, 8192]), (10_000, [2048, 4096, 8192, 10_000])],
    ids=str,
)
def test_contexts_end_with_the_models_own(max_positions, contexts):
    assert contexts_up_to(max_positions) == contexts


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_servers_plan_takes_no_more_than_its_memory_or_half_of_what_is_free_beside_the_weights(config):
    spec, asked = tiny_spec(config), {"weight_bytes": 10**6, "dtype": torch.float32, "num_sequences": 1024}
    given = serving_plan(spec, memory_bytes=660 * 10**6, free_bytes=10**12, **asked)
    fixed = given.weight_bytes + given.step_bytes + given.bodies_bytes + PROGRAM_BYTES
    free = serving_plan(spec, memory_bytes=None, free_bytes=fixed + 10**7, **asked)
    assert fixed < given.total_bytes <= 660 * 10**6 or not spec_has_states(spec)
    assert free.total_bytes <= fixed + 10**7 // 2
    with pytest.raises(BadInput, match=r"0\.6 GB of memory hold the weights"):
        serving_plan(spec, memory_bytes=600 * 10**6, free_bytes=10**12, **asked)


def spec_has_states(spec):
    return any(isinstance(block, AttentionSpec | Mamba2Spec) for block in spec.blocks)


def test_a_step_takes_more_for_more_tokens_more_sequences_and_a_larger_vocabulary():
    small = step_bytes(tiny_spec(LLAMA), num_sequences=4, budget_tokens=64)
    assert step_bytes(tiny_spec(LLAMA), num_sequences=4, budget_tokens=65536) > 500 * small
    assert step_bytes(tiny_spec(LLAMA), num_sequences=1024, budget_tokens=64) > 5 * small
    assert step_bytes(tiny_spec(LLAMA | {"vocab_size": 151936}), num_sequences=4, budget_tokens=64) > 200 * small
