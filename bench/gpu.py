"""Freehold on a GPU beside what the card can do, and beside transformers: one call, one table.

    python bench/gpu.py [--shapes pico,...] [--rounds 10] [--json FILE]

The card: bytes of a copy, read and written, and bfloat16 products of a large square matrix. Training: steps in bfloat16
with float32 masters on packed documents of one length, model FLOPs six for each weight that a token meets. transformers
trains the same shape by its own loop in bfloat16 throughout, without masters. Laws on a card: tests/laws/test_cuda.py.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from freehold.engine.plan import count_parts
from freehold.evaluate.limits import device_product_rate
from freehold.models.decoder import build_decoder
from freehold.models.families import family_of_config
from freehold.models.init import InitSettings, initialize
from freehold.train.batch import Batch, Example
from freehold.train.optim import Optimizer, OptimizerSettings, train_all
from freehold.train.step import Objective, train_step

Config = dict[str, Any]
PICO = Path(__file__).parent.parent / "examples" / "pico" / "config.json"
LLAMA_1B: Config = {  # Llama 3.2 1B's shape
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
HYBRID_1B: Config = {  # Nemotron 3 Nano's blocks at 1536 columns: 0.9 billion weights
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": 65536,
    "hidden_size": 1536,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EME",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "ssm_state_size": 128,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 1536,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
COPY_BYTES = 4 << 30
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Work:
    """A shape, and how many documents of how many tokens a step has."""

    config: Config
    num_documents: int
    document_tokens: int
    has_peer: bool = True

    @property
    def num_tokens(self) -> int:
        return self.num_documents * self.document_tokens


WORKS = {
    "pico": Work(config=json.loads(PICO.read_text()), num_documents=128, document_tokens=128, has_peer=False),
    "llama-1b": Work(config=LLAMA_1B, num_documents=4, document_tokens=2048),
    "hybrid-1b": Work(config=HYBRID_1B, num_documents=4, document_tokens=2048),
}


def copy_rate() -> float:
    """Return bytes per second, read and written, of a large copy on the card."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median(timed(lambda: target.copy_(source), rounds=10))


def timed(step: Callable[[], object], *, rounds: int) -> list[float]:
    """Return the seconds of each call, after two that are not counted."""
    seconds = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def rows_of(work: Work) -> torch.Tensor:
    """Return random documents, [documents, tokens + 1]."""
    shape = work.num_documents, work.document_tokens + 1
    return torch.randint(work.config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def training(work: Work) -> Callable[[], object]:
    """Return a step of Freehold's on a new model."""
    spec = family_of_config(work.config).read_config(work.config)
    decoder = build_decoder(spec, dtype=torch.bfloat16).to_empty(device="cuda")
    decoder.tie_embeddings()
    initialize(decoder, InitSettings.from_config(work.config), seed=0)
    train_all(decoder)
    optimizer = Optimizer(decoder, OptimizerSettings())
    examples = [Example(tokens_L=row[:-1], labels_L=row[1:]) for row in rows_of(work)]

    def step() -> None:
        batch = Batch.packed(examples, "cuda")
        train_step(decoder, optimizer, [batch], number=1, learning_rate=LEARNING_RATE, objective=Objective())

    return step


def peer_training(work: Work) -> Callable[[], object]:
    """Return a step of transformers' on a new model of the same shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**work.config)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    ids_BL = rows_of(work)[:, :-1].cuda()

    def step() -> None:
        loss = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def measure(name: str, build: Callable[[Work], Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return tokens per second and the peak of memory."""
    work = WORKS[name]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = median(timed(build(work), rounds=rounds))
    return {"tokens_per_s": work.num_tokens / seconds, "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def compare(name: str, rounds: int, product_rate: float) -> dict[str, Any]:
    """Return all that was measured on one shape."""
    work = WORKS[name]
    spec = family_of_config(work.config).read_config(work.config)
    parts = count_parts(spec)
    operations = 6.0 * sum(part.num_active for part in parts)
    found: dict[str, Any] = {"Freehold": measure(name, training, rounds)}
    if work.has_peer:
        try:
            found["transformers"] = measure(name, peer_training, rounds)
        except (RuntimeError, ImportError, ValueError) as error:
            found["transformers"] = {"refused": f"{type(error).__name__}: {error}"[:300]}
    for result in found.values():
        if "tokens_per_s" in result:
            result["share_of_peak"] = result["tokens_per_s"] * operations / product_rate
    return {
        "shape": name,
        "num_parameters": sum(part.num_parameters for part in parts),
        "tokens_of_a_step": work.num_tokens,
        "operations_per_token": operations,
        **found,
    }


def show(result: dict[str, Any]) -> None:
    """Print what one shape came to."""
    print(f"\n{result['shape']}, {result['num_parameters'] / 1e6:,.1f}M, {result['tokens_of_a_step']:,} tokens a step")
    for engine in ("Freehold", "transformers"):
        if "refused" in (found := result.get(engine, {})):
            print(f"  {engine:14}{found['refused']}")
        elif found:
            rate, share, memory = (found[key] for key in ("tokens_per_s", "share_of_peak", "peak_memory_bytes"))
            print(f"  {engine:14}{rate:12,.0f} tokens/s{share:8.1%} of peak{memory / 1e9:8.1f} GB")


def main() -> None:
    """Measure the card, then each shape, and print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(WORKS), metavar="NAME,NAME,...")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    product_rate = device_product_rate(torch.device("cuda"), torch.bfloat16)
    card = {"name": torch.cuda.get_device_name(), "copy_bytes_per_s": copy_rate(), "operations_per_s": product_rate}
    print(f"{card['name']}, torch {torch.__version__}: copies {card['copy_bytes_per_s'] / 1e12:.2f} TB/s, ", end="")
    print(f"multiplies bfloat16 at {product_rate / 1e12:.0f} TFLOP/s")
    results = []
    for name in arguments.shapes:
        results.append(compare(name, arguments.rounds, product_rate))
        show(results[-1])
        if arguments.json:
            arguments.json.write_text(json.dumps({"card": card, "training": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
