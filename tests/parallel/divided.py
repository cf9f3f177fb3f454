"""The same step in one process and in a divided model: what a process of a fleet does, and how far they are apart."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from freehold.adapt.lora import LoraSettings, wrap
from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.ops.loss import IGNORED
from freehold.parallel.model import divide_model
from freehold.parallel.processes import Processes
from freehold.train.balance import all_blocks, count_choices, new_loads, total_balance
from freehold.train.batch import Batch, BatchPart, Example
from freehold.train.optim import train_all
from models.tiny import Config, random_tokens, tiny_decoder

VOCAB = 96  # a multiple of 2 and 4
MTP_WEIGHT, BALANCE_WEIGHT, DEPTHS = 0.3, 0.1, 2


def ulps(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference in float32 ulps of the largest value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)}, wanted {tuple(expected.shape)}"
    assert found.isfinite().all()
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / (scale * torch.finfo(torch.float32).eps)


def packed(lengths: tuple[int, ...], *, seed: int) -> Batch:
    """Return random documents in one batch."""
    rows = random_tokens(sum(lengths), vocab_size=VOCAB, seed=seed).split(lengths)
    ends = torch.tensor([IGNORED])
    return Batch.packed([Example(tokens_L=row_L, labels_L=torch.cat((row_L[1:], ends))) for row_L in rows])


def batches_of(lengths: tuple[int, ...], count: int) -> list[Batch]:
    """Return batches of documents of these lengths, each in another order and of other tokens."""
    return [packed(lengths[-index:] + lengths[:-index], seed=index) for index in range(count)]


def trained(config: Config, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a decoder of a config that asks for gradients."""
    decoder = tiny_decoder(config | {"vocab_size": VOCAB}, dtype=dtype)
    train_all(decoder)
    return decoder


def part_of_batch(batch: Batch, processes: Processes) -> Batch:
    """Return what of a batch this process computes."""
    return batch.part(processes.group("context")) if processes.size("context") > 1 else batch


