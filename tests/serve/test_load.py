"""The load of bench/load.py in short: many clients of a real server, of whom some leave, stall or vanish."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import ENVIRONMENT
from cli.folders import write_folder
from models.forms import needs_kernels
from serve.wide import HYBRID

LOAD = Path(__file__).parents[2] / "bench" / "load.py"
# Memory for fewer pages than all clients want, and fewer sequences than clients, so that some wait and some make room.
SERVE = "--memory 0.7 --max-sequences 16 --threads 1 --log quiet"


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process has is read as Linux says it")
def test_nothing_fails_and_nothing_is_left_after_a_load(tmp_path):
    folder, seen = write_folder(tmp_path / "hybrid", HYBRID), tmp_path / "seen.json"
    options = ("--seconds", "12", "--streams", "24", "--prompt-chars", "700", "--answer-tokens", "96")
    command = (sys.executable, str(LOAD), str(folder), *options, "--serve", SERVE, "--json", str(seen))
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(seen.read_text())
    kinds = {kind for counts in result["outcomes"].values() for kind, count in counts.items() if count}
    assert result["faults"] == []
    assert kinds >= {"done", "left", "stalled", "vanished"}
    assert result["samples"][-1]["metrics"]["freehold_preemptions_total"] > 0
