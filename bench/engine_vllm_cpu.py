"""vLLM for CPU as the benchmarks run it: its engine in this process, step by step, from a Hugging Face folder."""

import os
import time
from itertools import count
from pathlib import Path

from engine_process import Prompt

CACHE_GB = 1


def open_engine(path: Path, *, weights: str, num_threads: int) -> "VllmCpuEngine":
    """Return the engine. weights: a dtype."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
    }
    return VllmCpuEngine(path, weights)


class VllmCpuEngine:
    """One engine; requests of a batch are added together and end together."""

    def __init__(self, path: Path, dtype: str):
        import vllm

        self.version = vllm.__version__
        self._sampling = vllm.SamplingParams
        arguments = vllm.EngineArgs(
            model=str(path),
            dtype=dtype,
            max_model_len=1024,
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine = vllm.LLMEngine.from_engine_args(arguments)
        self._request_ids = count()

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds from ids to the first token."""
        start = time.perf_counter()
        self._add(prompt, 1)
        self._engine.step()
        seconds = time.perf_counter() - start
        assert not self._engine.has_unfinished_requests(), "the prompt was read in one step"
        return seconds

    def decode(self, prompt: Prompt, num_steps: int) -> float:
        """Return the seconds of so many steps of one sequence."""
        return self.batch([prompt], num_steps)

    def batch(self, prompts: list[Prompt], num_steps: int) -> float:
        """Return the seconds of so many steps of all sequences together; the first step reads all prompts."""
        for prompt in prompts:
            self._add(prompt, num_steps + 1)
        self._engine.step()
        start = time.perf_counter()
        for _ in range(num_steps):
            self._engine.step()
        seconds = time.perf_counter() - start
        assert not self._engine.has_unfinished_requests(), "a step gives every sequence a token"
        return seconds

    def _add(self, prompt: Prompt, num_tokens: int) -> None:
        sampling = self._sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(next(self._request_ids)), {"prompt_token_ids": prompt}, sampling)
