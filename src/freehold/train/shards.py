"""Documents in tokens on disk. A shard is one file that appears whole and is mapped, never loaded.

    8 bytes: length of the header | header, JSON | ends | firsts | ids | mask

    ends    int64, for each document: where it ends among the shard's ids
    firsts  int64, for each document: its first token that is trained on; 0 where all but the first are
    ids     uint16, or uint32 for a large vocabulary
    mask    a bit for each id, whether it is trained on; absent where every `first` is 0

Belongs here: the file of one shard. Which shards are a data set is in dataset.py, how they come about in build.py.
"""

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.errors import BadFile, NotFound
from freehold.train.counts import Counts
from freehold.train.tokenized import Document

LENGTH_BYTES, INT64_BYTES, MAX_HEADER_BYTES = 8, 8, 1 << 20
# Headers are padded so that what follows them is aligned for every type of it.
ALIGNMENT_BYTES = 64
REBUILD = "remove it, the shards behind it and data.json, and build again with the same command: the rest is kept"
BIT_VALUES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a shard says of itself.

    plan: digest of what the data set is made of and how. payload_sha256: of everything behind the header.
    """

    plan: str
    id_bytes: int
    num_tokens: int
    num_documents: int
    has_mask: bool
    counts: Counts
    payload_sha256: str

    @property
    def payload_bytes(self) -> int:
        """Bytes behind the header."""
        mask_bytes = -(-self.num_tokens // 8) if self.has_mask else 0
        return 2 * INT64_BYTES * self.num_documents + self.id_bytes * self.num_tokens + mask_bytes


class ShardWriter:
    """Documents in memory until they are written as one shard."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._ids = array("H" if vocab_size <= 1 << 16 else "I")
        self._ends, self._firsts = array("q"), array("q")
        self._trained = bytearray()
        self._counts = Counts()

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def successor(self) -> "ShardWriter":
        """Return an empty one of the same kind."""
        return ShardWriter(self._vocab_size)

    def add(self, documents: Sequence[Document], counts: Counts) -> None:
        """Add the documents of a row, and what was counted in it. Mutates: self."""
        for document in documents:
            self._ids.extend(document.ids)
            self._ends.append(len(self._ids))
            self._firsts.append(0 if document.is_whole else document.first_trained)
            self._trained.extend(document.trained)
        self._counts += counts

    def write(self, file: Path, *, plan: str) -> ShardHeader:
        """Write the shard, which appears whole or not at all. Raises: OSError, naming the file."""
        has_mask = any(self._firsts)
        parts = [self._ends.tobytes(), self._firsts.tobytes(), self._ids.tobytes()]
        payload = b"".join([*parts, _packed_bits(self._trained) if has_mask else b""])
        header = ShardHeader(
            plan=plan,
            id_bytes=self._ids.itemsize,
            num_tokens=len(self._ids),
            num_documents=len(self._ends),
            has_mask=has_mask,
            counts=self._counts,
            payload_sha256=hashlib.sha256(payload).hexdigest(),
        )
        text = json.dumps(asdict(header)).encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
        write_whole(file, len(text).to_bytes(LENGTH_BYTES, "little") + text + payload)
        return header


class Shard:
    """One shard, mapped. Documents and ids are counted from 0 within it."""

    def __init__(self, file: Path) -> None:
        """Map a shard. Raises: NotFound, BadFile where it is cut short or no shard; its payload is not read."""
        self.name = file.name
        content = _mapped(file)
        self.header, self._start = _read_header(content, file)
        wanted = self._start + self.header.payload_bytes
        if len(content) != wanted:
            raise BadFile(
                f"{file.name} has {len(content):,} bytes where {wanted:,} are wanted: it is torn", hint=REBUILD
            )
        header, place = self.header, self._start
        self.ends = torch.frombuffer(content, dtype=torch.int64, offset=place, count=header.num_documents)
        place += INT64_BYTES * header.num_documents
        self.firsts = torch.frombuffer(content, dtype=torch.int64, offset=place, count=header.num_documents)
        place += INT64_BYTES * header.num_documents
        dtype = torch.uint16 if header.id_bytes == 2 else torch.uint32
        self._ids = torch.frombuffer(content, dtype=dtype, offset=place, count=header.num_tokens)
        self._mask_start = place + header.id_bytes * header.num_tokens
        self._content = content

    def ids(self, start: int, stop: int) -> Tensor:
        """Return ids [start, stop), int64."""
        return self._ids[start:stop].to(torch.int64)

    def trained(self, start: int, stop: int) -> Tensor:
        """Return whether the ids [start, stop) of a document with a mask are trained on."""
        first, end = start // 8, -(-stop // 8)
        packed = torch.frombuffer(self._content, dtype=torch.uint8, offset=self._mask_start + first, count=end - first)
        bits = (packed[:, None] & BIT_VALUES).ne(0).flatten()
        return bits[start - 8 * first : stop - 8 * first]

    def verify(self) -> None:
        """Read all of the shard and refuse it where a byte is not what was written. Raises: BadFile."""
        if hashlib.sha256(memoryview(self._content)[self._start :]).hexdigest() != self.header.payload_sha256:
            raise BadFile(f"{self.name}: its digest is not what its header says", hint=REBUILD)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all. Raises: OSError, naming the file."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise


def _packed_bits(trained: bytearray) -> bytes:
    padded = trained + bytes(-len(trained) % 8)
    bits = torch.frombuffer(padded, dtype=torch.uint8).view(-1, 8)
    return bytes((bits * BIT_VALUES).sum(dim=1, dtype=torch.uint8).tolist())


def _mapped(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes no memory that it may not write
    except FileNotFoundError:
        raise NotFound(f"{file.parent.name} lacks its shard {file.name}", hint=REBUILD) from None
    except ValueError:
        raise BadFile(f"{file.name} is empty", hint=REBUILD) from None


def _read_header(content: mmap.mmap, file: Path) -> tuple[ShardHeader, int]:
    """Return the header of a shard, and where its payload begins."""
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, len(content) - LENGTH_BYTES):
        raise BadFile(f"{file.name} is no shard, or it is torn", hint=REBUILD)
    try:
        fields: dict[str, Any] = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
        header = ShardHeader(**{**fields, "counts": Counts(**fields["counts"])})
        sizes, counts = (header.num_tokens, header.num_documents), asdict(header.counts).values()
        if header.id_bytes not in (2, 4) or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError
        if not all(type(count) is int for count in counts):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadFile(f"{file.name}: its header is damaged", hint=REBUILD) from None
    return header, LENGTH_BYTES + length
