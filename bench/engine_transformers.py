"""transformers as the benchmarks run it: `generate` with its defaults (SDPA attention, dynamic cache)."""

import time
from pathlib import Path

import torch
import transformers
from engine_process import Prompt
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria


def open_engine(path: Path, *, weights: str, num_threads: int) -> "TransformersEngine":
    """Return the engine. path: a Hugging Face folder. weights: a dtype."""
    torch.set_num_threads(num_threads)
    return TransformersEngine(path, getattr(torch, weights))


class StepTimes(StoppingCriteria):
    """Never stops; notes when each token was there, so that the prompt's share can be left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.seconds.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TransformersEngine:
    """One model."""

    version = transformers.__version__

    def __init__(self, path: Path, dtype: torch.dtype):
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt) -> float:
        """Return the seconds from ids to the logits after the last of them."""
        start = time.perf_counter()
        self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def decode(self, prompt: Prompt, num_steps: int) -> float:
        """Return the seconds of so many steps of one sequence."""
        return self.batch([prompt], num_steps)

    @torch.inference_mode()
    def batch(self, prompts: list[Prompt], num_steps: int) -> float:
        """Return the seconds of so many steps of all sequences together."""
        times, ids = StepTimes(), torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_steps + 1,
            stopping_criteria=[times],
        )
        assert len(times.seconds) == num_steps + 1, "nothing stops early"
        return times.seconds[-1] - times.seconds[0]
