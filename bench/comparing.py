"""Freehold beside a peer on the same weights, in one run, by turns: what every `vs_*.py` shares.

Belongs here: the command line, what is measured, the table. Not here: processes and their turns (turns.py), how an
engine is called (engine_*.py), what the machine can do (limits.py).
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from limits import work_of
from turns import Item, Participant, Record, measure_apart, measure_together

from freehold.checkpoint.convert import convert_checkpoint

DECODE_STEPS, BATCH_STEPS = 64, 32


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another engine. dtypes: what its weights can be loaded in; without any it computes with the GGUF file itself."""

    title: str
    engine: str
    dtypes: tuple[str, ...] = ()


def items_of(prompt_tokens: int, batches: list[int]) -> list[Item]:
    """Return what to measure."""
    prefill = Item(
        name=f"prefill {prompt_tokens}",
        command=f"prefill {prompt_tokens}",
        num_tokens=prompt_tokens,
        limit="matrix",
    )
    decode = Item(name="decode", command=f"decode {DECODE_STEPS}", num_tokens=DECODE_STEPS, limit="memory")
    return [prefill, decode] + [
        Item(name=f"batch of {size}", command=f"batch {size} {BATCH_STEPS}", num_tokens=size * BATCH_STEPS)
        for size in batches
    ]


@contextmanager
def readable_by(peer: Peer, path: Path, weights: str) -> Iterator[Path]:
    """Give the same weights as the peer reads them: the file itself, or a Hugging Face folder made from it."""
    if not peer.dtypes:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / path.stem
        convert_checkpoint(path, converted, dtype=getattr(torch, weights))
        yield converted


def compare(path: Path, peer: Peer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that was measured on one model."""
    items = items_of(arguments.prompt, arguments.batches)
    peer_weights = arguments.peer_weights if peer.dtypes else "stored"
    measure: Callable[..., Record] = measure_apart if arguments.apart else measure_together
    with readable_by(peer, path, peer_weights) as peer_path:
        participants = {
            "Freehold": Participant(engine="freehold", python=sys.executable, path=path, weights=arguments.weights),
            peer.title: Participant(
                engine=peer.engine, python=arguments.peer_python, path=peer_path, weights=peer_weights
            ),
        }
        record = measure(participants, items, arguments.rounds, arguments.threads)
    return {
        "model": path.name,
        "processor": processor_name(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "apart": arguments.apart,
        "weights": {"Freehold": arguments.weights, peer.title: peer_weights},
        "work_per_token": asdict(work_of(path, arguments.weights)),
        "engines": record.engines,
        "tokens": {item.name: item.num_tokens for item in items},
        "seconds": record.seconds,
        "machine": record.machine,
        "others_share": record.others_share,
    }


def processor_name() -> str:
    """Return what the system calls this processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show(result: dict[str, Any]) -> None:
    """Print a comparison as a table; ratios above 1 say that Freehold is faster or smaller."""
    ours, theirs = result["engines"]
    print(f"\n{result['model']}, {result['processor']}, {result['threads']} threads, medians of {result['rounds']}")
    print(f"{'':20}{ours:>14}{theirs:>14}{'ratio':>8}  Freehold's share of the limit")
    for name, seconds in result["seconds"].items():
        rates = [result["tokens"][name] / median(seconds[engine]) for engine in (ours, theirs)]
        print(
            f"{name + ', tok/s':20}{rates[0]:14.2f}{rates[1]:14.2f}{rates[0] / rates[1]:8.2f}"
            f"  {_share(result, name, rates[0])}"
        )
    for title, key, unit in (("load to 1st, s", "load_s", 1), ("peak memory, MB", "peak_memory_bytes", 1e6)):
        values = [result["engines"][engine][key] for engine in (ours, theirs)]
        first, second = (median(value) if isinstance(value, list) else value for value in values)
        print(f"{title:20}{first / unit:14.2f}{second / unit:14.2f}{second / first:8.2f}")
    rates = ", ".join(f"{kind} {median(seen) / 1e9:.1f}" for kind, seen in sorted(result["machine"].items()))
    print(f"machine, in G: {rates}; other processes took {result['others_share']:.0%} of it during the turns")


def _share(result: dict[str, Any], name: str, tokens_per_s: float) -> str:
    """Return how much of the machine an item uses, as far as there is one limit that bounds it."""
    machine = {kind: median(rates) for kind, rates in result["machine"].items()}
    work = result["work_per_token"]
    if name == "decode":
        share = work["decode_bytes"] * tokens_per_s / machine["read_bytes_per_s"]
        return f"{share:.0%} of memory bandwidth, {work['decode_bytes'] / 1e6:.0f} MB a token"
    if name.startswith("prefill"):
        operations = work["prefill_operations"] * tokens_per_s
        shares = [
            f"{operations / rate:.0%} of {kind.removesuffix('_operations_per_s')}"
            for kind, rate in machine.items()
            if kind.endswith("_operations_per_s")
        ]
        return f"{', '.join(shares)} peak"
    return ""


def main(peer: Peer, description: str | None) -> None:
    """Compare on each model of the command line, and print and write what came out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL.gguf")
    add("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    add("--weights", choices=("stored", "float32", "bfloat16"), default="stored", help="what Freehold keeps them in")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--batches", type=sizes, default=[1, 4, 8, 16], metavar="B,B,...", help="numbers of sequences at once")
    add("--prompt", type=int, default=512, help="tokens of the prefill")
    add("--apart", action="store_true", help="one engine in memory at a time, for large models")
    add("--json", type=Path)
    if peer.dtypes:
        add("--peer-weights", choices=peer.dtypes, default=peer.dtypes[0], help="what the peer keeps them in")
    arguments = parser.parse_args()
    results = []
    for path in arguments.models:
        results.append(compare(path, peer, arguments))
        show(results[-1])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def sizes(text: str) -> list[int]:
    """Return the numbers of a comma-separated list."""
    return [int(size) for size in text.split(",") if size]
