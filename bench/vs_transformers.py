"""Freehold beside transformers on the same weights, in one run, by turns: prefill, decode, load, memory.

    python bench/vs_transformers.py MODEL.gguf [MODEL.gguf ...] [--dtype float32] [--rounds 5] [--json FILE]

Prints one table; ratios above 1 say that Freehold is faster. Decode's time includes its prompt of 32 tokens, for both.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engines import ENGINES
from limits import matrix_rate, read_bandwidth

PREFILL_TOKENS, DECODE_TOKENS = 512, 64


class Process:
    """An engine in a process of its own."""

    def __init__(self, engine: str, path: Path, dtype: str, num_threads: int):
        script = Path(__file__).with_name("engines.py")
        self._child = subprocess.Popen(
            [sys.executable, str(script), engine, str(path), dtype, str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.load_s = self._reply()

    def ask(self, command: str) -> float:
        """Return the number that the engine answers a command with."""
        assert self._child.stdin is not None
        self._child.stdin.write(command + "\n")
        self._child.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End the process."""
        self._child.communicate()

    def _reply(self) -> float:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended early, with {self._child.wait()}")
        return json.loads(line)


def compare(path: Path, dtype: str, rounds: int, num_threads: int) -> dict[str, Any]:
    """Return medians for both engines on one model."""
    processes = {engine: Process(engine, path, dtype, num_threads) for engine in ENGINES}
    commands = {"prefill": f"prefill {PREFILL_TOKENS}", "decode": f"decode {DECODE_TOKENS}"}
    seconds: dict[str, dict[str, list[float]]] = {e: {c: [] for c in commands} for e in processes}
    for name, command in commands.items():
        for number in range(rounds + 1):
            for engine, process in processes.items():
                elapsed = process.ask(command)
                if number:  # the first round warms up
                    seconds[engine][name].append(elapsed)
    tokens = {"prefill": PREFILL_TOKENS, "decode": DECODE_TOKENS}
    rows = {
        engine: {
            **{f"{name}_tokens_per_s": tokens[name] / median(seconds[engine][name]) for name in commands},
            "load_to_first_token_s": process.load_s,
            "peak_memory_bytes": process.ask("memory"),
        }
        for engine, process in processes.items()
    }
    for process in processes.values():
        process.close()
    return {"model": path.name, "dtype": dtype, "rounds": rounds, "threads": num_threads, "engines": rows}


def limits(path: Path, dtype: str) -> dict[str, float]:
    """Return the most tokens per second that this machine's memory and arithmetic allow a model."""
    from freehold.checkpoint.load import open_described
    from freehold.models.decoder import build_decoder

    source, described = open_described(path)
    source.close()
    decoder = build_decoder(described.spec, dtype=getattr(torch, dtype))
    weights = sum(p.numel() for name, p in decoder.named_parameters() if name != "embeddings.weight")
    weights += decoder.embeddings.weight.numel() if described.spec.tied_embeddings else 0
    body = weights - described.spec.vocab_size * described.spec.width
    bandwidth, rate = read_bandwidth(), matrix_rate(getattr(torch, dtype))
    return {
        "memory_bytes_per_s": bandwidth,
        "operations_per_s": rate,
        "decode_tokens_per_s": bandwidth / (weights * getattr(torch, dtype).itemsize),
        "prefill_tokens_per_s": rate / (2 * body),
    }


def show(result: dict[str, Any]) -> None:
    """Print a comparison as a table."""
    print(f"\n{result['model']}, {result['dtype']}, {result['threads']} threads, medians of {result['rounds']}")
    print(f"{'':14}{'prefill tok/s':>15}{'decode tok/s':>15}{'load to 1st, s':>16}{'peak memory, MB':>17}")
    for engine, row in result["engines"].items():
        print(
            f"{engine:14}{row['prefill_tokens_per_s']:15.1f}{row['decode_tokens_per_s']:15.2f}"
            f"{row['load_to_first_token_s']:16.2f}{row['peak_memory_bytes'] / 1e6:17.0f}"
        )
    ours, theirs = (result["engines"][engine] for engine in ("freehold", "transformers"))
    ratio = {key: ours[key] / theirs[key] for key in ours}
    limit = result["limits"]
    print(
        f"{'ratio':14}{ratio['prefill_tokens_per_s']:15.2f}{ratio['decode_tokens_per_s']:15.2f}"
        f"{1 / ratio['load_to_first_token_s']:16.2f}{1 / ratio['peak_memory_bytes']:17.2f}"
    )
    print(f"{'limit':14}{limit['prefill_tokens_per_s']:15.1f}{limit['decode_tokens_per_s']:15.2f}")
    print(
        f"limits from {limit['memory_bytes_per_s'] / 1e9:.1f} GB/s read and "
        f"{limit['operations_per_s'] / 1e9:.0f} GFLOP/s, measured after the run"
    )


def main() -> None:
    """Compare on each model and print or write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for path in arguments.models:
        result = compare(path, arguments.dtype, arguments.rounds, arguments.threads)
        results.append(result | {"limits": limits(path, arguments.dtype)})
        show(results[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
