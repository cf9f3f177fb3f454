"""Where the memory of weights lies."""

from pathlib import Path

import pytest

from freehold.ops.weight import large_bytes
from models.forms import needs_kernels

NUMA_MAPS = Path("/proc/self/numa_maps")


@needs_kernels
@pytest.mark.skipif(not NUMA_MAPS.exists(), reason="this system does not tell where memory lies")
def test_weights_go_to_all_memory_nodes_in_turn() -> None:
    memory = large_bytes(64 << 20).fill_(1)
    inside = memory.data_ptr() + memory.numel() // 2
    lines = [line.split() for line in NUMA_MAPS.read_text().splitlines()]
    policies = {int(start, 16): policy for start, policy, *_ in lines}
    assert policies[max(start for start in policies if start <= inside)].startswith("interleave")
