"""The data sets of a run, opened and checked: what is trained on as a stream, what is held out, whose text they are.

Not here: order and packing (train/order.py, train/packing.py); losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.parallel.data import let_go
from freehold.parallel.processes import ALONE, OWN_SEQUENCES, Processes
from freehold.recipes.settings import DataSettings
from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from freehold.train.batch import Batch
from freehold.train.dataset import Dataset, Sequences
from freehold.train.order import Order, Source
from freehold.train.packing import Stream

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What is trained on, without end; and what is held out, one pass of it."""

    train: Stream
    held_out: Stream | None


def open_streams(
    settings: DataSettings,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_positions: int,
    seed: int,
    note: Note,
) -> Streams:
    """Return the streams of a run whose model has this text side and this context.

    note: told of what is cut or left out.
    Raises: BadInput for data of another model, for a sequence that is longer than its context, as serving refuses it,
        and where nothing is trained on.
    """

    def stream(folders: Sequence[Path], weights: Sequence[float | None], order_seed: int | None) -> Stream:
        sources = []
        for folder, weight in zip(folders, weights, strict=True):
            dataset = Dataset(folder)
            dataset.check_model(tokenizer, template)
            sequences = Sequences(dataset, settings.sequence_tokens)
            _check_longest(sequences, folder, max_positions)
            if sequences.num_cut or sequences.num_left_out:
                note(
                    f"{folder.name}: at {settings.sequence_tokens:,} tokens {sequences.num_cut:,} conversations are "
                    f"cut and {sequences.num_left_out:,} left out, whose first answer comes later"
                )
            sources.append(Source(name=folder.name, sequences=sequences, weight=weight))
        return Stream(Order(sources, seed=order_seed), budget_tokens=settings.budget_tokens)

    trained_on = {folder.resolve() for folder in settings.train}
    if both := [folder for folder in settings.held_out if folder.resolve() in trained_on]:
        raise BadInput(f"{both[0]} is trained on and held out", hint="what is trained on measures nothing")
    weights = settings.weights or (None,) * len(settings.train)
    held_out = settings.held_out
    return Streams(
        train=stream(settings.train, weights, seed if settings.shuffled else None),
        held_out=stream(held_out, (None,) * len(held_out), None) if held_out else None,
    )


def _check_longest(sequences: Sequences, folder: Path, max_positions: int) -> None:
    if sequences.longest > max_positions:
        raise BadInput(
            f"{folder.name} has sequences of {sequences.longest:,} tokens, the model's context is {max_positions:,}, "
            "and nothing longer is served",
            hint=f"data.sequence_tokens={max_positions} ends them there; a longer context is the config's "
            "max_position_embeddings",
        )


def share_of(batch: Batch, processes: Processes) -> Batch:
    """Return what of a batch this process computes: its tokens of each, where sequences are divided."""
    return batch.part(processes.group("context")) if processes.size("context") > 1 else batch


@torch.no_grad()
def held_out_loss(decoder: Decoder, stream: Stream, processes: Processes = ALONE) -> float:
    """Return the mean negative log-likelihood of the supervised tokens of one pass over a stream, nats.

    Each process computes as many packs as the others; where the last round has too few, some compute one for nothing.
    """
    total, num_supervised, packs = 0.0, 0, stream.one_pass()
    while together := list(islice(packs, processes.size(*OWN_SEQUENCES))):
        index = processes.index(*OWN_SEQUENCES)
        batch = share_of(stream.batch(together[index % len(together)], decoder.device), processes)
        hidden_TD = decoder(batch.tokens_T, batch.layout)
        loss, count = decoder.lm_head.loss(hidden_TD, batch.labels_T)
        if index < len(together):
            total, num_supervised = total + float(loss), num_supervised + count
    let_go(decoder)
    total, num_supervised = processes.sum(torch.tensor([total, num_supervised], dtype=torch.float64)).tolist()
    if not num_supervised:
        raise BadInput("nothing in the held-out data is trained on in sequences of this length")
    return total / num_supervised
