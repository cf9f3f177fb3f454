"""Files of rows become a data set: tokenized once, in shards that appear whole.

A build that was stopped goes on after its last whole shard when it is begun again with the same files and options.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from freehold.errors import BadInput
from freehold.text.chat import ChatTemplate
from freehold.text.tokenizer import Tokenizer
from freehold.train.chat_examples import Supervision
from freehold.train.dataset import FORMAT, MANIFEST, Dataset, Plan
from freehold.train.documents import Row, check_format, read_rows
from freehold.train.shards import Shard, ShardHeader, ShardWriter, write_whole
from freehold.train.tokenized import DocumentTokenizer
from freehold.trust.identity import digest_files

# A shard is written from memory, is what a stopped build loses at most, and takes a file descriptor while it is mapped.
TOKENS_PER_SHARD = 1 << 26
NOTHING_TRAINED = "nothing is trained on in these files: no row has a text, or an answer of an assistant"

Progress = Callable[[int, int], None]  # bytes of the sources that are done, and all of them


def build_dataset(
    files: Sequence[Path],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    supervision: Supervision,
    ignored: frozenset[str] = frozenset(),
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: Progress = lambda done, total: None,
) -> Dataset:
    """Write a data set into a folder that holds none, and return it.

    ignored: keys of rows that are left out.
    Raises: BadInput for a row that cannot be used, for a folder with anything but shards of the same build in it, and
    where nothing would be trained on; OSError where the disk is full.
    """
    for file in files:
        check_format(file)
    plan = Plan(
        format=FORMAT,
        tokenizer=tokenizer.digest,
        template=template.digest if template else None,
        sources=tuple((file.name, digest_files([file])) for file in files),
        ignored=tuple(sorted(ignored)),
        reasoning=supervision.reasoning,
        tool_calls=supervision.tool_calls,
    )
    headers = _begin(folder, plan)
    try:
        num_rows = sum(header.counts.rows for header in headers)
        rows = islice(read_all(files, ignored=ignored, progress=progress), num_rows, None)
        converter = DocumentTokenizer(tokenizer, template, supervision)
        for shard in _filled(rows, converter, ShardWriter(tokenizer.vocab_size), tokens_per_shard):
            headers.append(shard.write(folder / _shard_name(len(headers)), plan=plan.digest))
        if not headers:
            raise BadInput(NOTHING_TRAINED)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    shards = {_shard_name(number): header.payload_sha256 for number, header in enumerate(headers)}
    content = json.dumps({"plan": asdict(plan), "shards": shards}, indent=2, ensure_ascii=False)
    write_whole(folder / MANIFEST, content.encode() + b"\n")
    return Dataset(folder)


def read_all(
    files: Sequence[Path], *, ignored: frozenset[str] = frozenset(), progress: Progress = lambda done, total: None
) -> Iterator[Row]:
    """Yield the rows of several files, one file after the other. Raises: BadInput."""
    for file in files:
        check_format(file)
    sizes = [file.stat().st_size for file in files]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        for row, share in read_rows(file, ignored=ignored):
            yield row
            progress(before + round(share * size), sum(sizes))
        before += size


def _begin(folder: Path, plan: Plan) -> list[ShardHeader]:
    """Make the folder, or return the headers of the shards that a stopped build of the same plan left in it."""
    if not folder.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {folder.parent} to put {folder.name} into")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder.name} is a file where a folder is wanted")
    folder.mkdir(exist_ok=True)
    names = sorted(file.name for file in folder.iterdir() if not file.name.endswith(".partial"))
    if MANIFEST in names:
        raise BadInput(f"{folder.name} holds a data set already", hint="name a folder that does not exist")
    if names != [_shard_name(number) for number in range(len(names))]:
        raise BadInput(f"{folder.name} holds other files than shards, first {names[0]}", hint="name another folder")
    shards = [Shard(folder / name) for name in names]
    for shard in shards:
        shard.verify()
        if shard.header.plan != plan.digest:
            raise BadInput(
                f"{folder.name} holds shards of another build: other files, options, tokenizer or template",
                hint="remove the folder, or name another one",
            )
    return [shard.header for shard in shards]


def _filled(
    rows: Iterator[Row], converter: DocumentTokenizer, shard: ShardWriter, tokens_per_shard: int
) -> Iterator[ShardWriter]:
    """Yield shards of about as many tokens as they may have, the first of them this one. No row is in two."""
    for row in rows:
        documents, counts = converter.documents(row)
        if documents and shard.num_tokens >= tokens_per_shard:
            yield shard
            shard = shard.successor()
        shard.add(documents, counts)
    if shard.num_tokens:
        yield shard


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"
