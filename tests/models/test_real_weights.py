"""Law 1 on real weights: SmolLM2 and Qwen2.5-Coder from GGUF against transformers, which dequantizes them itself."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from freehold.evaluate.laws import check_laws
from freehold.models.decoder import Decoder
from freehold.models.families import FAMILIES
from freehold.models.layout import Capacity, Layout
from inputs import qwen_coder_gguf, smollm2_gguf
from models.witness import load_ours, our_logits, witness_logits

# Largest difference of any logit, the logits being up to 36. The kernels sum in another order than torch: 3e-4 at most.
TOLERANCE = 1e-3
NUM_NEW_TOKENS = 64
PAGE_SIZE = 32

# The capital of France is | Once upon a time, in a small village by the sea, | def fibonacci(n): ... |
# Water boils at 100 degrees Celsius. At high altitude | What is the capital of France? (in the chat template's form)
SMOLLM2_PROMPTS = [
    [504, 3575, 282, 4649, 314],
    [6403, 1980, 253, 655, 28, 281, 253, 1165, 6560, 411, 260, 3426, 28],
    [1604, 3987, 46477, 24, 94, 727, 472, 1620, 14362, 260, 304, 29, 373, 24681, 46477, 1230, 7996, 198],
    [12615, 36411, 418, 216, 33, 32, 32, 5027, 20590, 30, 1814, 904, 14676],
    [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 19842, 13099, 30, 2, 198, 1, 520, 9531, 198],
]
QWEN_PROMPTS = [
    [785, 6722, 315, 9625, 374],
    [12522, 5193, 264, 882, 11, 304, 264, 2613, 14126, 553, 279, 9396, 11],
    [750, 75698, 1445, 982, 262, 4210, 5598, 279, 308, 7563, 79683, 1372, 14442],
    [28253, 88955, 518, 220, 16, 15, 15, 12348, 61347, 13, 2411, 1550, 35858],
    [151644, 872, 198, 3838, 374, 279, 6722, 315, 9625, 30, 21806, 26753, 13, 151645, 198, 151644, 77091, 198],
]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One set of weights in Freehold and in transformers, and the prompts."""

    ours: Decoder
    witness: PreTrainedModel
    prompts: list[Tensor]


@pytest.fixture(scope="module", params=["smollm2", "qwen-coder"])
def pair(request) -> Pair:
    file, prompts = {
        "smollm2": (smollm2_gguf, SMOLLM2_PROMPTS),
        "qwen-coder": (qwen_coder_gguf, QWEN_PROMPTS),
    }[request.param]
    path: Path = file()
    witness = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return Pair(
        ours=load_ours(path, torch.float32),
        witness=witness.eval().requires_grad_(False),
        prompts=[torch.tensor(prompt) for prompt in prompts],
    )


@torch.inference_mode()
def greedy_together(decoder: Decoder, prompts: list[Tensor]) -> list[Tensor]:
    """Return the greedy continuations of all prompts, decoded as one batch with states."""
    rows = [-(-(len(prompt) + NUM_NEW_TOKENS) // PAGE_SIZE) for prompt in prompts]
    pages = [list(range(sum(rows[:i]), sum(rows[: i + 1]))) for i in range(len(rows))]
    states = decoder.allocate_states(Capacity(num_slots=len(rows), num_pages=sum(rows), page_size=PAGE_SIZE))
    contexts, step, tokens = [0] * len(prompts), prompts, []
    for _ in range(NUM_NEW_TOKENS):
        lengths = [len(part) for part in step]
        layout = Layout.step(lengths, contexts, slots=range(len(rows)), pages=pages, page_size=PAGE_SIZE)
        hidden_TD = decoder(torch.cat(step), layout, states)
        next_B = decoder.logits(hidden_TD[torch.tensor(layout.starts[1:]) - 1]).argmax(dim=-1)
        tokens.append(next_B)
        contexts, step = list(layout.ends), list(next_B[:, None])
    return list(torch.stack(tokens, dim=1))


def test_logits_equal_the_witness(pair):
    differences = [
        float((our_logits(pair.ours, prompt) - witness_logits(pair.witness, prompt)).abs().max())
        for prompt in pair.prompts
    ]
    assert max(differences) <= TOLERANCE, differences


def test_greedy_continuations_are_the_tokens_that_the_witness_would_choose(pair):
    for prompt, continuation in zip(pair.prompts, greedy_together(pair.ours, pair.prompts), strict=True):
        logits_LV = witness_logits(pair.witness, torch.cat((prompt, continuation)))
        chosen = logits_LV[len(prompt) - 1 : -1].argmax(dim=-1)  # each after the same tokens before it
        assert continuation.tolist() == chosen.tolist()


def test_a_greedy_continuation_equals_what_the_witness_generates(pair):
    prompt = pair.prompts[1]
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": 0, "eos_token_id": 1 << 30}
    found = pair.witness.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **settings)[0]
    (expected,) = greedy_together(pair.ours, [prompt])
    assert found[len(prompt) :].tolist() == expected.tolist()


def test_every_law_holds_for_real_weights(pair):
    (family,) = (f for f in FAMILIES if f.model_type == pair.witness.config.model_type)
    names = family.tensor_names(pair.ours.spec, ())
    assert [finding for finding in check_laws(pair.ours, names, seed=0) if not finding.holds] == []
