"""A load on a real server: many clients at once, some of whom leave, stall or vanish; then whether anything is left.

    python bench/load.py MODEL [--streams 64] [--seconds 120] [--text TEXT.txt] [--serve "--memory 2"]

Clients come as a Poisson process, up to --streams at once (clients.py). Exit code 1 where a request failed that was not
refused by design, where pages, slots, files, threads or processes are left, where memory grew after half of the time,
or where it was more than the server's own plan says. The engine counts its pages and slots whenever nobody runs, and
stops where one is lost: at the end it has to be ready still.
"""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import quantiles
from tempfile import TemporaryFile
from typing import Any

from clients import Asking, Outcome, meet

START = "from freehold.cli.main import main; main()"
ROOT = Path(__file__).parent.parent
KINDS = ("done", "refused", "left", "stalled", "vanished", "failed")
# What memory may grow from half of the time to the end: the interpreter's arenas are never quite full.
GROWTH_BYTES = 32 * 2**20
DRAIN_S = 120.0
IDLE = {
    "freehold_requests_running": 0,
    "freehold_requests_waiting": 0,
    "freehold_kv_pages_used": 0,
    "freehold_state_slots_used": 0,
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A server at one time: its memory now and at most, open files, threads, children, and what its metrics say."""

    at_s: float
    resident_bytes: int
    peak_bytes: int
    num_files: int
    num_threads: int
    num_children: int
    metrics: dict[str, float]


class Server:
    """`freehold serve` in a process of its own, on any free port."""

    def __init__(self, model: Path, options: list[str]):
        self.errors = TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115, closed on exit
        command = [sys.executable, "-c", START, "serve", str(model), "--port", "0", "--name", "loaded", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit(f"the server did not start:\n{self.said()}")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def said(self) -> str:
        """Return what the server wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read()

    def get(self, path: str) -> str:
        """Return what a route says. Raises: urllib.error.HTTPError where it is not 200."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return str(response.read().decode())

    def sample(self, start_s: float) -> Sample:
        """Return what the server has now."""
        folder = Path("/proc") / str(self.process.pid)
        fields = dict(re.findall(r"^(\w+):\s+(\d+)", (folder / "status").read_text(), re.MULTILINE))
        num_files = len(list((folder / "fd").iterdir()))  # before this asks for metrics, which takes one
        found = re.findall(r"^(freehold_\w+)\{model_name=\"loaded\"\} (\S+)$", self.get("/metrics"), re.MULTILINE)
        metrics = {name: float(value) for name, value in found}
        for name in ("freehold_kv_pages", "freehold_state_slots"):
            metrics[f"{name}_used"] = metrics[name] - metrics[f"{name}_free"]
        return Sample(
            at_s=time.perf_counter() - start_s,
            resident_bytes=int(fields["VmRSS"]) * 1024,
            peak_bytes=int(fields["VmHWM"]) * 1024,
            num_files=num_files,
            num_threads=int(fields["Threads"]),
            num_children=sum(len(path.read_text().split()) for path in folder.glob("task/*/children")),
            metrics=metrics,
        )

    def planned_bytes(self) -> float:
        """Return what the plan says that the process takes in all."""
        size, factor = re.findall(r"in all ([\d.,]+) ([kMGT]?)B", self.said())[0]
        return float(size.replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[factor]


@contextmanager
def serving(model: Path, options: list[str]) -> Iterator[Server]:
    """Yield a server, which is told to stop at the end."""
    server = Server(model, options)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(DRAIN_S)
        server.process.kill()


async def load(server: Server, arguments: argparse.Namespace, asking: Asking) -> tuple[list[Outcome], list[Sample]]:
    """Return what came of all requests, and samples of the server: idle, once a second under load, idle again."""
    start_s = time.perf_counter()
    # So that all that is made once is there, such as threads.
    await asyncio.gather(*(meet(server.port, asking.next()) for _ in range(arguments.streams)))
    samples = [await idle_sample(server, start_s, before=None)]
    choose, gate, clients = Random(arguments.seed), asyncio.Semaphore(arguments.streams), []

    async def one() -> Outcome:
        try:
            return await meet(server.port, asking.next())
        finally:
            gate.release()

    watching = asyncio.create_task(watch(server, start_s, samples))
    end_s = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end_s:
        await asyncio.sleep(choose.expovariate(arguments.rate or arguments.streams))
        await gate.acquire()
        clients.append(asyncio.create_task(one()))
    samples.append(await asyncio.to_thread(server.sample, start_s))
    outcomes = await asyncio.gather(*clients)
    watching.cancel()
    samples.append(await idle_sample(server, start_s, before=samples[0]))
    return outcomes, samples


async def watch(server: Server, start_s: float, samples: list[Sample]) -> None:
    """Take a sample a second. Mutates: samples."""
    while True:
        await asyncio.sleep(1)
        samples.append(await asyncio.to_thread(server.sample, start_s))


async def idle_sample(server: Server, start_s: float, *, before: Sample | None) -> Sample:
    """Return a sample of a server that nobody asks anything and that has no more than before; or, after DRAIN_S, of one
    that does not come to rest."""
    end_s = time.perf_counter() + DRAIN_S
    while True:
        await asyncio.sleep(0.5)
        sample = await asyncio.to_thread(server.sample, start_s)
        if not left_of(sample, before or sample) or time.perf_counter() > end_s:
            return sample


def left_of(sample: Sample, before: Sample) -> list[str]:
    """Return what a server has that it should have no more when all clients have gone."""
    left = [f"{name} is {sample.metrics[name]:g} at the end" for name in IDLE if sample.metrics[name] != IDLE[name]]
    for name in ("num_files", "num_threads", "num_children"):
        if getattr(sample, name) > getattr(before, name):
            left.append(f"{name}: {getattr(before, name)} before, {getattr(sample, name)} after")
    return left


def faults_of(outcomes: list[Outcome], samples: list[Sample], planned_bytes: float) -> list[str]:
    """Return what is wrong after a load."""
    before, half, last, after = milestones(samples)
    faults = [f"{each.ask.route}, who {each.ask.fate}: {each.why}" for each in outcomes if each.kind == "failed"]
    faults += left_of(after, before)
    for name, sample in {"at the end": last, "after it": after}.items():
        if (grown := sample.resident_bytes - half.resident_bytes) > GROWTH_BYTES:
            faults.append(f"memory {name} is {grown:,} bytes more than at half of the time")
    if after.peak_bytes > planned_bytes:
        faults.append(f"memory was {after.peak_bytes:,} bytes at most, the plan says {planned_bytes:,.0f}")
    return faults


def milestones(samples: list[Sample]) -> tuple[Sample, Sample, Sample, Sample]:
    """Return the samples before a load, at half of its time, when the last clients went, and after that."""
    before, *_, after = samples
    half = min(samples, key=lambda sample: abs(sample.at_s - (before.at_s + samples[-2].at_s) / 2))
    return before, half, samples[-2], after


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that was seen of one server."""
    text = arguments.text.read_text()
    asking = Asking(
        text,
        model="loaded",
        seed=arguments.seed,
        prompt_chars=arguments.prompt_chars,
        answer_tokens=arguments.answer_tokens,
    )
    with serving(arguments.model, arguments.serve.split()) as server:
        outcomes, samples = asyncio.run(load(server, arguments, asking))
        faults = faults_of(outcomes, samples, planned := server.planned_bytes())
        if not is_ready(server):
            faults.append("the server is not ready at the end")
    if server.process.returncode:
        faults.append(f"the server ended with {server.process.returncode}")
    faults += [
        f"the server said: {line}" for line in server.said().splitlines() if re.search(r"ERROR|CRIT|Trace", line)
    ]
    return {
        "model": arguments.model.name,
        "streams": arguments.streams,
        "seconds": arguments.seconds,
        "serve": arguments.serve,
        "planned_bytes": planned,
        "outcomes": counted(outcomes),
        "first_s": [round(each.first_s, 4) for each in outcomes if each.first_s is not None],
        "samples": [asdict(sample) for sample in samples],
        "milestones": [asdict(sample) for sample in milestones(samples)],
        "said": server.said(),
        "faults": faults,
    }


def is_ready(server: Server) -> bool:
    """Return whether the engine lives: a page or slot that was lost would have ended it when it came to rest."""
    try:
        return "ready" in server.get("/ready")
    except OSError:
        return False


def counted(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """Return how many requests ended how, by route and form."""
    found: dict[str, Counter[str]] = {}
    for each in outcomes:
        form = "stream" if each.ask.streams else "whole"
        found.setdefault(f"{each.ask.route} {form}", Counter())[each.kind] += 1
    return {name: {kind: found[name][kind] for kind in KINDS} for name in sorted(found)}


def show(result: dict[str, Any]) -> None:
    """Print what came of a load as a table."""
    print(f"\n{result['model']}, {result['streams']} at once for {result['seconds']:g} s, serve {result['serve']}")
    print(f"{'':30}" + "".join(f"{kind:>10}" for kind in KINDS))
    for name, kinds in result["outcomes"].items():
        print(f"{name:30}" + "".join(f"{kinds[kind]:10}" for kind in KINDS))
    parts = quantiles(result["first_s"], n=20) if len(result["first_s"]) > 1 else [0.0] * 19
    print(f"first byte, s: {parts[9]:.2f} in the middle, {parts[18]:.2f} for one in twenty or longer")
    columns = dict(zip(("before", "half", "end", "after"), result["milestones"], strict=True))
    print(f"{'':30}" + "".join(f"{name:>10}" for name in columns))
    for name, unit in {"resident_bytes": 1e6, "num_files": 1, "num_threads": 1, "num_children": 1}.items():
        title = "resident, MB" if unit > 1 else name.removeprefix("num_")
        print(f"{title:30}" + "".join(f"{sample[name] / unit:10.0f}" for sample in columns.values()))
    for name in (*IDLE, "freehold_preemptions_total", "freehold_generated_tokens_total"):
        print(f"{name.removeprefix('freehold_'):30}" + "".join(f"{s['metrics'][name]:10.0f}" for s in columns.values()))
    peak, planned = columns["after"]["peak_bytes"] / 1e6, result["planned_bytes"] / 1e6
    print(f"memory at most {peak:.0f} MB, the plan says {planned:.0f} MB")
    for fault in result["faults"]:
        print(f"FAULT: {fault}")


def main() -> None:
    """Put a load on a server, and print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL")
    add("--streams", type=int, default=64, help="requests at once")
    add("--seconds", type=float, default=120)
    add("--rate", type=float, help="requests a second that come, where there is room; without it, as many as --streams")
    add("--seed", type=int, default=0)
    add("--text", type=Path, default=ROOT / "LICENSE", help="what prompts are taken from")
    add("--prompt-chars", type=int, default=4000, help="of the longest prompt")
    add("--answer-tokens", type=int, default=64, help="of the longest answer")
    add("--serve", default="", help="options for freehold serve, in one text")
    add("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
