"""Programs of several processes: started as torchrun starts them, their output and how they ended."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 240


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


def start(module: str, *arguments: object, count: int) -> list[subprocess.Popen[str]]:
    """Start a module of the tests in several processes that can find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=TESTS,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ends_of(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for all processes, and return how they ended; where one does not, all are killed."""
    try:
        told = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Ended(code=p.returncode, out=out, err=err) for p, (out, err) in zip(processes, told, strict=True)]


def run(module: str, *arguments: object, count: int) -> list[Ended]:
    """Run a module of the tests in several processes to their end."""
    ended = ends_of(start(module, *arguments, count=count))
    assert [each.code for each in ended] == [0] * count, "\n".join(each.err for each in ended)
    return ended
