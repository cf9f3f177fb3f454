"""What a start does beside imports changes nothing but its time, and leaves nothing behind."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from cli.commands import TIMEOUT_S, spawn
from freehold.cli.starting import starting
from freehold.ops.native import kernels
from inputs import smollm2_gguf

LOADS_AHEAD = """
import sys
from freehold.cli.starting import load_torch_library

def mapped() -> bool:
    with open("/proc/self/maps") as maps:
        return "libtorch_cpu.so" in maps.read()

before = mapped()
load_torch_library()
assert (before, mapped(), "torch" in sys.modules) == (False, True, False)
import torch
assert torch.ones(2, 2).mm(torch.ones(2, 2)).sum() == 8
"""

ENDS = """
from freehold.cli.starting import starting

class Circle:
    def __init__(self):
        self.me = self

    def __del__(self):
        print("gone")

with starting():
    Circle()
"""


@pytest.fixture
def thawed() -> Iterator[None]:
    """Have garbage collected after a test as it was before."""
    yield
    gc.unfreeze()


def test_garbage_is_collected_again_after_a_start_but_for_what_was_there(thawed):
    with starting() as beside:
        assert not gc.isenabled()
        assert beside.submit(gc.isenabled).result() is False
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_garbage_is_collected_again_after_a_start_that_failed(thawed):
    with pytest.raises(ZeroDivisionError), starting():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_what_a_start_left_uncollected_goes_when_the_process_ends():
    ended = subprocess.run([sys.executable, "-c", ENDS], timeout=TIMEOUT_S, capture_output=True, text=True)
    assert ended.stdout == "gone\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_is_imported_as_ever_where_its_library_was_loaded_ahead():
    assert subprocess.run([sys.executable, "-c", LOADS_AHEAD], timeout=TIMEOUT_S).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(kernels() is None, reason="weights are packed for the native kernels, which are off")
def test_a_server_lets_go_of_the_file_that_its_packed_weights_were_read_from():
    path = smollm2_gguf()
    with spawn("serve", path, "--port", 0, "--memory", 2, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(f"{url}/ready", timeout=TIMEOUT_S).status_code == 200
        with open(f"/proc/{process.pid}/maps") as maps:
            assert path.name not in maps.read()
        process.terminate()
        process.communicate(timeout=TIMEOUT_S)
