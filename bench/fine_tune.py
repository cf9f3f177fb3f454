"""Fine-tuning beside TRL: every weight, and an adapter, of the same real model on the same tokens.

    freehold fetch smollm2-135m-instruct
    freehold convert smollm2-135m-instruct ./smollm2
    python bench/fine_tune.py ./smollm2 --peer-python PYTHON [--steps 24] [--tokens 512] [--threads 2] [--json FILE]

PYTHON has trl and chatterbot-corpus, whose questions (instruction_rows.py) both learn to answer. Freehold is run as a
user runs it: `freehold data build`, `freehold train`. TRL gets the tokens and labels that came of it, step by step, the
same rates and the adapter's first values; losses, gradients, clipping and AdamW are its own. What is compared is the
loss of each step, and the loss of what is held out, before and after. It fails where they are more than BOUND apart.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparing import processor_name

from freehold.adapt.lora import wrap
from freehold.engine.adapter import save_adapter
from freehold.engine.model import Model, load
from freehold.ops.loss import IGNORED
from freehold.recipes.data import Streams, held_out_loss, open_streams
from freehold.recipes.fine_tune import FineTuneSettings
from freehold.recipes.lora import LoraRunSettings
from freehold.recipes.metrics import read_metrics
from freehold.recipes.settings import DataSettings
from freehold.recipes.sft import SftSettings
from freehold.recipes.toml import write_settings
from freehold.train.batch import Batch
from freehold.train.schedule import cosine

# Nats. float32 on both sides; what is left is mostly the sum over the vocabulary in the loss: 2.2e-5 in 24 steps.
BOUND = 1e-4
RECIPES: dict[str, tuple[type[FineTuneSettings], float]] = {
    "sft": (SftSettings, 5e-5),
    "lora": (LoraRunSettings, 1e-3),
}
WARMUP = 3
BESIDE = Path(__file__).parent


def build_data(folder: Path, arguments: argparse.Namespace) -> None:
    """Make the rows, and data sets of them: `train` and `held_out`."""
    files = [folder / "train.jsonl", folder / "held_out.jsonl"]
    run(arguments.peer_python, BESIDE / "instruction_rows.py", *files)
    for file in files:
        freehold("data", "build", file, "--model", arguments.model, "--out", file.with_suffix(""))


def settings_of(recipe: str, folder: Path, arguments: argparse.Namespace) -> FineTuneSettings:
    """Return a run in which one pack is a step, so that the peer can take its sequences as one batch."""
    settings, peak = RECIPES[recipe]
    return settings(
        out=folder / recipe,
        model=str(arguments.model),
        threads=arguments.threads,
        data=DataSettings(
            train=(folder / "train",),
            held_out=(folder / "held_out",),
            sequence_tokens=arguments.tokens,
            budget_tokens=arguments.tokens,
            tokens_per_step=arguments.tokens,
        ),
        schedule=cosine(peak=peak, warmup=WARMUP, total=arguments.steps),
    )


def sequences_of(batch: Batch) -> Iterator[dict[str, list[int]]]:
    """Yield the sequences of a batch as the peer takes them: label t is of token t, and it moves them by one itself."""
    for start, stop in batch.layout.spans:
        tokens, labels = batch.tokens_T[start:stop].tolist(), batch.labels_T[start:stop].tolist()
        last = max(labels[-1], 0)  # foretold by the others and read by none; any token does where it is not trained on
        yield {"input_ids": [*tokens, last], "labels": [IGNORED, *labels]}


def job_of(settings: FineTuneSettings, streams: Streams, adapter: Path | None) -> dict[str, Any]:
    """Return what the peer has to do."""
    assert streams.held_out is not None, "the settings name what is held out"
    total = settings.schedule.total
    packs, _ = streams.train.take(streams.train.start, total)
    held_out = [streams.held_out.batch(pack) for pack in streams.held_out.one_pass()]
    return {
        "model": settings.model,
        "adapter": str(adapter) if adapter else None,
        "threads": settings.threads,
        "steps": [list(sequences_of(streams.train.batch(pack))) for pack in packs],
        "held_out": [sequence for batch in held_out for sequence in sequences_of(batch)],
        "rates": [settings.schedule.at(number) for number in range(1, total + 1)],
        "betas": settings.optimizer.betas,
        "eps": settings.optimizer.eps,
        "weight_decay": settings.optimizer.weight_decay,
        "max_gradient_norm": settings.objective.max_gradient_norm,
    }


def first_adapter(model: Model, settings: FineTuneSettings, folder: Path) -> Path | None:
    """Write the adapter that a run begins with, if it trains one, and return its folder. Mutates: model."""
    if not isinstance(settings, LoraRunSettings):
        return None
    wrap(model.decoder, settings.lora, seed=settings.seed)
    save_adapter(folder, model.decoder, family=model.described.family, base_sha256=None)
    return folder


def prepare(settings: FineTuneSettings, job: Path) -> float:
    """Write what the peer has to do, and return the held-out loss before all."""
    model = load(settings.model, dtype="float32")
    text = model.text
    streams = open_streams(
        settings.data,
        tokenizer=model.tokenizer,
        template=text.template,
        max_positions=model.decoder.spec.max_positions,
        seed=settings.seed,
        note=print,
    )
    assert streams.held_out is not None, "the settings name what is held out"
    before = held_out_loss(model.decoder, streams.held_out)
    adapter = first_adapter(model, settings, job.with_suffix(".adapter"))
    job.write_text(json.dumps(job_of(settings, streams, adapter)))
    return before


def compare(recipe: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what both found with one recipe: losses of steps, and of what is held out, before and after."""
    settings = settings_of(recipe, folder, arguments)
    job, result, file = (folder / f"{recipe}{end}" for end in (".job.json", ".peer.json", ".toml"))
    before = prepare(settings, job)
    file.write_text(write_settings(settings))
    freehold("train", recipe, file)
    run(arguments.peer_python, BESIDE / "peer_fine_tune.py", job, result)
    lines = list(read_metrics(settings.out))
    ours = {"losses": [line["loss"] for line in lines], "held_out": [before, lines[-1]["held_out_loss"]]}
    theirs = json.loads(result.read_text())
    return {
        "recipe": recipe,
        "peak": settings.schedule.peak,
        "supervised_tokens": [line["supervised_tokens"] for line in lines],
        "engines": {"Freehold": ours, "TRL": theirs},
        "differences": {name: differences(ours[name], theirs[name]) for name in ("losses", "held_out")},
    }


