"""OpenVINO GenAI as the benchmarks run it: its continuous batching, step by step, from a GGUF file of Q4_0 or Q8_0."""

import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from engine_process import Prompt

STEP_TOKENS = 1024  # at most in one step; the default of 256 would cut a prompt in two


def open_engine(path: Path, *, weights: str, num_threads: int) -> "OpenvinoEngine":
    """Return the engine. weights: `stored`, there is no other way."""
    assert weights == "stored", "OpenVINO computes with what the file holds"
    return OpenvinoEngine(path, num_threads)


class OpenvinoEngine:
    """One pipeline; requests of a batch are added together and end together."""

    version = openvino_genai.__version__

    def __init__(self, path: Path, num_threads: int):
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_batched_tokens = STEP_TOKENS
        properties = {"INFERENCE_NUM_THREADS": num_threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduling, "CPU", properties)
        self._request_ids = count()

    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds from ids to the first token."""
        start = time.perf_counter()
        handle = self._add(prompt, 1)
        self._pipeline.step()
        seconds = time.perf_counter() - start
        assert len(handle.read_all()[0].generated_ids) == 1, "the prompt was read in one step"
        return seconds

    def decode(self, prompt: Prompt, num_steps: int) -> float:
        """Return the seconds of so many steps of one sequence."""
        return self.batch([prompt], num_steps)

    def batch(self, prompts: list[Prompt], num_steps: int) -> float:
        """Return the seconds of so many steps of all sequences together; the first step reads all prompts."""
        handles = [self._add(prompt, num_steps + 1) for prompt in prompts]
        self._pipeline.step()
        start = time.perf_counter()
        for _ in range(num_steps):
            self._pipeline.step()
        seconds = time.perf_counter() - start
        lengths = {len(handle.read_all()[0].generated_ids) for handle in handles}
        assert lengths == {num_steps + 1}, f"a step gave every sequence a token, but there are {lengths}"
        return seconds

    def _add(self, prompt: Prompt, num_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(next(self._request_ids), ids, config)
