"""Engines in processes of their own that take turns, and the machine's limits measured among the turns."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import product_rates

from freehold.evaluate.limits import read_bandwidth

# Between turns. Intel's OpenMP, which some peers use, spins for 200 ms after its last work.
SETTLE_S = 0.3
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
VISITS = 2  # of each engine, where memory holds only one at a time


@dataclass(frozen=True, kw_only=True)
class Participant:
    """An engine and how to start it."""

    engine: str
    python: str
    path: Path
    weights: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to measure. num_tokens: what the rate counts. limit: what of the machine is measured beside it."""

    name: str
    command: str
    num_tokens: int
    limit: str | None = None


class Process:
    """An engine in a process of its own."""

    def __init__(self, participant: Participant, num_threads: int):
        script = Path(__file__).with_name("engine_process.py")
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115, closed on exit
        self._engine = participant.engine
        self._child = subprocess.Popen(
            [
                *(participant.python, str(script), participant.engine, str(participant.path)),
                *(participant.weights, str(num_threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.started: dict[str, Any] = self._reply()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()
        self._errors.close()

    @property
    def processor_s(self) -> float:
        """Processor seconds that the engine has taken."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def ask(self, command: str) -> float:
        """Return the number that the engine answers a command with."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # of a child that has ended; its reply says so
            self._child.stdin.write(command + "\n")
            self._child.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._child.stdout is not None
        if line := self._child.stdout.readline():
            return json.loads(line)
        code = self._child.wait()
        self._errors.seek(0)
        last_lines = "".join(self._errors.readlines()[-8:])
        raise SystemExit(f"{self._engine} ended early, with {code}:\n{last_lines}")


class Record:
    """What was measured: seconds by item and engine, rates of the machine by kind, and what each engine said once.

    others_share: of the processors, during the turns, what neither engine took. Engines differ in how much they suffer
        from company, so a ratio means little where this is more than a few percent.
    """

    def __init__(self, names: list[str]):
        self._others_s = self._all_s = 0.0
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.machine: dict[str, list[float]] = {}
        self.engines: dict[str, dict[str, Any]] = {name: {"load_s": []} for name in names}

    def add_start(self, name: str, process: Process) -> None:
        """Note a process's load time and version."""
        self.engines[name]["load_s"].append(process.started["load_s"])
        self.engines[name]["version"] = process.started["version"]

    def add_end(self, name: str, process: Process) -> None:
        """Note the most memory a process had."""
        engine = self.engines[name]
        engine["peak_memory_bytes"] = max(engine.get("peak_memory_bytes", 0), process.ask("memory"))

    def add_turn(self, item: Item, name: str, process: Process, *, counts: bool) -> None:
        """Let an engine do an item once. counts: False for warming up."""
        time.sleep(SETTLE_S)
        start, busy_s, engine_s = time.perf_counter(), machine_busy_s(), process.processor_s
        seconds = process.ask(item.command)
        if counts:
            self._others_s += (machine_busy_s() - busy_s) - (process.processor_s - engine_s)
            self._all_s += (time.perf_counter() - start) * (os.cpu_count() or 1)
            self.seconds.setdefault(item.name, {}).setdefault(name, []).append(seconds)

    @property
    def others_share(self) -> float:
        return max(0.0, self._others_s / self._all_s) if self._all_s else 0.0

    def add_limit(self, item: Item, num_threads: int) -> None:
        """Measure what bounds an item, in the midst of its turns."""
        if item.limit == "memory":
            self.machine.setdefault("read_bytes_per_s", []).append(read_bandwidth(num_threads))
        elif item.limit == "matrix":
            for kind, rate in product_rates(num_threads).items():
                self.machine.setdefault(f"{kind}_operations_per_s", []).append(rate)


def machine_busy_s() -> float:
    """Return the processor seconds that all processes have taken, and other machines on the same host kept from us."""
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, *interrupts_and_stolen))) / TICKS_PER_S


def measure_together(participants: Mapping[str, Participant], items: list[Item], rounds: int, threads: int) -> Record:
    """Return a record of engines that are in memory at once and take turns for each item."""
    record = Record(list(participants))
    with ExitStack() as stack:
        processes = {}
        for name, participant in participants.items():
            processes[name] = stack.enter_context(Process(participant, threads))
            record.add_start(name, processes[name])
        for item in items:
            for number in range(rounds + 1):
                names = list(processes) if number % 2 else list(processes)[::-1]
                for name in names:
                    record.add_turn(item, name, processes[name], counts=number > 0)
                record.add_limit(item, threads)
        for name, process in processes.items():
            record.add_end(name, process)
    return record


def measure_apart(participants: Mapping[str, Participant], items: list[Item], rounds: int, threads: int) -> Record:
    """Return a record of engines of which memory holds one: each is started in turn, VISITS times."""
    record = Record(list(participants))
    for _ in range(VISITS):
        for name, participant in participants.items():
            with Process(participant, threads) as process:
                record.add_start(name, process)
                for item in items:
                    for number in range(-(-rounds // VISITS) + 1):
                        record.add_turn(item, name, process, counts=number > 0)
                    record.add_limit(item, threads)
                record.add_end(name, process)
    return record
