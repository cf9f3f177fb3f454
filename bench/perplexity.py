"""What keeping weights packed, and rows in eight bits, costs of a model's perplexity on a text.

    python bench/perplexity.py TEXT.txt MODEL.gguf [...]

The same weights twice: as `freehold run` holds them, and their values in float32, on 15 windows of 512 tokens.
"""

import argparse
from math import expm1
from pathlib import Path

import freehold
from freehold.evaluate.perplexity import nats_per_token

NUM_WINDOWS, WINDOW = 15, 512


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT.txt")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    arguments = parser.parse_args()
    text = arguments.text.read_text()
    for path in arguments.models:
        nats = []
        for dtype in (None, "float32"):
            model = freehold.load(path, dtype=dtype)
            tokens = model.tokenizer.encode(text)[: NUM_WINDOWS * WINDOW]
            nats.append(nats_per_token(model.decoder, tokens, window=WINDOW))
        packed, dense = nats
        print(f"{path.name}: {packed:.4f} packed, {dense:.4f} float32, perplexity {expm1(packed - dense):+.2%}")


if __name__ == "__main__":
    main()
