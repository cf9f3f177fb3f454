"""Freehold beside llama.cpp on the same GGUF files, in one run, by turns.

    python bench/vs_llama_cpp.py MODEL.gguf [...] --peer-python PYTHON [--rounds 5] [--json FILE]

PYTHON has llama-cpp-python, built for this machine's processor. A model of which memory holds one copy: add --apart.
"""

from comparing import Peer, main

if __name__ == "__main__":
    main(Peer(title="llama.cpp", engine="llama_cpp"), __doc__)
