"""A real server under a load that fills its pages and slots: its process stays within the plan that it printed."""

import random
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cli.commands import TIMEOUT_S, spawn
from cli.folders import write_folder
from freehold.engine.plan import PROGRAM_BYTES
from models.forms import needs_kernels
from serve.wide import DENSE, HYBRID

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is Linux's")

CONFIGS = {"dense": DENSE, "hybrid": HYBRID}
OPTIONS = {
    "memory": ("--memory", 0.75, "--max-sequences", 16),
    "free memory": ("--max-sequences", 6, "--context", 768),
    "int8": ("--memory", 0.68, "--max-sequences", 16, "--kv-dtype", "int8"),
}
NUM_REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 700, 40
FULL = 0.75  # of what states have, at least, is written to
REQUEST_BYTES = 48 << 20  # for the requests themselves, their answers and what the interpreter keeps of them


def status_of(pid: int) -> dict[str, int]:
    """Return the bytes that the system counts for a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(size) * 1024 for name, size in re.findall(r"^(Vm\w+):\s+(\d+) kB", text, re.MULTILINE)}


def planned(line: str) -> dict[str, float]:
    """Return the bytes of each part of a printed plan."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    found = re.findall(r"([a-z][a-z ]*[a-z]) ([\d.,]+) (k?M?G?B)", line.partition(": ")[2])
    return {name: float(number.replace(",", "")) * units[unit] for name, number, unit in found}


def fill(url: str) -> None:
    """Ask for more at once than pages hold."""
    choose = random.Random(0)
    prompts = [[choose.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]

    def ask(prompt: list[int]) -> None:
        body = {"model": "wide", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "logprobs": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S).status_code == 200

    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        list(threads.map(ask, prompts))


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_server_whose_states_are_full_stays_within_its_plan(config, options, tmp_path):
    folder = write_folder(tmp_path / "wide", config)
    command = ("serve", folder, "--port", 0, "--threads", 1, *options)
    with spawn(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        plan = planned(process.stderr.readline())
        url = process.stdout.readline().strip()
        idle = status_of(process.pid)["VmRSS"]
        fill(url)
        peak = status_of(process.pid)["VmHWM"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    states = plan["keys and values"] + plan.get("recurrent states", 0)
    assert peak <= plan["in all"]
    assert peak - idle <= states + plan["steps"] + REQUEST_BYTES
    assert peak - idle >= FULL * states, "the load does not fill what it is about"
    if "--memory" in options:
        assert plan["in all"] <= options[1] * 1e9
    assert plan["the program"] == pytest.approx(PROGRAM_BYTES, rel=0.01)
