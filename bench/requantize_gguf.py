"""Write a GGUF file in another type, with llama.cpp's own quantizer, so that all engines get the same weights.

    PEER_PYTHON bench/requantize_gguf.py MODEL.gguf Q4_0|Q8_0|BF16 TO.gguf

Runs in the interpreter of llama-cpp-python. A file that is quantized already is dequantized first, and loses by it:
such files are for speed, not for quality.
"""

import ctypes
import sys

import llama_cpp

FILE_TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
}


def requantize(source: str, file_type: str, target: str) -> None:
    """Write `target`: the matrices of `source` in that type, but for those that llama.cpp keeps better (the head)."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not write {target}")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] not in FILE_TYPES:
        raise SystemExit(__doc__)
    requantize(*sys.argv[1:])
