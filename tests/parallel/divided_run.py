"""Some steps of training in a divided model: what they report, and the checkpoint that is written after them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.divided import VOCAB, packed, part_of_batch, trained

from freehold.checkpoint.save import save_checkpoint
from freehold.models.families import family_of_config
from freehold.parallel.data import shard
from freehold.parallel.model import divide_model
from freehold.parallel.processes import ALONE, Processes
from freehold.train.optim import Optimizer, OptimizerSettings
from freehold.train.step import Objective, train_step
from models.tiny import Config

NUM_STEPS, NUM_BATCHES, RATE = 3, 4, 1e-2
# Of Adam's usual eps a gradient that is nothing but rounding is a step of full length.
SETTINGS = OptimizerSettings(eps=1e-3)
OBJECTIVE = Objective(mtp_weight=1.0, balance_weight=0.1, max_gradient_norm=0.5)  # clips in every step


def train(processes: Processes, config: Config, lengths: tuple[int, ...], is_sharded: bool, out: Path) -> list[Any]:
    """Take steps, have the first process write a checkpoint, and return what each step reported."""
    decoder = trained(config)
    divided = divide_model(decoder, processes)
    if is_sharded:
        shard(decoder, processes)
    optimizer = Optimizer(decoder, SETTINGS, divided.gradients(decoder))
    workers, mine = processes.size("data", "expert"), processes.index("data", "expert")
    reports = []
    for number in range(1, NUM_STEPS + 1):
        batches = [packed(lengths, seed=number * NUM_BATCHES + i) for i in range(NUM_BATCHES)]
        report = train_step(
            decoder,
            optimizer,
            [part_of_batch(batch, processes) for batch in batches[mine::workers]],
            number=number,
            learning_rate=RATE,
            objective=OBJECTIVE,
            sum_over_processes=processes.sum,
        )
        reports.append(asdict(report))
    if made := divided.whole_decoder(decoder):
        config = config | {"vocab_size": VOCAB}
        save_checkpoint(out, made, family=family_of_config(config), config=config)
    return reports


def train_alone(config: Config, lengths: tuple[int, ...], out: Path) -> list[Any]:
    """Do the same in one process."""
    return train(ALONE, config, lengths, False, out)
