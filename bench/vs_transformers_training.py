"""Training beside transformers' own loop, in one run, by turns: the same random weights, batch, dtype and fused AdamW.

    python bench/vs_transformers_training.py [--shapes llama-5.5M,...] [--dtype float32] [--rounds 5] [--json FILE]
    python bench/vs_transformers_training.py --lora [--shapes llama-5.5M,llama-27.8M] ...

A step is the loss of rows of one length, its gradient, clipping and AdamW. Model FLOPs are six for each weight that a
token meets, four with --lora, which trains an adapter, ours or PEFT's; what is computed anew does not count. In
bfloat16 transformers' weights, gradients and moments are all of it, while Freehold keeps float32 masters and moments
beside them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from comparing import processor_name
from turns import Item, Participant, measure_together

# isort: split
import torch

from freehold.checkpoint.save import save_checkpoint
from freehold.engine.plan import count_parts
from freehold.models.decoder import build_decoder
from freehold.models.families import family_of_config
from freehold.models.init import InitSettings, initialize

Config = dict[str, Any]
LLAMA: Config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MOE: Config = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 256,
    "hybrid_override_pattern": "MEM*EMEM",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "ssm_state_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def llama(width: int, inner_width: int, num_layers: int, num_heads: int, num_kv_heads: int) -> Config:
    """Return the config of a Llama with a vocabulary of 8192."""
    return LLAMA | {
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
    }


SHAPES: dict[str, Config] = {
    "llama-5.5M": llama(256, 768, 4, 4, 4),
    "llama-27.8M": llama(512, 1408, 8, 8, 4),
    "nemotron-moe": MOE,
}


def write_model(config: Config, folder: Path) -> int:
    """Write a new model of a config, and return how many weights a token meets."""
    family = family_of_config(config)
    spec = family.read_config(config)
    decoder = build_decoder(spec, dtype=torch.float32).to_empty(device="cpu")
    decoder.tie_embeddings()
    initialize(decoder, InitSettings.from_config(config), seed=0)
    save_checkpoint(folder, decoder, family=family, config=config)
    return sum(part.num_active for part in count_parts(spec))


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that was measured on one shape."""
    item = Item(
        name="train",
        command=f"train {arguments.batch} {arguments.length}",
        num_tokens=arguments.batch * arguments.length,
        limit="matrix",
    )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        num_weights = write_model(SHAPES[name], folder)
        what = "lora" if arguments.lora else "training"
        engines = {"Freehold": f"freehold_{what}", "transformers": f"transformers_{what}"}
        participants = {
            title: Participant(engine=engine, python=sys.executable, path=folder, weights=arguments.dtype)
            for title, engine in engines.items()
        }
        record = measure_together(participants, [item], arguments.rounds, arguments.threads)
    return {
        "shape": name,
        "processor": processor_name(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "rows": arguments.batch,
        "row_tokens": arguments.length,
        "dtype": arguments.dtype,
        "trained": what,
        "operations_per_token": (4.0 if arguments.lora else 6.0) * num_weights,
        "engines": record.engines,
        "seconds": record.seconds["train"],
        "machine": record.machine,
        "others_share": record.others_share,
    }


def show(result: dict[str, Any]) -> None:
    """Print a comparison as a table; ratios above 1 say that Freehold is faster or smaller."""
    num_tokens = result["rows"] * result["row_tokens"]
    peak = median(result["machine"]["float32_operations_per_s"])
    rates = {name: num_tokens / median(seconds) for name, seconds in result["seconds"].items()}
    memory = {name: engine["peak_memory_bytes"] / 1e6 for name, engine in result["engines"].items()}
    print(
        f"\n{result['shape']}, {result['trained']}, {result['dtype']},"
        f" {result['rows']} x {result['row_tokens']} tokens, {result['processor']}, {result['threads']} threads,"
        f" medians of {result['rounds']}"
    )
    print(f"{'':16}{'tok/s':>10}{'of peak':>10}{'peak memory, MB':>18}")
    for name, rate in rates.items():
        share = result["operations_per_token"] * rate / peak
        print(f"{name:16}{rate:10.0f}{share:10.0%}{memory[name]:18.0f}")
    ours, theirs = rates
    print(f"{'ratio':16}{rates[ours] / rates[theirs]:10.2f}{'':10}{memory[theirs] / memory[ours]:18.2f}")
    print(f"float32 peak {peak / 1e9:.1f} GFLOP/s; others took {result['others_share']:.0%} during the turns")


def main() -> None:
    """Compare on each shape, and print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", type=lambda text: text.split(","), default=list(SHAPES), metavar="NAME,NAME,...")
    add("--lora", action="store_true", help="train an adapter beside every projection (dense shapes)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--batch", type=int, default=8, help="rows of a step")
    add("--length", type=int, default=256, help="tokens of a row")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for name in arguments.shapes:
        results.append(compare(name, arguments))
        show(results[-1])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