def differences(ours: list[float], theirs: list[float]) -> list[float]:
    """Return how far two curves are apart, point by point."""
    return [abs(one - other) for one, other in zip(ours, theirs, strict=True)]


def freehold(*arguments: object) -> None:
    """Run a command of Freehold's."""
    run(sys.executable, "-m", "freehold", *arguments)


def run(*command: object) -> None:
    """Run a program to its end."""
    subprocess.run([str(part) for part in command], check=True)


def show(results: list[dict[str, Any]]) -> None:
    """Print a table of losses, nats a supervised token."""
    print(f"\n{'':16}{'first step':>12}{'last step':>12}{'held out, before':>18}{'after':>10}")
    for result in results:
        for name, engine in result["engines"].items():
            first, last, before, after = engine["losses"][0], engine["losses"][-1], *engine["held_out"]
            print(f"{result['recipe']:6}{name:10}{first:12.5f}{last:12.5f}{before:18.5f}{after:10.5f}")
        steps, held_out = result["differences"]["losses"], result["differences"]["held_out"]
        mean = sum(steps) / len(steps)
        print(f"{'':6}apart: steps {max(steps):.1e} at most, {mean:.1e} in the mean; held out {max(held_out):.1e}")


def main() -> None:
    """Compare each recipe, and print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="a folder in Hugging Face's form, float32, which both read")
    add("--peer-python", required=True, help="interpreter that has trl and chatterbot-corpus")
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    add("--steps", type=int, default=24)
    add("--tokens", type=int, default=512, help="tokens of a step, at most")
    add("--threads", type=int, default=2)
    add("--json", type=Path)
    arguments = parser.parse_args()
    given = {"processor": processor_name(), "model": arguments.model.name, "tokens": arguments.tokens}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        build_data(Path(name), arguments)
        for recipe in arguments.recipes:
            results.append(compare(recipe, Path(name), arguments))
            if arguments.json:
                arguments.json.write_text(json.dumps({**given, "results": results}, indent=2) + "\n")
    show(results)
    if max(max(apart) for result in results for apart in result["differences"].values()) > BOUND:
        sys.exit(f"more than {BOUND} apart")


if __name__ == "__main__":
    main()
