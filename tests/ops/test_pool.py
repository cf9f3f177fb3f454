"""The threads that kernels share: calls from several Python threads, changing numbers of threads, forked children."""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from freehold.models.layout import Layout
from freehold.ops.linear import linear
from freehold.ops.native import kernels
from freehold.ops.weight import matrix_of
from models.blocks import SPECS, random_block, random_hidden
from models.forms import needs_kernels, on_threads, same_bits
from models.packing import random_packed

pytestmark = needs_kernels

ROUNDS = 200
CHILD_TIME_S = 30.0
NOISE_S = 0.05  # of processor time, where 400 calls take some milliseconds
MANY_THREADS = (1, 2, 3, 5, 8, 17, 33)


@pytest.fixture(autouse=True)
def _in_time():
    """Kill a test that hangs, which would otherwise be all that the run says."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def products():
    """Rows and weights of several shapes and kinds."""
    return [
        (torch.randn(1, 256), random_packed("Q4_K", (300, 256))),
        (torch.randn(40, 64), random_packed("Q8_0", (33, 64))),
        (torch.randn(3, 70), torch.randn(17, 70)),
        (torch.randn(290, 32).bfloat16(), torch.randn(5, 32).bfloat16()),
    ]


def test_calls_from_several_python_threads_at_once_give_the_same_bits():
    cases = products()
    expected = [linear(*case) for case in cases]
    start = Barrier(6)

    def call_often(which: int) -> int:
        start.wait()
        return sum(same_bits(linear(*cases[(which + i) % 4]), expected[(which + i) % 4]) for i in range(ROUNDS))

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(call_often, range(6))) == [ROUNDS] * 6


def test_blocks_from_several_python_threads_at_once_give_the_same_bits():
    """A block works in memory of its thread, and a team's members in that of the caller."""
    names = ["attention-rope", "mamba2", "moe", "mlp-gated"]
    blocks = [random_block(*SPECS[name], dtype=torch.float32) for name in names]
    layout, hidden_TD = Layout.packed([30, 1, 9]), random_hidden(40, 32, dtype=torch.float32)
    expected = [block(hidden_TD.clone(), layout, None) for block in blocks]
    start = Barrier(4)

    def call_often(which: int) -> bool:
        start.wait()
        with torch.inference_mode():
            outputs = [blocks[which](hidden_TD.clone(), layout, None) for _ in range(50)]
        return all(same_bits(out_TD, expected[which]) for out_TD in outputs)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call_often, range(4))) == [True] * 4


def test_a_thread_that_ends_leaves_nothing_behind_that_others_need():
    case = products()[0]
    expected_TF = linear(*case)
    for _ in range(20):
        with ThreadPoolExecutor(1) as threads:
            assert same_bits(threads.submit(linear, *case).result(), expected_TF)


def exit_of(child) -> int | None:
    """Fork, run `child` there, and return the exit status; None where it hangs, and then it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(0)
            os._exit(0 if child() else 1)
        except BaseException:
            os._exit(2)
    deadline = time.monotonic() + CHILD_TIME_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def bits_by_kernels_alone(case, expected_TF: torch.Tensor, num_threads: int) -> bool:
    """Return whether a product has these bits; no operation of torch that would start threads of its own."""
    rows_TD, weight = case
    out_TF, matrix = torch.empty(len(rows_TD), weight.shape[0]), matrix_of(weight)
    for _ in range(20):
        out, rows = out_TF.data_ptr(), rows_TD.data_ptr()
        kernels().linear(num_threads, out, False, rows, False, len(rows_TD), matrix, 0, False)
    return out_TF.numpy().tobytes() == expected_TF.numpy().tobytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking where threads are: that is the point
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_forked_child_has_threads_of_its_own(num_threads):
    case = products()[0]
    with on_threads(3):
        expected_TF = linear(*case)
    assert exit_of(lambda: bits_by_kernels_alone(case, expected_TF, num_threads)) == 0
    assert bits_by_kernels_alone(case, expected_TF, num_threads), "and the parent keeps its own"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_while_others_call_kernels_can_call_them_too():
    case = products()[0]
    expected_TF = linear(*case)
    stop = False

    def call_until_stopped() -> bool:
        while not stop:
            if not same_bits(linear(*case), expected_TF):
                return False
        return True

    with ThreadPoolExecutor(2) as threads:
        callers = [threads.submit(call_until_stopped) for _ in range(2)]
        statuses = [exit_of(lambda: bits_by_kernels_alone(case, expected_TF, 3)) for _ in range(5)]
        stop = True
        assert statuses == [0] * 5
        assert all(caller.result() for caller in callers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_child_can_call_kernels():
    case = products()[0]
    expected_TF = linear(*case)

    def child() -> bool:
        mine = bits_by_kernels_alone(case, expected_TF, 2)
        return mine and exit_of(lambda: bits_by_kernels_alone(case, expected_TF, 2)) == 0

    assert exit_of(child) == 0


# Large teams are made in children, for their threads stay.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_team_of_any_size_after_any_other_gives_the_same_bits():
    cases = [(rows_TD, weight) for rows_TD, weight in products() if rows_TD.dtype is torch.float32]
    expected = [linear(*case) for case in cases]
    sizes = torch.randint(len(MANY_THREADS), (60,)).tolist()

    def child() -> bool:
        return all(
            bits_by_kernels_alone(cases[i % 3], expected[i % 3], MANY_THREADS[size]) for i, size in enumerate(sizes)
        )

    assert exit_of(child) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_team_that_was_large_once_costs_later_small_ones_nothing():
    """In processor time of all threads, for those of no part in a call should sleep."""
    case = products()[0]
    expected_TF = linear(*case)

    def cost_s(num_threads: int) -> float:
        start = time.process_time()
        for _ in range(20):
            bits_by_kernels_alone(case, expected_TF, num_threads)
        return time.process_time() - start

    def child() -> bool:
        cost_s(2)
        before_s = cost_s(2)
        bits_by_kernels_alone(case, expected_TF, 33)
        return cost_s(2) <= 10 * before_s + NOISE_S

    assert exit_of(child) == 0


def test_the_threads_of_the_pool_race_for_nothing(tmp_path):
    compiler, here = os.environ.get("CXX", "c++"), Path(__file__).parent
    native, program = here.parents[1] / "native", str(tmp_path / "races")
    sources = [str(here / "pool_races.cpp"), str(native / "pool.cpp")]
    command = [compiler, "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{native}", *sources]
    try:
        subprocess.run([*command, "-o", program], capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("there is no compiler with a thread sanitizer")
    # The sanitizer wants its places in memory, which a random layout may have taken.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, program], capture_output=True, text=True, timeout=100)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run here")
    assert (done.stdout, done.stderr) == ("ok\n", "")
