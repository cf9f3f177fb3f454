"""llama.cpp as the benchmarks run it: its C interface through llama-cpp-python, with its own defaults for speed.

The weights are read into memory instead of mapped, so that no page fault falls into a measurement; repacking and flash
attention are as llama.cpp chooses. Logits are asked for where they are needed, after the last token of a sequence.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from engine_process import Prompt

UBATCH_TOKENS = 512


def open_engine(path: Path, *, weights: str, num_threads: int) -> "LlamaCppEngine":
    """Return the engine. weights: `stored`, there is no other way."""
    assert weights == "stored", "llama.cpp computes with what the file holds"
    return LlamaCppEngine(path, num_threads)


class LlamaCppEngine:
    """One model, and one context at a time, as large as what is measured."""

    version = llama_cpp.__version__

    def __init__(self, path: Path, num_threads: int):
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._num_threads = num_threads
        self._context: Any = None
        self._context_shape = (0, 0)
        self._batch: Any = llama_cpp.llama_batch_init(UBATCH_TOKENS, 0, 1)

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds from ids to the logits after the last of them."""
        self._begin(1, len(prompt))
        start = time.perf_counter()
        self._step([prompt], position=0)
        return time.perf_counter() - start

    def decode(self, prompt: Prompt, num_steps: int) -> float:
        """Return the seconds of so many steps of one sequence."""
        return self.batch([prompt], num_steps)

    def batch(self, prompts: list[Prompt], num_steps: int) -> float:
        """Return the seconds of so many steps of all sequences together."""
        length = len(prompts[0])
        self._begin(len(prompts), length + num_steps)
        tokens = self._step(prompts, position=0)
        start = time.perf_counter()
        for position in range(length, length + num_steps):
            tokens = self._step([[token] for token in tokens], position=position)
        return time.perf_counter() - start

    def _begin(self, num_sequences: int, num_tokens: int) -> None:
        """Have an empty context for so many sequences of so many tokens each."""
        if self._context_shape == (num_sequences, num_tokens):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
            return
        if self._context:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_sequences * (-(-num_tokens // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = UBATCH_TOKENS
        parameters.n_seq_max = parameters.n_outputs_max = num_sequences  # the default keeps room for 512 rows of logits
        parameters.n_threads = parameters.n_threads_batch = self._num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._context_shape = (num_sequences, num_tokens)

    def _step(self, new: list[Prompt], *, position: int) -> list[int]:
        """Return the likeliest next token of each sequence, all of which have `position` tokens behind them."""
        batch = self._batch
        assert sum(map(len, new)) <= UBATCH_TOKENS, "a step is one batch"
        index = 0
        for sequence, tokens in enumerate(new):
            for offset, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(tokens) - 1
                index += 1
        batch.n_tokens = index
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not compute a batch")
        logits = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (len(new), self._vocab_size)).argmax(axis=1).tolist()
