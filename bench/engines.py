"""One engine in a process of its own, so that memory is its own and engines can take turns.

    python bench/engines.py ENGINE MODEL.gguf DTYPE NUM_THREADS

Then one command a line on standard input: `prefill N` reads N tokens, `decode N` writes N tokens after a prompt of 32,
`memory` reports the peak. Each answer is one JSON line on standard output: the seconds, or the bytes.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROMPT_TOKENS = 32


def freehold_engine(path: Path, dtype: str) -> tuple[Callable[[list[int]], object], Callable[[list[int], int], object]]:
    """Return Freehold's prefill and decode."""
    from freehold.checkpoint.load import load_decoder, open_described
    from freehold.engine.generate import Continuation, generate
    from freehold.engine.request import SamplingParams

    source, described = open_described(path)
    decoder, _ = load_decoder(source, described, dtype=getattr(torch, dtype), device=torch.device("cpu"))

    def prefill(tokens: list[int]) -> object:
        return Continuation(decoder, room_tokens=len(tokens)).read(tokens)

    def decode(tokens: list[int], num_tokens: int) -> object:
        return list(generate(decoder, tokens, SamplingParams(max_tokens=num_tokens)))

    return prefill, decode


def transformers_engine(
    path: Path, dtype: str
) -> tuple[Callable[[list[int]], object], Callable[[list[int], int], object]]:
    """Return the prefill and decode of transformers, with its defaults (SDPA attention, dynamic cache)."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def prefill(tokens: list[int]) -> object:
        return model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).logits

    @torch.inference_mode()
    def decode(tokens: list[int], num_tokens: int) -> object:
        config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0)
        ids = torch.tensor([tokens])
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return prefill, decode


ENGINES = {"freehold": freehold_engine, "transformers": transformers_engine}


def serve(engine: str, path: Path, dtype: str, num_threads: int) -> None:
    """Load the engine, say how long that took, and answer commands until the input ends."""
    torch.set_num_threads(num_threads)
    start = time.perf_counter()
    prefill, decode = ENGINES[engine](path, dtype)
    prefill(_tokens(PROMPT_TOKENS))
    print(json.dumps(time.perf_counter() - start), flush=True)
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        start = time.perf_counter()
        match command:
            case "prefill":
                prefill(_tokens(int(count)))
                value = time.perf_counter() - start
            case "decode":
                decode(_tokens(PROMPT_TOKENS), int(count))
                value = time.perf_counter() - start
            case "memory":
                value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            case _:
                raise ValueError(f"unknown command {command!r}")
        print(json.dumps(value), flush=True)


def _tokens(count: int) -> list[int]:
    return torch.randint(100, 40000, (count,), generator=torch.Generator().manual_seed(count)).tolist()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
