"""Freehold beside transformers, in one run, by turns: Freehold on a GGUF file, transformers on the same weights.

    python bench/vs_transformers.py MODEL.gguf [...] [--peer-weights bfloat16] [--weights stored] [--json FILE]

transformers reads a Hugging Face folder that Freehold writes and deletes again.
On a processor without bfloat16 arithmetic the peer is far faster in float32: --peer-weights float32.
"""

from comparing import Peer, main

if __name__ == "__main__":
    main(Peer(title="transformers", engine="transformers", dtypes=("bfloat16", "float32")), __doc__)
