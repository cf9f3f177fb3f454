"""From conversations to an adapter that is served, on real weights: data, train, run and serve, as a user calls them.

transformers and PEFT learn the same beside it. bench/fine_tune.py is the long form, with TRL and with every weight.
"""

import shutil
import signal
import subprocess

import httpx
import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

import freehold
from cli.commands import TIMEOUT_S, call, spawn
from freehold.adapt.lora import wrap
from freehold.engine.adapter import save_adapter
from freehold.recipes.data import held_out_loss, open_streams
from freehold.recipes.lora import LoraRunSettings
from freehold.recipes.metrics import read_metrics
from freehold.recipes.settings import DataSettings
from freehold.recipes.toml import write_settings
from freehold.train.schedule import Schedule
from inputs import smollm2_gguf
from train.data import write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it

# Capitals in one word each, where SmolLM2 says a sentence.
LEARNT = {"France": "Paris", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo"}
HELD_OUT = {"Italy": "Rome", "Egypt": "Cairo"}
STEPS, TOKENS = 4, 256  # all of LEARNT in each step
# Nats. float32, sums in another order: 2.1e-5 at most over STEPS, in which the loss falls from 6.9 to 0.1.
LOSS_TOLERANCE = 1e-4


def asking(country):
    return {"role": "user", "content": f"What is the capital of {country}?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with SmolLM2 in float32, and data sets in the words of its template."""
    made = tmp_path_factory.mktemp("fine-tune")
    assert call("convert", smollm2_gguf(), made / "model").code == 0
    for name, capitals in (("learnt", LEARNT), ("held_out", HELD_OUT)):
        turns = [[asking(country), {"role": "assistant", "content": capital}] for country, capital in capitals.items()]
        rows = write_rows(made / f"{name}.jsonl", [{"messages": messages} for messages in turns])
        ended = call("data", "build", rows, "--model", made / "model", "--out", made / name)
        assert ended.code == 0, ended
    yield made
    shutil.rmtree(made)  # half a gigabyte


@pytest.fixture(scope="module")
def settings(folder):
    """Return the settings of a run that has been made."""
    sizes = dict.fromkeys(("sequence_tokens", "budget_tokens", "tokens_per_step"), TOKENS)
    chosen = LoraRunSettings(
        out=folder / "run",
        model=str(folder / "model"),
        threads=torch.get_num_threads(),
        data=DataSettings(train=(folder / "learnt",), held_out=(folder / "held_out",), **sizes),
        schedule=Schedule(peak=1e-3, warmup=1, total=STEPS),
    )
    (folder / "run.toml").write_text(write_settings(chosen))
    ended = call("train", "lora", folder / "run.toml")
    assert ended.code == 0, ended
    return chosen


def witness_losses(model, batch, settings):
    """Return the losses of steps that torch's AdamW takes on one batch, each sequence by itself."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen, losses = settings.optimizer, []
    optimizer = torch.optim.AdamW(trained, betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay)
    for number in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = settings.schedule.at(number)
        losses.append(0.0)
        for start, stop in batch.layout.spans:
            logits_TV = model(input_ids=batch.tokens_T[None, start:stop], use_cache=False).logits[0]
            loss = functional.cross_entropy(logits_TV, batch.labels_T[start:stop], reduction="sum")
            (loss / batch.num_supervised).backward()
            losses[-1] += loss.item() / batch.num_supervised
        torch.nn.utils.clip_grad_norm_(trained, settings.objective.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_an_adapter_of_real_weights_learns_as_in_peft_and_foretells_what_it_was_not_shown(settings, folder):
    model = freehold.load(settings.model)
    streams = open_streams(
        settings.data,
        tokenizer=model.tokenizer,
        template=model.text.template,
        max_positions=model.decoder.spec.max_positions,
        seed=settings.seed,
        note=print,
    )
    before = held_out_loss(model.decoder, streams.held_out)
    wrap(model.decoder, settings.lora, seed=settings.seed)
    save_adapter(folder / "first", model.decoder, family=model.described.family, base_sha256=None)
    theirs = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, folder / "first", is_trainable=True)
    (pack,) = streams.train.one_pass()
    expected = witness_losses(theirs, streams.train.batch(pack), settings)
    lines = list(read_metrics(settings.out))
    found = torch.tensor([line["loss"] for line in lines])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=LOSS_TOLERANCE)
    assert lines[-1]["held_out_loss"] < before / 2


def test_an_adapter_of_real_weights_is_served_and_answers_as_it_does_alone(settings):
    adapter, (country, capital) = settings.out / "adapter", next(iter(HELD_OUT.items()))
    asked = "run", settings.model, asking(country)["content"], "--max-tokens", 16
    alone = call(*asked, "--adapter", adapter).out.strip()
    assert alone == capital
    assert call(*asked).out.strip() != alone
    arguments = "serve", settings.model, "--adapter", adapter, "--port", 0, "--memory", 2
    with spawn(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        url = process.stdout.readline().strip()
        body = {"model": "model", "messages": [asking(country)], "temperature": 0.0, "max_tokens": 16}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S).json()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert answer["choices"][0]["message"]["content"] == alone
