"""What a machine or a container has: memory, and threads that run at once."""

import os

from freehold.engine.machine import main_memory, usable_threads


def test_memory_is_the_machines_or_the_containers(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal:        8000 kB\nMemFree: 1000 kB\nMemAvailable:    6000 kB\n")
    machine = main_memory(proc, cgroup)
    assert (machine.total_bytes, machine.available_bytes) == (8_192_000, 6_144_000)
    (cgroup / "memory.max").write_text("max\n")
    assert main_memory(proc, cgroup) == machine
    (cgroup / "memory.max").write_text("4096000\n")
    (cgroup / "memory.stat").write_text("anon 96000\nfile 3000000\n")
    container = main_memory(proc, cgroup)
    assert (container.total_bytes, container.available_bytes) == (4_096_000, 4_000_000)
    assert main_memory(tmp_path / "none", tmp_path / "none").total_bytes > 1 << 28


def test_threads_are_the_processors_or_what_a_quota_is_worth(tmp_path):
    count = len(os.sched_getaffinity(0))
    assert usable_threads(tmp_path / "none") == count
    for text, expected in {
        "max 100000": count,
        f"{count * 100000} 100000": count,
        "100000 100000": 1,
        "5000 100000": 1,
        "900000000 100000": count,
    }.items():
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert usable_threads(tmp_path) == expected, text
