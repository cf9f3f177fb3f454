"""Freehold beside OpenVINO GenAI on the same GGUF files, in one run, by turns.

    python bench/vs_openvino.py MODEL.gguf [...] --peer-python PYTHON [--rounds 5] [--json FILE]

PYTHON has openvino-genai. It loads Llama and Qwen 2.5 in Q4_0, Q4_1 and Q8_0.
"""

from comparing import Peer, main

if __name__ == "__main__":
    main(Peer(title="OpenVINO", engine="openvino"), __doc__)
