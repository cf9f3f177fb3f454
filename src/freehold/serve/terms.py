"""What an API key is: its form, what it is good for, and until when. Not here: where keys are kept (keys.py)."""

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from freehold.errors import BadInput

Scope = Literal["infer", "priority", "metrics", "admin"]
SCOPES = ("infer", "priority", "metrics", "admin")
TOKEN = re.compile(r"fh-([a-z2-7]{12})-([A-Za-z0-9_-]{43})", re.ASCII)
MAX_COUNT = 10**15  # of tokens or requests: far below what a column of 64 bits holds, sums included
MAX_WEIGHT = 1000.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a key is good for: what it may ask, until when, how much of it, and its share beside others; None: no limit.

    requests_per_minute, concurrency: counted by each server process for itself. tokens_per_day: of a day in UTC, prompt
    and answer together, whoever serves. Raises: BadInput where a value makes no sense.
    """

    scopes: frozenset[str] = frozenset({"infer"})
    expires_at: datetime | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if unknown := sorted(self.scopes - set(SCOPES)):
            raise BadInput(f"there is no scope {unknown[0]!r}", hint=f"use some of {', '.join(SCOPES)}")
        if not self.scopes:
            raise BadInput("a key without a scope opens nothing", hint=f"use some of {', '.join(SCOPES)}")
        for name in ("requests_per_minute", "concurrency", "tokens_per_day"):
            count = getattr(self, name)
            if count is not None and not 1 <= count <= MAX_COUNT:
                raise BadInput(f"{name} is {count}, which is not in 1 to 10^15", hint="leave it out for no limit")
        if not (math.isfinite(self.weight) and 0 < self.weight <= MAX_WEIGHT):
            raise BadInput(f"the weight is {self.weight}, and not above 0 and at most {MAX_WEIGHT:g}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key without its secret, which only its owner has."""

    id: str
    name: str
    terms: Terms
    created_at: datetime
    revoked_at: datetime | None

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """Return whether a key is good at a time, or why not."""
        if self.revoked_at is not None:
            return "revoked"
        expires = self.terms.expires_at
        return "expired" if expires is not None and expires <= now else "active"