def losses(decoder: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of all losses of a batch, and what it is made of by name."""
    num_blocks, loads = len(decoder.blocks), new_loads(decoder)
    hidden_TD = decoder(batch.tokens_T, batch.layout, loads[:num_blocks])
    loss, _ = decoder.lm_head.loss(hidden_TD, batch.labels_T)
    found = {"hidden": hidden_TD, "loss": loss}
    for depth in range(1, DEPTHS + 1) if decoder.mtp else ():
        batch = batch.further
        hidden_TD = decoder.mtp(hidden_TD, decoder.embeddings(batch.tokens_T), batch.layout, loads[num_blocks:])
        further, _ = decoder.lm_head.loss(hidden_TD, batch.labels_T)
        found |= {f"hidden of depth {depth}": hidden_TD, f"loss of depth {depth}": further}
        loss = loss + MTP_WEIGHT * further
    balance = total_balance(loads)
    found |= {"balance": balance} | {f"choices {i}": counts_E for i, counts_E in enumerate(count_choices(loads))}
    return loss + BALANCE_WEIGHT * balance, {name: value.detach() for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step made: hidden states of this process's tokens; sums over all; whole gradients, and their norm."""

    hidden: dict[str, Tensor]
    sums: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norm: float


def alone(config: Config, batches: list[Batch], mine: int, *, dtype: torch.dtype = torch.float32) -> Outcome:
    """Return what one process makes of all batches; hidden states are those of batch `mine`."""
    decoder = trained(config, dtype)
    found = []
    for batch in batches:
        loss, parts = losses(decoder, batch)
        loss.backward()
        found.append(parts)
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    return Outcome(
        hidden={name: value for name, value in found[mine].items() if name.startswith("hidden")},
        sums={
            name: torch.stack([parts[name] for parts in found]).sum(dim=0)
            for name in found[mine]
            if not name.startswith("hidden")
        },
        gradients=gradients,
        norm=float(torch.nn.utils.get_total_norm(gradients.values())),
    )


def together(
    processes: Processes,
    config: Config,
    batch: Batch,
    *,
    recomputes: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """Return what this process and the others make of all their batches."""
    decoder = trained(config, dtype)
    for block in all_blocks(decoder):
        block.recomputes = recomputes
    divided = divide_model(decoder, processes)
    loss, found = losses(decoder, part_of_batch(batch, processes))
    loss.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    ways = divided.gradients(decoder)
    ways.sum(gradients)
    return Outcome(
        hidden={name: value for name, value in found.items() if name.startswith("hidden")},
        sums={name: processes.sum(value) for name, value in found.items() if not name.startswith("hidden")},
        gradients={name: divided.whole(name, gradient) for name, gradient in gradients.items()},
        norm=float(ways.norm(gradients)),
    )


def distances(processes: Processes, config: Config, lengths: tuple[int, ...]) -> dict[str, float]:
    """Return how far a divided model's step is from that of one process, in ulps by name."""
    workers, mine = processes.size("data", "expert"), processes.index("data", "expert")
    batches = batches_of(lengths, workers)
    expected, found = alone(config, batches, mine), together(processes, config, batches[mine])
    part = part_of_batch(batches[mine], processes)
    here = part.layout.slice if isinstance(part, BatchPart) else slice(None)
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = {name: (value, expected.hidden[name][here]) for name, value in found.hidden.items()}
    pairs |= {name: (value, expected.sums[name]) for name, value in found.sums.items()}
    pairs |= {f"gradient of {name}": (value, expected.gradients[name]) for name, value in found.gradients.items()}
    pairs["norm"] = (torch.tensor(found.norm), torch.tensor(expected.norm))
    return {name: ulps(*pair) for name, pair in pairs.items()}


def has_same_bits(processes: Processes, config: Config, lengths: tuple[int, ...], recomputes: bool) -> bool:
    """Return whether a step done again makes the same bits; when it is, blocks are recomputed or not."""
    batch = batches_of(lengths, processes.size("data", "expert"))[processes.index("data", "expert")]
    first, second = (together(processes, config, batch, recomputes=again) for again in (False, recomputes))
    return all(torch.equal(value, second.gradients[name]) for name, value in first.gradients.items())


def errors_in_bfloat16(
    processes: Processes, config: Config, lengths: tuple[int, ...]
) -> dict[str, tuple[float, float]]:
    """Return by name how far gradients in bfloat16 are from those in float32: of the divided model, of one process."""
    workers, mine = processes.size("data", "expert"), processes.index("data", "expert")
    batches = batches_of(lengths, workers)
    exact = alone(config, batches, mine).gradients
    of_one = alone(config, batches, mine, dtype=torch.bfloat16).gradients
    of_all = together(processes, config, batches[mine], dtype=torch.bfloat16).gradients

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.float() - expected).norm() / expected.norm())

    return {name: (error(of_all[name], value), error(of_one[name], value)) for name, value in exact.items()}


def measured(processes: Processes, config: Config, lengths: tuple[int, ...]) -> dict[str, float]:
    """Return how far sums of losses are from those of one process where no gradient is wanted, in ulps by name."""
    workers, mine = processes.size("data", "expert"), processes.index("data", "expert")
    batches, decoder = batches_of(lengths, workers), trained(config)
    with torch.no_grad():
        expected = sum(losses(decoder, batch)[0] for batch in batches)
        divide_model(decoder, processes)
        found, _ = losses(decoder, part_of_batch(batches[mine], processes))
    return {"loss": ulps(processes.sum(found), expected)}


def refusal(processes: Processes, config: Config) -> str:
    """Return why a model cannot be divided."""
    with pytest.raises(BadInput) as caught:
        divide_model(tiny_decoder(config), processes)
    return str(caught.value)


def refusal_of_tokens(processes: Processes, num_tokens: int) -> str:
    """Return why so few tokens cannot be divided."""
    with pytest.raises(BadInput) as caught:
        packed((num_tokens,), seed=0).part(processes.group("context"))
    return str(caught.value)


def refusal_of_an_adapter(processes: Processes, config: Config) -> str:
    """Return why a model with an adapter cannot be divided."""
    decoder = tiny_decoder(config | {"vocab_size": VOCAB})
    wrap(decoder, LoraSettings(rank=4, alpha=4.0), seed=0)
    with pytest.raises(BadInput) as caught:
        divide_model(decoder, processes)
    return str(caught.value)
