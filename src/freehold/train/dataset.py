"""A folder of shards, and the sequences that training takes out of its documents.

Belongs here: `data.json`, which says that a folder is whole and what it was made of; which part of which document is
sequence number n. Not here: the order of sequences (order.py), and which go together (packing.py).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from freehold.errors import BadFile, BadInput, NotFound
from freehold.ops.loss import IGNORED
from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from freehold.train.batch import Example
from freehold.train.counts import Counts
from freehold.train.shards import REBUILD, Shard

MANIFEST = "data.json"
FORMAT = "freehold data 1"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a data set is made of, and how: the same plan gives the same shards.

    tokenizer, template: digests. sources: name and SHA-256 of each file, in order. ignored: keys of rows left out.
    """

    format: str
    tokenizer: str
    template: str | None
    sources: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    reasoning: bool
    tool_calls: bool

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Dataset:
    """A folder of shards that is whole."""

    def __init__(self, folder: Path) -> None:
        """Open a data set; headers are read, tokens are not. Raises: NotFound, BadFile."""
        self.name = folder.name
        self.plan, self._digests = _read_manifest(folder)
        self.shards = tuple(Shard(folder / name) for name in self._digests)
        for shard, digest in zip(self.shards, self._digests.values(), strict=True):
            if shard.header.plan != self.plan.digest or shard.header.payload_sha256 != digest:
                raise BadFile(f"{shard.name} belongs to another data set than {MANIFEST} beside it", hint=REBUILD)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in it: plan and shards."""
        return hashlib.sha256(json.dumps([self.plan.digest, self._digests]).encode()).hexdigest()

    @property
    def counts(self) -> Counts:
        """What was counted while it was built."""
        return sum((shard.header.counts for shard in self.shards), start=Counts())

    def check_model(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        """Refuse a model that reads other ids, or writes conversations in another way. Raises: BadInput."""
        if tokenizer.digest != self.plan.tokenizer:
            raise BadInput(f"{self.name} was built with another model's tokenizer", hint="build it with this model")
        if self.counts.answers and (template is None or template.digest != self.plan.template):
            raise BadInput(f"{self.name} was built with another chat template", hint="build it with this model")


class Sequences:
    """The documents of a data set as sequences of at most `max_tokens`, numbered from 0.

    The last token of a document is only a label: nothing follows it. A text that is longer becomes several sequences,
    one after the other, and each of its tokens but the first is a label once. A conversation that is longer is cut
    (num_cut), and left out where its first answer lies behind the cut (num_left_out). longest: tokens of the longest.
    """

    def __init__(self, dataset: Dataset, max_tokens: int) -> None:
        """Raises: BadInput where no sequence is left."""
        self._dataset, self.max_tokens = dataset, max_tokens
        self.num_cut = self.num_left_out = self.num_tokens = self.longest = 0
        self._ends: list[Tensor] = []  # for each shard: sequences up to the end of each document
        starts = [0]
        for shard in dataset.shards:
            self._ends.append(self._count(shard))
            starts.append(starts[-1] + int(self._ends[-1][-1]))
        self._shard_ends = torch.tensor(starts[1:])
        self._shard_starts = starts
        if not len(self):
            raise BadInput(
                f"{dataset.name}: nothing is trained on in sequences of {max_tokens:,} tokens",
                hint=f"all {self.num_left_out:,} conversations have their first answer later; longer sequences hold it",
            )

    def __len__(self) -> int:
        return self._shard_starts[-1]

    @property
    def digest(self) -> str:
        """The data set's."""
        return self._dataset.digest

    def length(self, number: int) -> int:
        """Return the tokens of a sequence."""
        _, start, stop = self._place(number)
        return stop - start

    def example(self, number: int) -> Example:
        """Return a sequence with its labels."""
        (shard, has_mask), start, stop = self._place(number)
        ids = shard.ids(start, stop + 1)
        labels_L = ids[1:]
        if has_mask:
            labels_L = labels_L.masked_fill(~shard.trained(start + 1, stop + 1), IGNORED)
        return Example(tokens_L=ids[:-1], labels_L=labels_L)

    def _count(self, shard: Shard) -> Tensor:
        """Return how many sequences there are up to the end of each document of a shard."""
        sizes, limit = shard.ends.diff(prepend=torch.zeros(1, dtype=torch.int64)) - 1, self.max_tokens
        has_mask, is_left_out = shard.firsts > 0, shard.firsts > limit
        kept = torch.where(has_mask, sizes.clamp(max=limit), sizes).masked_fill(is_left_out, 0)
        self.num_cut += int((has_mask & ~is_left_out & (sizes > limit)).sum())
        self.num_left_out += int(is_left_out.sum())
        self.num_tokens += int(kept.sum())
        self.longest = max(self.longest, min(int(kept.max()), limit))
        return ((kept + limit - 1) // limit).cumsum(0)

    def _place(self, number: int) -> tuple[tuple[Shard, bool], int, int]:
        """Return the shard of a sequence, whether its document has a mask, and its first and last place but one."""
        which = int(torch.searchsorted(self._shard_ends, number, right=True))
        shard, ends, within = self._dataset.shards[which], self._ends[which], number - self._shard_starts[which]
        document = int(torch.searchsorted(ends, within, right=True))
        part = within - (int(ends[document - 1]) if document else 0)
        start = (int(shard.ends[document - 1]) if document else 0) + part * self.max_tokens
        stop = min(start + self.max_tokens, int(shard.ends[document]) - 1)
        return (shard, bool(shard.firsts[document])), start, stop


def _read_manifest(folder: Path) -> tuple[Plan, dict[str, str]]:
    """Return the plan of a data set, and the digest of each shard by its name."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder.name}")
    if not file.is_file():
        raise NotFound(
            f"{folder.name} has no {MANIFEST}: it is no data set, or not built to its end",
            hint="freehold data build, with the command that began it",
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        fields, shards = manifest["plan"], manifest["shards"]
        sources = tuple((name, sha256) for name, sha256 in fields["sources"])
        plan = Plan(**{**fields, "sources": sources, "ignored": tuple(fields["ignored"])})
        if plan.format != FORMAT or not isinstance(shards, dict) or not shards or any("/" in name for name in shards):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadFile(f"{folder.name}/{MANIFEST} is damaged, or another version's", hint=REBUILD) from None
    return plan, shards
