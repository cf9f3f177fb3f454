"""The peer of bench/fine_tune.py: the same steps through TRL's SFTTrainer, on transformers, and on PEFT for an adapter.

    PYTHON bench/peer_fine_tune.py JOB.json RESULT.json

PYTHON has trl. Tokens, labels, rates and first weights are the job's; losses, gradients, clipping and AdamW are theirs.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100
Sequence = dict[str, list[int]]  # input_ids and labels, one of these for each of those


class Trainer(trl.SFTTrainer):
    """Theirs, which also notes the loss of each step to its last digit."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.losses: list[float] = []

    def compute_loss(self, *given: Any, **more: Any) -> Any:
        loss = super().compute_loss(*given, **more)
        self.losses.append(loss.item())
        return loss


def padded(sequences: list[Sequence]) -> dict[str, Tensor]:
    """Return sequences as rows of one batch."""
    longest = max(len(sequence["input_ids"]) for sequence in sequences)

    def rows(name: str, filler: int) -> Tensor:
        return torch.tensor([one[name] + [filler] * (longest - len(one[name])) for one in sequences])

    lengths = torch.tensor([len(sequence["input_ids"]) for sequence in sequences])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": rows("input_ids", 0), "labels": rows("labels", IGNORED), "attention_mask": mask}


def optimizer_of(model: torch.nn.Module, job: dict[str, Any]) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return AdamW, where matrices decay, and the rates of all steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": job["weight_decay"]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=tuple(job["betas"]), eps=job["eps"])
    rates = [*job["rates"], 0.0]  # asked for once after the last step
    return optimizer, LambdaLR(optimizer, rates.__getitem__)


@torch.no_grad()
def mean_loss(model: Any, sequences: list[Sequence]) -> float:
    """Return the mean negative log-likelihood of the labels."""
    total, count = 0.0, 0
    for sequence in sequences:
        num_labels = sum(label != IGNORED for label in sequence["labels"])
        total += float(model(**padded([sequence]), use_cache=False).loss) * num_labels
        count += num_labels
    return total / count


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Return the loss of each step, and the held-out loss before and after all."""
    torch.set_num_threads(job["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    before = mean_loss(model.eval(), job["held_out"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                max_steps=len(job["steps"]),
                per_device_train_batch_size=1,  # one item of the data set is all sequences of a step
                train_sampling_strategy="sequential",
                max_grad_norm=job["max_gradient_norm"],
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"sequences": step} for step in job["steps"]]),
            data_collator=lambda items: padded(items[0]["sequences"]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            optimizers=optimizer_of(model, job),
        )
        trainer.train()
    after = mean_loss(model.eval(), job["held_out"])
    versions = f"trl {trl.__version__}, transformers {transformers.__version__}"
    return {"versions": versions, "losses": trainer.losses, "held_out": [before, after]}


if __name__ == "__main__":
    result = train(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
