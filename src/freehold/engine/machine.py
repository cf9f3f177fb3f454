"""What memory this machine has and what of it is free to use, and how many threads it runs at once."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A memory's bytes in all, and those that a new process may take."""

    total_bytes: int
    available_bytes: int


def memory_of(device: torch.device) -> Memory:
    """Return the memory of a device of this machine."""
    if device.type == "cpu":
        return main_memory()
    available, total = torch.cuda.mem_get_info(device)
    return Memory(total_bytes=total, available_bytes=available)


def main_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Return the memory of the machine, or of the container that this runs in where that has less.

    Where the system does not say what is available (macOS), all of it counts as available.
    """
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = _fields(proc / "meminfo")
    total = fields.get("MemTotal", pages // 1024) * 1024
    available = fields.get("MemAvailable", total // 1024) * 1024
    limit = cgroup / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        # What files occupy is given back when it is needed, so only anonymous memory counts as taken.
        taken = _fields(cgroup / "memory.stat").get("anon", 0)
        total, available = min(total, int(text)), min(available, max(0, int(text) - taken))
    return Memory(total_bytes=total, available_bytes=available)


def usable_threads(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many threads run at once: the processors that this process may use, or what its container's share of
    their time is worth where that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cgroup / "cpu.max"
    if limit.is_file():
        quota, _, period = limit.read_text().strip().partition(" ")
        if quota.isdecimal():
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines `name: number kB` or `name number`, empty where there is none."""
    if not path.is_file():
        return {}
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", path.read_text(), re.MULTILINE)}
