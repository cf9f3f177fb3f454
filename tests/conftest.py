"""What every test runs under: two threads, fixed seeds, fuzzing within a budget of time, and checked shapes in ops."""

import importlib
import importlib.util
import os
import pkgutil
import random
import signal
import sys

# Threads that wait should sleep: where another process is busy, spinning ones make these small models ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch, which reads it once

import httpx
import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

import freehold.ops
from shapes import check_shapes

torch.set_num_threads(2)

# httpx gives up after five seconds, and no test is about that: a machine that others use may take longer for an answer.
httpx._config.DEFAULT_TIMEOUT_CONFIG.read = 300.0

# A shell starts what it puts in the background with Ctrl-C ignored, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernels of another build than the installed one: with other forms (ops/test_avx512_emulated.py), or sanitizers.
if kernels := os.environ.get("FREEHOLD_TEST_KERNELS"):
    described = importlib.util.spec_from_file_location("freehold.ops.native._kernels", kernels)
    assert described is not None
    assert described.loader is not None
    sys.modules[described.name] = importlib.util.module_from_spec(described)
    described.loader.exec_module(sys.modules[described.name])

SLOW_IS_FINE = [HealthCheck.too_slow]
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, suppress_health_check=SLOW_IS_FINE)
settings.register_profile("nightly", max_examples=20_000, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Here and not in a fixture: a test module that imports an op takes the checked one.
for found in pkgutil.iter_modules(freehold.ops.__path__, "freehold.ops."):
    if not found.ispkg:
        check_shapes(importlib.import_module(found.name))

# Files whose tests take minutes each. They begin first: one that began last would leave the other processes idle.
LONG = ("test_sanitized.py", "test_real_weights.py", "test_peft.py", "test_perplexity.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long before all else, each in the order that it had. Mutates: items."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
