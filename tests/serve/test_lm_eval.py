"""The evaluation harness of the field against a running server: its scores are the model's own, its answers too."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from freehold.engine.request import SamplingParams
from inputs import lm_eval_python, smollm2_gguf
from serve.servers import MODEL_NAME, engine_of, running_server

QUESTIONS = [
    {
        "question": "What is the capital of France? Answer briefly.",
        "choices": ["The capital of France is Paris.", "The capital of France is London.", "Die Grüße €."],
    },
    {"question": "What do bees make?", "choices": ["Bees make milk.", "Bees make honey.", "🙂"]},
]
TASK = {"dataset_path": "json", "test_split": "train", "doc_to_text": "prompt", "metadata": {"version": 1}}
CHOICES = TASK | {
    "task": "choices",
    "target_delimiter": "",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}
UNTIL = ["\n"]
ANSWERS = TASK | {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": UNTIL, "max_gen_toks": 24, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
# Sums over a choice of float32 logits, of prompts that were read in other pieces.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(smollm2_gguf()) as address:
        yield address


def evaluate(folder: Path, model: str, url: str, *, tasks: list[dict[str, Any]], **more: object) -> dict[str, list]:
    """Return the samples of each task, as the harness writes them down."""
    questions = folder / "questions.json"
    model_of = engine_of(smollm2_gguf()).model
    prompts = [model_of.render([{"role": "user", "content": each["question"]}]) for each in QUESTIONS]
    questions.write_text(json.dumps([each | {"prompt": at} for each, at in zip(QUESTIONS, prompts, strict=True)]))
    for task in tasks:
        whole = task | {"dataset_kwargs": {"data_files": str(questions)}}
        (folder / f"{task['task']}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    arguments = {"model": MODEL_NAME, "base_url": url, **more}
    command = [lm_eval_python(), "-m", "lm_eval", "--model", model, "--log_samples"]
    command += ["--apply_chat_template"] if model == "local-chat-completions" else ["--batch_size", 2]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", folder, "--output_path", folder, "--tasks", ",".join(task["task"] for task in tasks)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | offline, cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        task["task"]: [
            json.loads(line)
            for file in folder.rglob(f"samples_{task['task']}_*.jsonl")
            for line in file.read_text(encoding="utf-8").split("\n")
            if line
        ]
        for task in tasks
    }


def own_score(context: str, continuation: str) -> tuple[float, bool, bool]:
    """Return a continuation's log-probability, whether it is the likeliest, and whether an end id would follow it."""
    model = engine_of(smollm2_gguf()).model
    encode = model.tokenizer.encode_rendered
    ids, begin = encode(context + continuation), len(encode(context.rstrip()))  # its white space counts as continued
    scores_TV = model.logits(ids).double().log_softmax(-1)
    score = sum(float(scores_TV[place - 1, ids[place]]) for place in range(begin, len(ids)))
    likeliest = scores_TV.argmax(-1).tolist()
    return score, likeliest[begin - 1 : -1] == ids[begin:], likeliest[-1] in model.tokenizer.stop_ids


def test_choices_have_the_scores_that_the_model_gives_them_also_where_it_would_end_after_them(url, tmp_path):
    samples = evaluate(
        tmp_path, "local-completions", f"{url}/v1/completions", tasks=[CHOICES, ANSWERS], num_concurrent=3
    )
    ends = []
    assert len(samples["choices"]) == len(QUESTIONS)
    for sample in samples["choices"]:
        assert len(sample["resps"]) == 3
        for given, [(score, is_greedy)] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            own, is_likeliest, would_end = own_score(given["arg_0"], given["arg_1"])
            assert float(score) == pytest.approx(own, abs=TOLERANCE)
            assert is_greedy == str(is_likeliest)
            ends.append(would_end)
    assert any(ends)
    assert not all(ends)
    assert [sample["resps"][0][0] for sample in samples["answers"]] == own_answers()


def test_answers_to_a_chat_are_the_models_own(url, tmp_path):
    address = f"{url}/v1/chat/completions"
    samples = evaluate(
        tmp_path, "local-chat-completions", address, tasks=[ANSWERS | {"doc_to_text": "question"}], num_concurrent=2
    )
    assert [sample["resps"][0][0] for sample in samples["answers"]] == own_answers()


def own_answers() -> list[str]:
    model = engine_of(smollm2_gguf()).model
    sampling = SamplingParams(max_tokens=24, stop=tuple(UNTIL))
    return [model.chat([{"role": "user", "content": each["question"]}], sampling=sampling).text for each in QUESTIONS]
