"""One engine in a process of its own, so that memory is its own and engines can take turns.

    PYTHON bench/engine_process.py ENGINE MODEL WEIGHTS NUM_THREADS

ENGINE names a module `engine_ENGINE.py` beside this one; WEIGHTS is what the engine keeps weights in: `stored` for what
it makes of the file by itself, or a dtype. Then one command a line on standard input:

    prefill N    read N tokens, new ones each time, and give the logits after the last
    decode N     N steps of one sequence, after a prompt of 32 tokens that is not counted
    batch B N    N steps of B sequences at once, after a prompt of 32 tokens for each that is not counted
    train B N    a step of training on B rows of N tokens, by engines that train
    memory       the most memory this process had

Each answer is one line of JSON on standard output: seconds, or bytes. The first line comes unasked, when the engine is
loaded and has read a prompt: its version and the seconds since the process began to import it. Nothing here imports
torch, for a peer's interpreter may have none.
"""

import importlib
import json
import os
import random
import re
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any, Protocol

PROMPT_TOKENS = 32
LORA_RANK, LORA_ALPHA = 16, 32  # of the adapters that engines train
# Ids that are plain tokens in every vocabulary measured here.
FIRST_ID, LAST_ID = 100, 30000

Prompt = list[int]


class Engine(Protocol):
    """What is measured: each method returns the seconds of the part that counts. All draw greedily."""

    version: str

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds from ids to the logits after the last of them."""
        ...

    def decode(self, prompt: Prompt, num_steps: int) -> float:
        """Return the seconds of so many steps of one sequence, by the engine's usual way for one."""
        ...

    def batch(self, prompts: list[Prompt], num_steps: int) -> float:
        """Return the seconds of so many steps of all sequences together; each step gives every one a token."""
        ...

    def train(self, rows: list[Prompt]) -> float:
        """Return the seconds of a step of training: loss, gradient, clipping, AdamW. For engines that train."""
        ...


def serve(name: str, path: Path, weights: str, num_threads: int) -> None:
    """Load the engine, say how long that took, and answer commands until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    start = time.perf_counter()
    module: Any = importlib.import_module(f"engine_{name}")
    engine: Engine = module.open_engine(path, weights=weights, num_threads=num_threads)
    engine.prefill(prompt_of("load", PROMPT_TOKENS))
    print(json.dumps({"load_s": time.perf_counter() - start, "version": engine.version}), file=replies, flush=True)
    for number, line in zip(count(), sys.stdin, strict=False):
        print(json.dumps(answer(engine, line.split(), number)), file=replies, flush=True)


def answer(engine: Engine, command: list[str], number: int) -> float:
    """Return what one command measures. number: makes its prompts new, and the same for every engine."""
    match command:
        case ["prefill", num_tokens]:
            return engine.prefill(prompt_of(f"prefill {number}", int(num_tokens)))
        case ["decode", num_steps]:
            return engine.decode(prompt_of(f"decode {number}", PROMPT_TOKENS), int(num_steps))
        case ["batch", num_sequences, num_steps]:
            prompts = [prompt_of(f"batch {number} {b}", PROMPT_TOKENS) for b in range(int(num_sequences))]
            return engine.batch(prompts, int(num_steps))
        case ["train", num_rows, num_tokens]:
            return engine.train([prompt_of(f"train {number} {b}", int(num_tokens)) for b in range(int(num_rows))])
        case ["memory"]:
            return peak_memory_bytes()
    raise ValueError(f"unknown command {command}")


def prompt_of(seed: str, num_tokens: int) -> Prompt:
    """Return random ids."""
    return random.Random(seed).choices(range(FIRST_ID, LAST_ID), k=num_tokens)


def peak_memory_bytes() -> int:
    """Return the most memory that this process had resident. getrusage would count the parent before exec in."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
