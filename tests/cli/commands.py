"""Running the command line in tests: within this process, where torch is loaded already, or as a process of its own.

On one thread: several tests share the cores, and threads that wait for each other on busy cores take ten times longer.
"""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import IO, Any
from unittest import mock

import pytest
import torch

from freehold.cli.main import main

TIMEOUT_S = 120.0
ENVIRONMENT = {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
START = "from freehold.cli.main import main; main()"
# A terminal as its first three files: the one that Ctrl-C and Ctrl-D are typed into.
START_IN_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {START}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def call(*arguments: object, stdin: str = "") -> Ended:
    """Run a command within this process, with pipes for its three files."""
    out, err = io.StringIO(), io.StringIO()
    before, num_threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            mock.patch("sys.stdin", io.StringIO(stdin)),
            pytest.raises(SystemExit) as end,
        ):
            main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
        torch.set_num_threads(num_threads)
    assert isinstance(end.value.code, int), f"exit code {end.value.code!r}"
    return Ended(code=end.value.code, out=out.getvalue(), err=err.getvalue())


@contextmanager
def spawn(
    *arguments: object, start: str = START, flags: Sequence[str] = (), lives_s: float = TIMEOUT_S, **files: Any
) -> "Iterator[subprocess.Popen[str]]":
    """Run a command as a process of its own, which is ended where a test would wait for it without end.

    flags: the interpreter's own. lives_s: how long it may.
    """
    command = [sys.executable, *flags, "-c", start, *map(str, arguments)]
    with subprocess.Popen(command, text=True, bufsize=1, env={**os.environ, **ENVIRONMENT}, **files) as process:
        watchdog = threading.Timer(lives_s, process.kill)
        watchdog.start()
        try:
            yield process
            process.wait()
        finally:
            watchdog.cancel()
            process.kill()


def read_until(stream: IO[str], wanted: str) -> str:
    """Return what a process wrote until the wanted text came, or all of it."""
    seen = ""
    while wanted not in seen and (char := stream.read(1)):
        seen += char
    return seen


def assert_refused(ended: Ended, kind: str) -> None:
    """Assert that a command ended as a user's mistake ends: one clear line, perhaps a hint, and nothing else."""
    lines = ended.err.splitlines()
    assert ended.code == 2, ended
    assert ended.out == "", ended
    assert lines[0].startswith(f"{kind}: "), ended
    assert len(lines[0]) < 400, ended
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), ended
